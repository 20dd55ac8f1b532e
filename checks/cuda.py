"""Checks the package on a GPU, and times it there; no part begins after 400 seconds (all took 390 on an H200).

    python checks/cuda.py                       # everything, at the paper's geometry
    python checks/cuda.py --device cpu --tiny   # the same code with tiny models, to develop it without a GPU
    python checks/cuda.py --only models peers   # some of it

It prints as it goes and writes `checks/cuda.md` after each part, so that a run that is cut short keeps what it had. No
model and no text is downloaded: weights are random, and the text is the corpus in `training/data/`. For a machine
without a network, `make cuda-wheels` puts what an image with torch, transformers and accelerate lacks into
`checks/wheels/`; there

    pip install --no-index --no-deps --target SITE checks/wheels/*.whl
    PYTHONPATH=SITE python checks/cuda.py

A part that fails says so and the others still run; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import copy
import gc
import gzip
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal


if __name__ == "cuda":
    # torch looks for NVIDIA's package of this name, and has found the folder of a check that it runs in
    raise ImportError("checks/cuda.py is not the package `cuda`")

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # this script's folder comes last: torch would find this file there when it imports NVIDIA's package `cuda`
    sys.path[:1] = [str(REPOSITORY / "training"), str(REPOSITORY)]
    sys.path.append(str(REPOSITORY / "checks"))

import torch  # noqa: E402
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: E402

from ldlm_hf import (  # noqa: E402
    DistillationObjective,
    GivenTokens,
    JointObjective,
    JointObjectiveSettings,
    LDLMLatentEncoder,
    LDLMLatentEncoderConfig,
    LDLMPipeline,
    LDLMTransformer1DModel,
    LikelihoodBound,
    LikelihoodSettings,
    TangentChurnScheduler,
    TangentDDIMScheduler,
    TangentDPMSolverMultistepScheduler,
    TangentEulerMaruyamaScheduler,
    TangentFlowMapScheduler,
    diffusers_config,
)
from ldlm_hf.evaluation.markdown import markdown_table  # noqa: E402
from ldlm_hf.models.conditions import Conditions  # noqa: E402
from ldlm_hf.training.devices import build_accelerator  # noqa: E402
from ldlm_hf.training.flops import device_peak  # noqa: E402
from ldlm_hf.training.loop import TrainingLoop  # noqa: E402
from ldlm_hf.training.recipes.distillation import DistillationRecipe, DistillationSettings  # noqa: E402
from ldlm_hf.training.recipes.joint import JointRecipe  # noqa: E402
from ldlm_hf.training.settings import LoopSettings, ModelSettings, RunSettings  # noqa: E402
from soak import Kill, finish, start, train_and_kill  # noqa: E402
from speed.measuring import Measurement, measure_case, measure_peers, peer_rows  # noqa: E402
from speed.report import describe_machine  # noqa: E402
from speed.workloads import (  # noqa: E402
    GEOMETRIES,
    Case,
    build_objective,
    build_tokenizer,
    randomize_zero_weights,
)


# ||output - reference|| / ||reference|| against the CPU in float32
FLOAT32_TOLERANCE = 1e-4
# the same in bfloat16, or where that is more, so many times the error that the CPU's own bfloat16 has
BFLOAT16_TOLERANCE, BFLOAT16_FACTOR = 1e-2, 2.0
# numbers of evaluations that the time of a sample is worked out for
NFE = (1, 4, 16, 64, 128, 1024)
# seconds after which no further part begins
TIME_LIMIT = 400


@dataclass(frozen=True)
class Scale:
    """What is compared with the CPU at L = N = `length`, and timed at the pairs `timed` of L and batch size."""

    device: torch.device
    geometry: str
    length: int
    timed: tuple[tuple[int, int], ...]
    repeats: int
    training_steps: int

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Part:
    """One part of the report: what was done, its table, and what was wrong."""

    text: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def require(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


# 1. Against the CPU


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """||output - reference|| / ||reference||, in float64 on the CPU."""
    output, reference = output.detach().double().cpu(), reference.detach().double().cpu()
    return float((output - reference).norm() / reference.norm())


def compare_with_cpu(name: str, module: nn.Module, run: Callable[..., torch.Tensor], scale: Scale, part: Part) -> None:
    """Adds a row: `run(module, device, dtype)` on the device and on the CPU, in float32 and in bfloat16."""
    cpu = torch.device("cpu")
    on_device = copy.deepcopy(module).to(scale.device)
    reference = run(module, cpu, torch.float32)
    in_float32 = relative_error(run(on_device, scale.device, torch.float32), reference)
    in_bfloat16 = relative_error(run(on_device, scale.device, torch.bfloat16), reference)
    on_cpu = relative_error(run(module, cpu, torch.bfloat16), reference)
    part.rows.append([name, *(f"{error:.1e}" for error in (in_float32, in_bfloat16, on_cpu))])
    part.require(in_float32 <= FLOAT32_TOLERANCE, f"{name}: float32 differs by {in_float32:.1e}")
    part.require(
        in_bfloat16 <= max(BFLOAT16_TOLERANCE, BFLOAT16_FACTOR * on_cpu),
        f"{name}: bfloat16 differs by {in_bfloat16:.1e}, on the CPU by {on_cpu:.1e}",
    )


def parity_part(what: str) -> Part:
    return Part(
        f"{what} against the CPU in float32: ‖output − reference‖ / ‖reference‖. float32 may differ by "
        f"{FLOAT32_TOLERANCE:.0e}, bfloat16 by {BFLOAT16_TOLERANCE:.0e}, or by {BFLOAT16_FACTOR:g} times as much as "
        "bfloat16 on the CPU.",
        ["", "float32", "bfloat16", "bfloat16 on the CPU"],
    )


def build_components(scale: Scale) -> JointObjective:
    """All components, with random weights, on the CPU."""
    torch.manual_seed(0)
    return build_objective(GEOMETRIES[scale.geometry], scale.length).eval()


def components_of(objective: JointObjective) -> dict[str, Any]:
    """A copy of each component, by name."""
    names = ("token_encoder", "latent_encoder", "latent_decoder", "token_decoder", "transformer", "scheduler")
    return {name: copy.deepcopy(getattr(objective, name)) for name in names}


def flow_map_denoiser(scale: Scale) -> LDLMTransformer1DModel:
    denoiser = LDLMTransformer1DModel(
        sample_size=scale.length,
        self_conditioning=False,
        next_timestep_conditioning=True,
        **GEOMETRIES[scale.geometry].transformer,
    )
    randomize_zero_weights(denoiser)
    return denoiser.eval()


def distillation_objective(scale: Scale, joint: JointObjective) -> DistillationObjective:
    parts = components_of(joint)
    encoders, teacher = (parts["token_encoder"], parts["latent_encoder"]), parts["transformer"]
    return DistillationObjective(*encoders, flow_map_denoiser(scale), teacher, TangentFlowMapScheduler())


def random_ids(objective: JointObjective, batch_size: int, length: int) -> torch.Tensor:
    """Token ids (B, L), the same at each call."""
    vocab_size = objective.token_encoder.config.vocab_size
    return torch.randint(vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0))


def row_generators(count: int) -> list[torch.Generator]:
    """A source of noise for each row, on the CPU, so that every device is given the same noise."""
    return [torch.Generator().manual_seed(row) for row in range(count)]


def check_models(scale: Scale) -> Part:
    part = parity_part("Each model's output for random inputs")
    objective = build_components(scale)
    ids = random_ids(objective, 2, scale.length)
    hidden_states = torch.randn(2, scale.length, objective.token_encoder.config.hidden_size)
    latents, condition = torch.randn(2, 2, scale.length, objective.transformer.config.in_channels)
    times = torch.tensor([0.3, 0.8])
    sizes = GEOMETRIES[scale.geometry].latent | {"sequence_length": scale.length, "num_latents": scale.length}
    self_attention = LDLMLatentEncoder(LDLMLatentEncoderConfig(**{**sizes, "architecture": "self_attention"})).eval()

    noisy = {"hidden_states": latents, "timestep": times}
    cases: list[tuple[str, nn.Module, dict[str, torch.Tensor]]] = [
        ("token encoder", objective.token_encoder, {"input_ids": ids}),
        ("latent encoder", objective.latent_encoder, {"hidden_states": hidden_states}),
        ("latent encoder, self-attention", self_attention, {"hidden_states": hidden_states}),
        ("latent decoder", objective.latent_decoder, {"latents": latents}),
        ("token decoder", objective.token_decoder, {"hidden_states": hidden_states}),
        ("denoiser", objective.transformer, noisy | {"self_condition": condition}),
        ("flow map", flow_map_denoiser(scale), noisy | {"next_timestep": 0.5 * times}),
    ]

    @torch.no_grad()
    def run(
        inputs: dict[str, torch.Tensor], module: nn.Module, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        # hidden states and latents, which have three dimensions, are rounded; ids and times are not
        moved = {name: tensor.to(device, dtype if tensor.ndim == 3 else None) for name, tensor in inputs.items()}
        return copy.deepcopy(module).to(dtype)(**moved)[0]

    for name, module, inputs in cases:
        compare_with_cpu(name, module, partial(run, inputs), scale, part)
    return part


def losses_and_gradients(
    inputs: dict[str, Any], objective: nn.Module, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The loss and, as one vector, the gradients of all trained parameters; bfloat16 by autocast."""
    objective.zero_grad(set_to_none=True)
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = objective(**moved, generator=row_generators(2))
    losses.total.backward()
    gradient = torch.cat([p.grad.flatten().float() for p in objective.parameters() if p.grad is not None])
    total = losses.total.detach().float().reshape(1)
    return torch.cat([total.cpu(), gradient.cpu()])


