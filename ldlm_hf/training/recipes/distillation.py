"""Distillation of a trained pipeline's denoiser into one of few steps, on its own latents (objective/flow_map.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoTokenizer

from ...data import DataSettings
from ...loading.checks import check_settings
from ...models.transformer_ldlm import LDLMTransformer1DModel
from ...objective import DistillationObjective
from ...objective.draws import systematic_sample
from ...objective.flow_map import BY_STUDENT, BY_TEACHER, DIAGONAL
from ...pipelines.pipeline_ldlm import LDLMPipeline
from ...schedulers.scheduling_tangent import TangentScheduler
from ...schedulers.scheduling_tangent_ddim import TangentDDIMScheduler
from ...schedulers.scheduling_tangent_dpmsolver_multistep import TangentDPMSolverMultistepScheduler
from ...schedulers.scheduling_tangent_flow_map import TangentFlowMapScheduler
from ..components import AUTOENCODER, build_pipeline, load_part, load_pipeline_settings, without_nones
from ..held_out import preview
from ..randomness import RowRandomness
from ..recipe import Evaluation, PipelineRecipe, StepLosses
from ..settings import EvaluationSettings, LoopSettings, OptimizerSettings, check_decay, check_guidance, check_shifts


METHODS = ("flow_map", "progressive")
# numbers of steps that a flow map is compared with its teacher at while it trains
COMPARED_STEPS = (1, 2, 4, 8)
# those of the teacher's, by a solver of second order
TEACHER_STEPS = 64
# ends of steps on the time grid are drawn from a range this much wider at either end and clipped to it, so that steps
# from pure noise and to the end, which every sample takes, are not left out
OVERHANG = 0.1
# lengths of a flow map's steps, as shares of the grid, are spread evenly over their logarithm from this one to 1, so
# that a step of any length has half as long ones to learn from; the teacher takes those up to twice the shortest
SHORTEST_STEP = 1 / 128
# points of the grid that positions are looked up on
GRID_POINTS = 4096


@dataclass
class DistillationSettings:
    """All settings of `distill.py`.

    Attributes:
        components: folder or Hub id of the teacher's pipeline, with its encoders.
        method: `flow_map` or `progressive`.
        num_steps: steps of a progressive student; its teacher takes twice as many.
        time_grid: `uniform`, `log_snr` or `learned`: of a progressive student the grid, of a flow map what its times
            are evenly spread over in training. The student's scheduler has it, too.
        t_min: where sampling ends.
        diagonal_share: share of a flow map's examples that keep it a denoiser, at the teacher's prediction.
        self_condition_scale: weight of the self-condition of a teacher that was trained with one: 1 as in its
            training, which takes a second pass of it; 0 none; above 1 guidance by it, for which the student then
            needs no pass of its own. None is what the teacher's pipeline has as its own, or 1.
        guidance_rescale: how far that guidance keeps the standard deviation of its predictions. None is what the
            teacher's pipeline has as its own, or 0.
    """

    components: str = ""
    method: str = "flow_map"
    num_steps: int = 8
    time_grid: str = "uniform"
    t_min: float = 0.0
    diagonal_share: float = 0.25
    self_condition_scale: float | None = None
    guidance_rescale: float | None = None
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(output_dir="runs/distilled", max_steps=100_000))
    evaluation: EvaluationSettings = field(default_factory=lambda: EvaluationSettings(num_inference_steps=8))

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            method=METHODS,
            num_steps="[1, inf)",
            t_min="[0, 1)",
            diagonal_share="[0, 1)",
            self_condition_scale="[0, inf)",
            guidance_rescale="[0, 1]",
        )
        check_decay(self.optimizer, self.loop)
        check_shifts(self.data, self.loop)
        check_guidance(self.evaluation, has_self_condition=False)


def flow_map_times(scheduler: TangentScheduler, uniforms: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """Times s > u > t (B, 3), float64, by two uniform numbers each (B, 2), and which steps suit the teacher.

    The steps lie anywhere on the time grid, u in their middle; the teacher takes those that are short enough.
    """
    length = SHORTEST_STEP ** (1 - uniforms[:, 0])
    early = (1 - length) * ((1 + 2 * OVERHANG) * uniforms[:, 1] - OVERHANG).clamp(0, 1)
    # the grid falls from its beginning at position 1 to its end at 0
    grid = scheduler.make_time_grid(GRID_POINTS).flip(0)
    place = torch.stack([early + length, early + length / 2, early], dim=1) * GRID_POINTS
    left = place.long().clamp(max=GRID_POINTS - 1)
    return torch.lerp(grid[left], grid[left + 1], place - left), (length < 2 * SHORTEST_STEP).tolist()


def progressive_times(scheduler: TangentScheduler, num_steps: int, uniforms: torch.Tensor) -> torch.Tensor:
    """Times s > u > t (B, 3), float64, by a uniform number each (B, 1): a step of the student and its middle."""
    grid = scheduler.make_time_grid(2 * num_steps)
    first = 2 * (uniforms[:, 0] * num_steps).long()
    return torch.stack([grid[first], grid[first + 1], grid[first + 2]], dim=1)


def build_student(teacher: LDLMTransformer1DModel, method: str) -> LDLMTransformer1DModel:
    """A copy of the teacher without self-condition; that of a flow map knows a second time, without effect yet."""
    is_flow_map = method == "flow_map"
    if teacher.config.next_timestep_conditioning and not is_flow_map:
        raise ValueError("The teacher is a flow map, which takes any number of steps already; use method=flow_map.")
    # it is distilled on whole texts, so it takes no prompts
    changes = {"self_conditioning": False, "next_timestep_conditioning": is_flow_map, "role_embeds": False}
    student = LDLMTransformer1DModel.from_config(teacher.config, **changes)
    weights = {name: value for name, value in teacher.state_dict().items() if name != "given_embedding"}
    student.load_state_dict(weights, strict=not is_flow_map or teacher.config.next_timestep_conditioning)
    return student


class DistillationRecipe(PipelineRecipe):
    """Training of a student beside its frozen teacher."""

    settings_class = DistillationSettings
    settings: DistillationSettings
    module: DistillationObjective

    def __init__(self, settings: DistillationSettings, accelerator: Accelerator):
        super().__init__(settings, accelerator)
        self.of_teacher: dict[str, Any] = {}
        self.teacher_latents: torch.Tensor | None = None

    def load(self) -> None:
        self.module, self.of_teacher = load_objective(self.settings)
        self.sequence_length = self.module.latent_encoder.config.sequence_length
        self.tokenizer = AutoTokenizer.from_pretrained(self.settings.components, subfolder="tokenizer")

    def expected_scheduler(self) -> TangentScheduler:
        return self.module.scheduler

    def times_and_targets(self, uniforms: torch.Tensor, on_diagonal: Sequence[bool]) -> tuple[torch.Tensor, list[str]]:
        """Times s > u > t (B, 3) for two uniform numbers each (B, 2), and what each example is trained towards."""
        scheduler = self.module.scheduler
        if not self.module.is_flow_map:
            return progressive_times(scheduler, self.settings.num_steps, uniforms), [BY_TEACHER] * len(uniforms)
        times, is_short = flow_map_times(scheduler, uniforms)
        targets = [
            DIAGONAL if diagonal else BY_TEACHER if short else BY_STUDENT
            for diagonal, short in zip(on_diagonal, is_short, strict=True)
        ]
        return times, targets

    def losses(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        step: int,
        randomness: RowRandomness,
        given: torch.Tensor | None = None,
    ) -> StepLosses:
        device = input_ids.device
        share = self.settings.diagonal_share
        on_diagonal = systematic_sample(randomness.batch_size, share, randomness.shared_uniform())
        times, targets = self.times_and_targets(randomness.uniforms(2), [on_diagonal[row] for row in randomness.rows])
        losses = module(input_ids, times.to(device, non_blocking=True), targets, randomness.generators(device))
        return StepLosses(losses.total, {"semigroup_loss": losses.semigroup, "diagonal_loss": losses.diagonal})

    def pipeline(self, snapshot: DistillationObjective) -> LDLMPipeline:
        """The student's pipeline."""
        return build_pipeline(snapshot, tokenizer=self.tokenizer, **self.of_teacher).to(self.device)

    @torch.no_grad()
    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        """Held-out losses at fixed times with fixed noise; how far samples are from those that the teacher leads to
        along the probability-flow ODE from the same noise (mean squared error of the latents); and texts.
        """
        assert isinstance(snapshot, DistillationObjective)
        evaluation, count = self.settings.evaluation, len(self.held_out)
        on_diagonal = systematic_sample(count, self.settings.diagonal_share, 0.5)
        randomness = RowRandomness(0, 0, range(count), count)
        times, targets = self.times_and_targets(randomness.uniforms(2), on_diagonal)
        generators = randomness.generators(self.device)
        total = 0.0
        for first in range(0, count, evaluation.batch_size):
            rows = slice(first, first + evaluation.batch_size)
            some = self.held_out[rows].to(self.device)
            losses = snapshot(some, times[rows].to(self.device), targets[rows], generators[rows])
            total += float(losses.total) * len(some)
        results = {"distillation_loss": total / count} | self.distances_to_teacher(snapshot)
        texts: list[str] = []
        if evaluation.num_preview_samples:
            texts, scores = preview(self.pipeline(snapshot), evaluation)
            results |= scores
        return Evaluation(results, texts)

    def distances_to_teacher(self, snapshot: DistillationObjective) -> dict[str, float]:
        """Mean squared error of the student's latents for each number of steps, against the teacher's."""
        student = self.pipeline(snapshot)
        student.set_progress_bar_config(disable=True)
        config = student.transformer.config
        shape = (self.settings.evaluation.batch_size, config.sample_size, config.in_channels)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        if self.teacher_latents is None:
            self.teacher_latents = follow_teacher(snapshot, noise)
        target = self.teacher_latents
        compared = COMPARED_STEPS if self.module.is_flow_map else (self.settings.num_steps,)
        arguments = {"batch_size": len(noise), "latents": noise, "output_type": "latent"}
        made = {n: student(num_inference_steps=n, **arguments).latents for n in compared}
        return {f"distance_to_teacher/steps={n}": float((one - target).square().mean()) for n, one in made.items()}


def follow_teacher(objective: DistillationObjective, noise: torch.Tensor) -> torch.Tensor:
    """Clean latents (B, N, d_z) at the end of the probability-flow ODE from `noise`, by what the teacher teaches."""
    ode = TangentDPMSolverMultistepScheduler.from_config(objective.scheduler.config)
    ode.set_timesteps(TEACHER_STEPS, device=noise.device)
    latents = clean_latents = noise
    for time in ode.timesteps:
        times = time.expand(len(noise))
        clean_latents = objective.teacher_denoiser(latents, times, times)
        latents = ode.step(clean_latents, time, latents).prev_sample
    return clean_latents


def load_objective(settings: DistillationSettings) -> tuple[DistillationObjective, dict[str, Any]]:
    """The objective of a new student, and what else its pipeline has of the teacher's: the frozen decoders, and what
    kind of texts it was trained on."""
    if not settings.components:
        raise ValueError("components='' names no teacher; set components=RUN/pipeline or a Hub id.")
    parts = {name: load_part(settings.components, name) for name in (*AUTOENCODER, "transformer")}
    scheduler_class = TangentFlowMapScheduler if settings.method == "flow_map" else TangentDDIMScheduler
    config = load_part(settings.components, "scheduler").config
    scheduler = scheduler_class.from_config(config, time_grid=settings.time_grid, t_min=settings.t_min)
    asked = {name: getattr(settings, name) for name in LDLMPipeline.guidance_settings}
    own = load_pipeline_settings(settings.components)
    if settings.data.has_pairs or "source_length" in own:
        raise ValueError(
            f"components={settings.components!r} with source_length={own.get('source_length')} and data.source_column="
            f"{settings.data.source_column!r}: a student takes no prompts, so no sources. Distil a pipeline that was "
            "trained on whole texts, on whole texts."
        )
    guidance = {name: own[name] for name in asked if name in own} | without_nones(asked)
    of_texts = {name: own[name] for name in ("ends_texts",) if name in own}
    objective = DistillationObjective(
        parts["token_encoder"],
        parts["latent_encoder"],
        build_student(parts["transformer"], settings.method),
        parts["transformer"],
        scheduler,
        **guidance,
    )
    return objective, {name: parts[name] for name in ("latent_decoder", "token_decoder")} | of_texts