def likelihood_terms(
    ids: torch.Tensor, objective: JointObjective, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The terms of the bound for each text; bfloat16 by autocast."""
    settings = LikelihoodSettings(encoder_noise=0.1, decoder_noise=1.0, hidden_noise=1.0, self_conditioning=True)
    bound = LikelihoodBound(**components_of(objective), settings=settings)
    ids, times = ids.to(device), torch.tensor([0.4, 0.7], dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        terms = bound.draw(ids, *bound.encode(ids), times, torch.ones(2), torch.Generator().manual_seed(0))
    assert terms.total is not None
    return torch.stack([terms.total.cpu(), terms.tokens_only.cpu()])


def check_objectives(scale: Scale) -> Part:
    part = parity_part("Each objective's loss and gradients, and the terms of the likelihood bound,")
    joint = build_components(scale)
    ids = random_ids(joint, 2, scale.length)
    times = torch.tensor([0.3, 0.8])
    cosmos = JointObjectiveSettings(
        reconstruction="token", token_masking=0.3, mask_token_id=0, feature_noise=0.5, latent_dropout=0.4
    )
    autoencoder = JointObjective(**components_of(joint) | {"transformer": None}, settings=cosmos, stage="autoencoder")

    inputs = {"input_ids": ids, "timesteps": times, "gate": 0.5, "self_conditioned": [True, False]}
    ends = torch.stack([times, 0.5 * times, 0.25 * times], dim=1).double()
    pairs = {"input_ids": ids, "times": ends, "targets": ["diagonal", "student"]}
    objectives: list[tuple[str, nn.Module, dict[str, Any]]] = [
        ("joint", joint, inputs),
        ("autoencoder, COSMOS", autoencoder, inputs),
        ("diffusion", JointObjective(**components_of(joint), stage="diffusion"), inputs),
        ("distillation", distillation_objective(scale, joint), pairs),
    ]
    for name, objective, given in objectives:
        compare_with_cpu(name, objective, partial(losses_and_gradients, given), scale, part)
    compare_with_cpu("likelihood bound", joint, partial(likelihood_terms, ids), scale, part)
    return part


# 2. Sampling


def schedulers() -> dict[str, Any]:
    """Each scheduler on the tangent process, and diffusers' own; that of a flow map is the last."""
    ours = {
        "Euler–Maruyama": TangentEulerMaruyamaScheduler(),
        "DDIM": TangentDDIMScheduler(),
        "ancestral": TangentDDIMScheduler(eta=1.0),
        "DPM-Solver++ 2M": TangentDPMSolverMultistepScheduler(),
        "DPM-Solver++ 2M SDE": TangentDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        "churn": TangentChurnScheduler(),
    }
    foreign = (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
    config = diffusers_config(TangentEulerMaruyamaScheduler())
    theirs = {f"diffusers {each.__name__}": each.from_config(config) for each in foreign}
    return ours | theirs | {"flow map": TangentFlowMapScheduler()}


def build_pipeline(scale: Scale) -> LDLMPipeline:
    """A whole pipeline of random weights on the CPU."""
    parts = components_of(build_components(scale))
    pipeline = LDLMPipeline(**parts, tokenizer=build_tokenizer(parts["token_decoder"].config.vocab_size))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def set_synchronisation(scale: Scale, mode: Literal["default", "error"]) -> None:
    """With "error", whatever makes the host wait for CUDA raises a RuntimeError."""
    if scale.on_cuda:
        torch.cuda.set_sync_debug_mode(mode)


def sample_without_synchronisation(pipeline: LDLMPipeline, scale: Scale) -> None:
    """Samples in four steps that, from the second on, may not wait for the device."""

    def at_step_end(_: Any, step: int, __: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        set_synchronisation(scale, "error" if step < 3 else "default")
        return tensors

    generator = torch.Generator(scale.device).manual_seed(0)
    try:
        pipeline(
            batch_size=2,
            num_inference_steps=4,
            generator=generator,
            output_type="latent",
            callback_on_step_end=at_step_end,
        )
    finally:
        set_synchronisation(scale, "default")


def check_sampling(scale: Scale) -> Part:
    part = Part(
        "Four steps from the same noise by each scheduler, in float32, against the CPU (as above; "
        f"{FLOAT32_TOLERANCE:.0e}); and four more with noise drawn on the device, of which from the second on none "
        "of ours may wait for the device (`torch.cuda.set_sync_debug_mode`); where one of diffusers' does is named.",
        ["scheduler", "latents", "tokens that differ", "steps wait for the device"],
    )
    on_cpu = build_pipeline(scale)
    on_device = build_pipeline(scale).to(scale.device)
    for name, scheduler in schedulers().items():
        for pipeline in (on_cpu, on_device):
            pipeline.scheduler = copy.deepcopy(scheduler)
        if name == "flow map":
            student = flow_map_denoiser(scale)
            on_cpu.transformer, on_device.transformer = student, copy.deepcopy(student).to(scale.device)
        arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "latent"}
        reference = on_cpu(generator=row_generators(2), **arguments).latents
        latents = on_device(generator=row_generators(2), **arguments).latents
        error = relative_error(latents, reference)
        tokens, expected = on_device.decode_to_sequences(latents).cpu(), on_cpu.decode_to_sequences(reference)
        waits = "no"
        try:
            sample_without_synchronisation(on_device, scale)
        except RuntimeError as problem:
            place = traceback.extract_tb(problem.__traceback__)[-1]
            waits = f"{Path(place.filename).name}, line {place.lineno}"
            part.require("diffusers" in Path(place.filename).parts, f"{name}: {traceback.format_exc()}")
        differing = int((tokens != expected).sum())
        part.rows.append([name, f"{error:.1e}", f"{differing} of {tokens.numel()}", waits if scale.on_cuda else "–"])
        part.require(error <= FLOAT32_TOLERANCE, f"{name}: latents differ by {error:.1e}")
    return part


@torch.no_grad()
def given_latents(pipeline: LDLMPipeline, sequences: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The latents (G, d_z) of given tokens, encoded with the others."""
    conditions = Conditions(given).to(pipeline.device)
    return pipeline.encode_sequences(sequences, conditions.attention_mask())[conditions.given]


def check_conditions(scale: Scale) -> Part:
    part = Part(
        "Whether other tokens in the places that are written change a bit of the latents of what is given; and four "
        f"steps guided by what is given, in float32 against the CPU ({FLOAT32_TOLERANCE:.0e}).",
        ["", "float32", "bfloat16"],
    )
    on_cpu = build_pipeline(scale)
    transformer = LDLMTransformer1DModel.from_config(on_cpu.transformer.config, role_embeds=True)
    randomize_zero_weights(transformer)
    on_cpu.register_modules(transformer=transformer.eval())
    on_device = copy.deepcopy(on_cpu).to(scale.device)
    vocab_size = on_cpu.token_encoder.config.vocab_size
    given = torch.rand(2, scale.length, generator=torch.Generator().manual_seed(1)) < 0.5
    first, second = torch.randint(vocab_size, (2, 2, scale.length), generator=torch.Generator().manual_seed(0))
    second = torch.where(given, first, second)

    arguments = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    rows = GivenTokens(first, given, [scale.length] * 2)
    reference = on_cpu(given_tokens=rows, generator=row_generators(2), **arguments).latents
    latents = on_device(given_tokens=rows, generator=row_generators(2), **arguments).latents
    error = relative_error(latents, reference)
    part.require(error <= FLOAT32_TOLERANCE, f"guided latents differ by {error:.1e}")
    changed = []
    for dtype in (torch.float32, torch.bfloat16):
        on_device.to(dtype)
        one, other = (given_latents(on_device, sequences, given) for sequences in (first, second))
        changed.append(int((one != other).sum()))
        part.require(not changed[-1], f"{dtype}: {changed[-1]} entries of given latents depend on what is written")
    part.rows.append(["entries of given latents that change", *map(str, changed)])
    part.rows.append(["guided latents", f"{error:.1e}", "–"])
    return part


def check_compile(scale: Scale) -> Part:
    part = Part(
        "`pipe.transformer.compile_repeated_blocks(fullgraph=True)` against the same pipeline without, 8 steps, "
        "float32; compiled once, whatever the number of steps.",
        ["latents", "seconds of the first call", "graphs compiled", "by a second call with 16 steps"],
    )
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    pipeline = build_pipeline(scale).to(scale.device)
    arguments = {"batch_size": 2, "output_type": "latent"}
    reference = pipeline(generator=row_generators(2), num_inference_steps=8, **arguments).latents
    pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    began = time.perf_counter()
    latents = pipeline(generator=row_generators(2), num_inference_steps=8, **arguments).latents
    error, seconds = relative_error(latents, reference), time.perf_counter() - began
    graphs = counters["stats"]["unique_graphs"]
    pipeline(generator=row_generators(2), num_inference_steps=16, **arguments)
    again = counters["stats"]["unique_graphs"] - graphs
    part.rows.append([f"{error:.1e}", f"{seconds:.1f}", str(graphs), str(again)])
    part.require(error <= FLOAT32_TOLERANCE, f"latents differ by {error:.1e}")
    part.require(again == 0, f"{again} graphs were compiled again")
    return part


def check_offload(scale: Scale) -> Part:
    part = Part(
        "Sampling with weights that are on the device only while they are needed: tokens as without, a text encoded "
        "and decoded as without, and the highest memory that tensors took.",
        ["offload", "tokens that differ", "text decodes as without", "peak MiB"],
    )
    group = {"onload_device": scale.device, "offload_device": torch.device("cpu")}
    blocks = group | {"offload_type": "block_level", "num_blocks_per_group": 2}
    leaves = group | {"offload_type": "leaf_level"}
    offloads: list[tuple[str, Callable[..., object], dict[str, Any]]] = [
        ("none", LDLMPipeline.to, {"device": scale.device}),
        ("group, blocks", LDLMPipeline.enable_group_offload, blocks),
        ("group, leaves", LDLMPipeline.enable_group_offload, leaves),
    ]
    if scale.on_cuda:  # the others need an accelerator
        offloads += [
            ("group, leaves, stream", LDLMPipeline.enable_group_offload, leaves | {"use_stream": True}),
            ("model", LDLMPipeline.enable_model_cpu_offload, {"device": scale.device}),
            ("sequential", LDLMPipeline.enable_sequential_cpu_offload, {"device": scale.device}),
        ]
    expected: tuple[torch.Tensor, list[str]] | None = None
    ids = torch.arange(scale.length)[None]
    for name, enable, options in offloads:
        pipeline = build_pipeline(scale)
        enable(pipeline, **options)
        reset_peak(scale)
        for _ in range(2):  # hooks have to work for more than one call
            sequences = pipeline(
                batch_size=2, num_inference_steps=4, generator=row_generators(2), output_type="seq"
            ).sequences.cpu()
            texts = pipeline.decode(pipeline.encode_sequences(ids))
        expected = expected or (sequences, texts)
        differing = int((sequences != expected[0]).sum())
        peak = f"{torch.cuda.max_memory_allocated(scale.device) / 2**20:.0f}" if scale.on_cuda else "–"
        part.rows.append([name, str(differing), "yes" if texts == expected[1] else "no", peak])
        part.require(differing == 0 and texts == expected[1], f"{name}: other tokens than without offloading")
    return part


# 3. Training


def build_loop(scale: Scale, folder: str, distil: bool) -> TrainingLoop:
    """The loop of `train_joint.py`, or of `distill.py`, on random tokens, with bfloat16 autocast."""
    joint = build_components(scale)
    loop_settings = LoopSettings(
        output_dir=folder,
        batch_size=8,
        device_batch_size=8,
        trackers=[],
        mixed_precision="bf16",
    )
    accelerator = build_accelerator(loop_settings)
    recipe: JointRecipe | DistillationRecipe
    if distil:
        recipe = DistillationRecipe(DistillationSettings(loop=loop_settings, components="random"), accelerator)
        recipe.module = distillation_objective(scale, joint)
    else:
        settings = RunSettings(loop=loop_settings, model=ModelSettings(sequence_length=scale.length))
        recipe = JointRecipe(settings, accelerator)
        recipe.module = joint
    recipe.tokenizer = build_tokenizer(joint.token_encoder.config.vocab_size)
    recipe.held_out = random_ids(joint, 16, scale.length)
    dataset: Any = [{"input_ids": row} for row in recipe.held_out]
    return TrainingLoop(recipe, dataset, accelerator, recipe.settings)


def check_training(scale: Scale) -> Part:
    part = Part(
        "Steps of the training loop as `train_joint.py` and `distill.py` take them (bfloat16 autocast, batches, noise "
        "of each row, clipping, fused AdamW, EMA weights), of which from the third on none may wait for the device.",
        ["run", "steps", "steps wait for the device", "last loss"],
    )
    for distil in (False, True):
        name = "distillation" if distil else "joint"
        with tempfile.TemporaryDirectory() as folder:
            loop = build_loop(scale, folder, distil)
            loop.state.module.train()
            waits = "no"
            try:
                for step in range(6):
                    set_synchronisation(scale, "error" if step >= 2 else "default")
                    values = loop.train_step()
                    loop.state.step += 1
            except RuntimeError as problem:
                waits = str(problem).splitlines()[0]
                part.problems.append(f"{name}: {traceback.format_exc()}")
            finally:
                set_synchronisation(scale, "default")
            loss = float(values["loss"])
            part.rows.append([name, str(loop.state.step), waits if scale.on_cuda else "–", f"{loss:.4f}"])
            part.require(math.isfinite(loss), f"{name}: the loss is {loss}")
            loop.accelerator.free_memory()
    return part


def prepare_run(folder: Path) -> list[str]:
    """A small GPT-2 and its tokenizer, made from the corpus, and the settings of a run with it."""
    corpus, backbone = REPOSITORY / "training" / "data" / "state_of_the_union.txt.gz", folder / "backbone"
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=2000, special_tokens=["<unk>", "<eos>"])
    with gzip.open(corpus, "rt", encoding="utf-8") as lines:
        words.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    layers = "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}"
    return [
        f"model.backbone={backbone}",
        "model.sequence_length=32",
        "model.statistics_sequences=64",
        *(f"model.{name}={layers}" for name in ("latent_encoder", "latent_decoder", "token_decoder")),
        "model.transformer={num_layers: 2, num_attention_heads: 2, attention_head_dim: 32}",
        f"data.source={corpus}",
        f"data.cache_dir={folder / 'cache'}",
        "data.holdout_documents=16",
        "objective.decoder_noise=0.5",
        "timestep_sampler.update_every=4",
        "warmup.steps=4",
        "optimizer.lr_warmup_steps=2",
        "loop.batch_size=16",
        "loop.logging_steps=1",
        "loop.trackers=[]",
        "evaluation.every=0",
        "evaluation.num_sequences=16",
        "evaluation.num_samples=16",
        "evaluation.num_inference_steps=4",
        f"evaluation.judge={backbone}",
    ]


def later_commands(run: Path, common: Sequence[str]) -> dict[str, list[str]]:
    """What the other scripts are called with after a run of `train_joint.py` with the settings `common`."""
    data = [setting for setting in common if setting.startswith("data.")]
    shared = [setting for setting in common if setting.startswith(("data.", "loop.", "evaluation."))]
    pipeline, results = run / "pipeline", run.parent
    trained = [f"components={pipeline}", *shared, "loop.max_steps=8"]
    evaluated = ["--num_samples", "16", "--seeds", "1", "--steps", "4", "--judge", str(results / "backbone"), *data]
    layers = "{hidden_size: 64, num_attention_heads: 2, intermediate_size: 128}"
    return {
        "evaluate": ["--pipeline", str(pipeline), "--output_dir", str(results / "scores"), "--no_mauve", *evaluated],
        "likelihood": ["--pipeline", str(pipeline), "--num_sequences", "16", "--times_per_sequence", "4"],
        "distill": [*trained, f"loop.output_dir={results / 'distilled'}"],
        "train_token_decoder": [*trained, f"loop.output_dir={results / 'decoder'}", f"token_decoder={layers}"],
    }


def check_commands(scale: Scale) -> Part:
    part = Part(
        "`train_joint.py` (bfloat16; samples that a judge scores) killed by SIGKILL in the middle and resumed from "
        "its last checkpoint, against a run without a stop: largest relative difference of losses and gradient norm "
        "over all steps; 0 is bit for bit. Then `evaluate.py`, `likelihood.py`, `distill.py` and "
        "`train_token_decoder.py` with its pipeline, side by side, each of which has to end without an error.",
        ["steps", "steps done again", "largest difference"],
    )
    steps, on_cpu = scale.training_steps, not scale.on_cuda
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [*prepare_run(folder), f"loop.checkpointing_steps={steps // 4}"]
        kills = [Kill(steps // 2 + 1, ranks=(0,))]
        seen = train_and_kill(common, folder, steps, kills, world_size=1, on_cpu=on_cpu)
        started = []
        for script, arguments in later_commands(folder / "whole", common).items():
            log = folder / f"{script}.txt"
            started.append((start(script, arguments, log, on_cpu=on_cpu), log))
        for processes, log in started:
            try:
                finish(processes, log, timeout=240)
            except RuntimeError as problem:
                part.problems.append(f"{log.stem} {problem}")
    difference = seen.largest_difference
    part.rows.append([str(steps), str(seen.steps_done_again), f"{difference:.1e}"])
    part.require(difference <= 1e-3, f"a resumed step differs by {difference:.1e}")
    return part


# 4. Speed and memory


def reset_peak(scale: Scale) -> None:
    """Frees what earlier parts have left, and counts memory from there."""
    gc.collect()
    if scale.on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(scale.device)


def measured(scale: Scale, measure: Callable[[Case], Any], workload: str, length: int, batch: int, **case: Any) -> Any:
    """What `benchmark.py` measures of a workload, at the largest batch that memory holds of this one's halves."""
    while True:
        reset_peak(scale)
        torch._dynamo.reset()
        setting = Case(
            workload=workload,
            geometry=scale.geometry,
            length=length,
            batch_size=batch,
            dtype="bfloat16",
            device=str(scale.device),
            repeats=scale.repeats,
            **case,
        )
        try:
            return measure(setting)
        except torch.OutOfMemoryError:
            batch //= 2


def workload_row(name: str, item: Measurement, *more: str) -> list[str]:
    """Time and memory of a workload beside the floor of its matrix products."""
    speed = [f"{item.seconds:.5f}", f"{item.tokens_per_second:,.0f}"]
    floor = [f"{item.floor_seconds:.5f}", f"{item.ratio:.2f}", f"{item.peak_memory_gib:.2f}"]
    return [name, str(item.length), str(item.batch_size), *speed, *more, *floor]


def check_sampling_speed(scale: Scale) -> Part:
    part = Part(
        "Sampling in bfloat16: a step and the decode against the time of their own matrix products alone (the floor), "
        "in turns, medians.",
        ["workload", "L", "batch", "seconds", "tokens/s", "floor, s", "ratio", "peak GiB"],
    )
    for length, batch in scale.timed:
        items = measured(scale, measure_case, "sampling", length, batch)
        part.rows += [workload_row(item.workload, item) for item in items]
    return part


def check_peers(scale: Scale) -> Part:
    part = Part(
        "Seconds of a step for the whole batch, and of the network in it, beside the methods of docs/methods.md, in "
        "turns, medians, bfloat16; then seconds a sample by number of evaluations (NFE), extrapolated from the step.",
        [
            "sampler",
            "L",
            "batch",
            "network, s",
            "step, s",
            "network of our step",
            "step of ours",
            "once, s",
            *(f"NFE {count}" for count in NFE),
        ],
    )
    for length, batch in scale.timed:
        for row in peer_rows(measured(scale, measure_peers, "peers", length, batch), NFE):
            costs = [f"{row[name]:.5f}" for name in ("network_seconds", "step_seconds")]
            costs += [f"{row[name]:.2f}" for name in ("network_ratio", "step_ratio")]
            costs += [f"{row['once_seconds']:.5f}"]
            seconds = row["seconds_per_sample"]
            # an autoregressive model has one number of evaluations, L
            times = [f"{seconds[str(count)]:.4g}" if str(count) in seconds else "" for count in NFE]
            part.rows.append([row["sampler"], str(length), str(row["batch_size"]), *costs, *times])
    return part


def check_training_speed(scale: Scale) -> Part:
    peak = device_peak(scale.device, "bf16")
    part = Part(
        "A joint training step (bfloat16 autocast, open gate, half of the examples self-conditioned), without and "
        "with compiled blocks; the largest batch up to the one asked for that memory holds. MFU is of "
        f"{peak.flops_per_second / 1e12:.3g} TFLOP/s ({peak.source}).",
        ["step", "L", "batch", "seconds", "tokens/s", "MFU", "floor, s", "ratio", "peak GiB"],
    )
    for length, batch in scale.timed:
        for compiled in (False, True):
            (item,) = measured(scale, measure_case, "training", length, batch, compile=compiled)
            utilization = f"{item.flops / item.seconds / peak.flops_per_second:.1%}"
            part.rows.append(workload_row("compiled" if compiled else "eager", item, utilization))
    return part


CHECKS: dict[str, tuple[str, Callable[[Scale], Part]]] = {
    "models": ("Models", check_models),
    "objectives": ("Objectives", check_objectives),
    "sampling": ("Sampling", check_sampling),
    "conditions": ("Texts given in part", check_conditions),
    "training": ("Training steps", check_training),
    "offload": ("Offloading", check_offload),
    "compile": ("Compiled blocks", check_compile),
    "commands": ("Commands", check_commands),
    "sampling_speed": ("Speed of sampling", check_sampling_speed),
    "peers": ("Speed beside other samplers", check_peers),
    "training_speed": ("Speed of training", check_training_speed),
}


def run_check(check: Callable[[Scale], Part], scale: Scale) -> Part:
    """A part of the report; what stopped it, where something did."""
    try:
        return check(scale)
    except Exception:  # the next part may well work, and device time is short
        return Part("Stopped by an error.", [], problems=[traceback.format_exc()])
    finally:
        reset_peak(scale)


def section(title: str, part: Part, seconds: float) -> str:
    lines = [f"## {title}", "", part.text, ""]
    if part.columns:
        lines += [*markdown_table(part.columns, part.rows), ""]
    lines.append(f"{'FAILED' if part.problems else 'As it should be'}; {seconds:.0f} s.")
    for problem in part.problems:
        lines += ["", "```", problem.rstrip().replace(str(REPOSITORY) + os.sep, ""), "```"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a try on the CPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="parts to run")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="the report")
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # diffusers 0.42 warns of a list that is empty at each `to(dtype)`
    device = torch.device(arguments.device)
    if arguments.tiny:
        scale = Scale(device, "tiny", 16, ((16, 2),), repeats=1, training_steps=12)
    else:
        scale = Scale(device, "paper", 128, ((1024, 16), (128, 512)), repeats=3, training_steps=40)

    began = time.perf_counter()
    machine = describe_machine(device)
    command = " ".join(["python checks/cuda.py", *sys.argv[1:]])
    sections = [f"# On {machine['device']}\n\nWritten by `{command}`; random weights, geometry: {scale.geometry}."]
    sections.append("\n".join(markdown_table(["", ""], [[key, str(value)] for key, value in machine.items()])))
    failed = []
    for name in arguments.only:
        title, check = CHECKS[name]
        since = time.perf_counter()
        if since - began > TIME_LIMIT:
            sections.append(f"## {title}\n\nNot run: the {TIME_LIMIT} s were over.")
            failed.append(name)
        else:
            part = run_check(check, scale)
            sections.append(section(title, part, time.perf_counter() - since))
            failed += [name] if part.problems else []
        print(sections[-1], end="\n\n", flush=True)
        arguments.output.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
