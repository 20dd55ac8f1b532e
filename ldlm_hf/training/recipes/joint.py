"""Joint training of encoder, denoiser and decoders, and its two stages one by one (Sections 4, 5 and 7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import nn
from torch.utils.data import Dataset

from ...evaluation.real_text import training_rows
from ...evaluation.samples import sources_of
from ...models.conditions import Conditions
from ...models.statistics import mean_and_std
from ...models.token_encoder import LDLMTokenEncoder
from ...objective import JointObjective, warmup_gate
from ...objective.draws import systematic_sample
from ...pipelines.pipeline_ldlm import LDLMPipeline
from ...schedulers.scheduling_tangent import TangentScheduler
from ..components import (
    build_diffusion_objective,
    build_finetuning_objective,
    build_objective,
    build_pipeline,
    build_token_encoder,
    build_tokenizer,
    save_components,
)
from ..held_out import (
    conditional_diffusion_losses,
    diffusion_loss_at,
    held_out_conditions,
    preview,
    reconstruction,
)
from ..randomness import RowRandomness
from ..recipe import Evaluation, PipelineRecipe, StepLosses
from ..settings import RunSettings


class JointRecipe(PipelineRecipe):
    """Joint training: draws times, opens the gate, and evaluates reconstruction, diffusion loss and samples.

    With `stage="diffusion"` its module trains a denoiser on frozen components, with `stage="autoencoder"` none.
    """

    settings_class = RunSettings
    settings: RunSettings
    module: JointObjective

    def __init__(self, settings: RunSettings, accelerator: Accelerator):
        super().__init__(settings, accelerator)
        self.timestep_sampler = settings.timestep_sampler.build()

    def load(self) -> None:
        if self.settings.consistency.weight and self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                f"consistency.weight={self.settings.consistency.weight} with FSDP: the denoiser's EMA weights are "
                "sharded, and the consistency loss needs them whole. Use DDP, or consistency.weight=0."
            )
        self.tokenizer = build_tokenizer(self.settings)
        self.sequence_length = self.settings.model.sequence_length
        if self.settings.stage == "diffusion":
            self.module = build_diffusion_objective(self.settings)
        elif self.settings.components:
            self.module = build_finetuning_objective(self.settings)
        else:
            token_encoder = build_token_encoder(self.settings.model, self.tokenizer)
            self.module = build_objective(self.settings, token_encoder, self.tokenizer)

    def expected_scheduler(self) -> TangentScheduler | None:
        """With F(t) = t for what will have been learned of the times, if the run is long enough for that."""
        if self.settings.stage == "autoencoder":
            return None
        scheduler, learned = self.module.scheduler, self.settings.timestep_sampler
        if not learned.adaptive or learned.update_every > self.settings.loop.max_steps:
            return scheduler
        return type(scheduler).from_config(scheduler.config, timestep_cdf=[0.0, 1.0])

    def build(self, train: Dataset[dict[str, torch.Tensor]], held_out: Dataset[dict[str, torch.Tensor]]) -> None:
        super().build(train, held_out)
        if self.settings.gives_texts:
            self.module.token_encoder.to(self.device).check_masks()
        is_fitted, standardizes = self.module.token_encoder.is_fitted, self.standardizes_latents()
        if self.settings.stage == "diffusion" and is_fitted and not standardizes:
            return
        self.statistics = self.statistics_batches(train)
        if not is_fitted:
            batches = [batch["input_ids"] for batch in self.statistics]
            fit_token_encoder(self.module.token_encoder, batches, self.device)
        if standardizes:
            standardize_latents(self.module, self.statistics, self.device)

    def standardizes_latents(self) -> bool:
        """Whether the latents of a frozen autoencoder are standardised before its denoiser is trained."""
        return self.settings.stage == "diffusion" and not self.module.latent_encoder.config.standardize_latents

    def complete(self, snapshot: nn.Module) -> None:
        """Measures the latents' statistics, which differ between EMA weights, over the run's statistics_sequences."""
        assert isinstance(snapshot, JointObjective)
        if self.settings.stage != "diffusion" and snapshot.latent_encoder.config.standardize_latents:
            snapshot.latent_encoder.set_latent_statistics(*measure_latents(snapshot, self.statistics, self.device))

    def use_ema_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Makes them the weights of the denoiser that the consistency loss asks."""
        if self.module.averaged_transformer is None:
            return
        for name, parameter in self.module.averaged_transformer.named_parameters():
            parameter.data = weights[f"transformer.{name}"]

    def statistics_batches(self, train: Dataset[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        """Batches of the training text that statistics are computed over."""
        rows = training_rows(train, self.settings.model.statistics_sequences)
        parts = zip(*(values.split(self.settings.evaluation.batch_size) for values in rows.values()), strict=True)
        return [dict(zip(rows, part, strict=True)) for part in parts]

    def pipeline(self, snapshot: JointObjective) -> LDLMPipeline | None:
        if snapshot.transformer is not None:
            snapshot.scheduler = self.with_timestep_cdf(snapshot.scheduler)
        if snapshot.transformer is None or snapshot.token_decoder is None:
            return None
        return self.build_pipeline(snapshot)

    def build_pipeline(self, snapshot: JointObjective) -> LDLMPipeline:
        """The pipeline of a trained module, which says what kind of texts it was trained on."""
        data = self.settings.data
        return build_pipeline(
            snapshot, tokenizer=self.tokenizer, ends_texts=data.is_separate, source_length=data.source_length
        )

    def save(self, snapshot: nn.Module, folder: Path) -> None:
        assert isinstance(snapshot, JointObjective)
        pipeline = self.pipeline(snapshot)
        if pipeline is None:
            save_components(snapshot, self.tokenizer, folder)
        else:
            pipeline.save_pretrained(folder)

    def next_command(self, folder: Path) -> str:
        if self.module.transformer is None:
            return (
                "Trained an autoencoder. To train its denoiser, run this script with stage=diffusion "
                f"components={folder}"
            )
        return (
            "The token decoder was left out of training (train_token_decoder=false). To get a pipeline, run "
            f"training/train_token_decoder.py components={folder}"
        )

    def gate(self, step: int) -> float:
        """gamma at a step (Eq. 29–30)."""
        warmup = self.settings.warmup
        return warmup_gate(step, warmup.steps, warmup.midpoint, warmup.steepness)

    def losses(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        step: int,
        randomness: RowRandomness,
        given: torch.Tensor | None = None,
    ) -> StepLosses:
        device, settings = input_ids.device, self.settings.objective
        levels = settings.noise_levels
        # a text's K times lie one in each of K parts of equal probability
        warped = (randomness.uniform()[:, None] + torch.arange(levels)) / levels  # (B, K)
        timesteps = self.timestep_sampler.quantile(warped).float().to(device, non_blocking=True)
        drawn = systematic_sample(
            randomness.batch_size * levels, settings.self_conditioning_probability, randomness.shared_uniform()
        )
        self_conditioned = drawn[randomness.rows.start * levels : randomness.rows.stop * levels]
        guidance = next_timesteps = None
        if settings.guidance_range is not None:
            lowest, highest = settings.guidance_range
            # evenly in log w
            guidance = (lowest * (highest / lowest) ** randomness.uniforms(levels)).float()
            guidance = guidance.to(device, non_blocking=True)
        if self.module.averaged_transformer is not None:
            later = (warped - 1 / self.settings.consistency.num_steps).clamp(min=0)
            next_timesteps = self.timestep_sampler.quantile(later).float().to(device, non_blocking=True)
        conditions = self.conditions(input_ids.shape[1], randomness, device, given)
        losses = module(
            input_ids,
            timesteps,
            self.gate(step),
            randomness.generators(device),
            self_conditioned,
            guidance,
            next_timesteps,
            self.settings.consistency.weight_at(step),
            conditions,
        )
        per_example = losses.diffusion_per_example
        if conditions is not None and given is None:
            # what a prompt makes easy says nothing of the paper's loss at these times; NaN is left out
            per_example = per_example.masked_fill(conditions.given.any(1)[:, None], math.nan)
        return StepLosses(
            total=losses.total,
            values={
                "hidden_loss": losses.hidden,
                "token_loss": losses.token,
                "diffusion_loss": losses.diffusion,
                **({} if next_timesteps is None else {"consistency_loss": losses.consistency}),
                "token_accuracy": losses.token_accuracy,
                "latent_std": losses.latent_std,
                # reconstruction depends on the latents' scale through this ratio alone (see configs/README.md)
                "latent_std_over_decoder_noise": losses.latent_std / max(self.settings.objective.decoder_noise, 1e-12),
            },
            observations=() if self.module.transformer is None else (timesteps.flatten(), per_example.flatten()),
        )

    def conditions(
        self,
        sequence_length: int,
        randomness: RowRandomness,
        device: torch.device,
        given: torch.Tensor | None = None,
    ) -> Conditions | None:
        """What is given of a step's rows: the sources of pairs, or what is drawn, which is nothing before
        `start_step`; None in a run that gives nothing of any text."""
        settings = self.settings.conditioning
        if given is not None:
            return Conditions(given, (randomness.places() < settings.dropout).to(device))
        if not settings.gives_texts:
            return None
        if randomness.step < settings.start_step:
            return Conditions(torch.zeros(len(randomness.rows), sequence_length, dtype=torch.bool, device=device))
        drawn = settings.draw(randomness.places().tolist(), randomness.numpy_generators(), sequence_length)
        return drawn.to(device)

    def observe(self, *observations: torch.Tensor) -> None:
        self.timestep_sampler.update(*observations)

    def steps_until_observation(self) -> int | None:
        return None if self.module.transformer is None else self.timestep_sampler.updates_until_refresh

    def log_values(self, step: int) -> dict[str, float]:
        return {"gate": self.gate(step), "adaptive_timesteps": float(self.timestep_sampler.is_active)}

    def state_dict(self) -> dict[str, object]:
        return self.timestep_sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.timestep_sampler.load_state_dict(state_dict)

    def diffusion_loss_over_time(self, snapshot: JointObjective) -> tuple[list[tuple[float, float]], dict[str, float]]:
        """Held-out diffusion loss at evenly spaced times, as pairs (t, loss), and what the log is given (Fig. 5).

        The log also has the sampler's F(t) at these times, and, where it is not F(t) = t, the loss at times that are
        evenly spaced in u = F(t).
        """
        evaluation = self.settings.evaluation
        grid = torch.linspace(0, 1, evaluation.grid_size + 1, dtype=torch.float64)[1:]

        def losses_at(times: torch.Tensor) -> list[float]:
            return diffusion_loss_at(
                snapshot, self.held_out, times, evaluation.batch_size, self.device, self.held_out_given
            )

        losses = losses_at(grid)
        values = {"diffusion_loss": sum(losses) / len(losses)}
        if self.settings.gives_texts:
            given = self.held_out_given
            if given is None:
                given = held_out_conditions(len(self.held_out), self.sequence_length, self.settings.conditioning)
            values |= conditional_diffusion_losses(
                snapshot, self.held_out, given, grid, evaluation.batch_size, self.device
            )
        values |= {f"diffusion_loss/t={t:.2f}": loss for t, loss in zip(grid.tolist(), losses, strict=False)}
        if self.timestep_sampler.is_active:
            cdf, times = self.timestep_sampler.cdf(grid), self.timestep_sampler.quantile(grid)
            values |= {f"timestep_cdf/t={t:.2f}": float(u) for t, u in zip(grid, cdf, strict=True)}
            warped = zip(grid, losses_at(times), strict=False)
            values |= {f"warped_diffusion_loss/u={u:.2f}": loss for u, loss in warped}
        return list(zip(grid.tolist(), losses, strict=False)), values

    def with_timestep_cdf(self, scheduler: TangentScheduler) -> TangentScheduler:
        """The scheduler with F(t) at the edges of the bins in its configuration, for the learned time grid."""
        cdf = self.timestep_sampler.learned_cdf()
        if cdf is None:
            return scheduler
        # `register_to_config` would not do: a value that was a default is left out where a scheduler is made from it
        return type(scheduler).from_config(scheduler.config, timestep_cdf=cdf)

    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        assert isinstance(snapshot, JointObjective)
        evaluation = self.settings.evaluation
        results = reconstruction(snapshot, self.held_out, evaluation.batch_size, self.device, self.held_out_given)
        if snapshot.transformer is None:
            return Evaluation(results)
        grid, values = self.diffusion_loss_over_time(snapshot)
        results |= values
        if snapshot.token_decoder is None:
            return Evaluation(results, loss_over_time=grid)
        texts: list[str] = []
        if step < self.settings.loop.max_steps and evaluation.num_preview_samples:
            scheduler = self.expected_scheduler()
            assert scheduler is not None
            pipeline = self.build_pipeline(snapshot)
            pipeline.register_modules(scheduler=self.with_timestep_cdf(scheduler))
            given = self.held_out_given
            sources = None if given is None else sources_of(self.held_out, given)
            texts, scores = preview(pipeline, evaluation, sources)
            results |= scores
        return Evaluation(results, texts, grid)


def fit_token_encoder(token_encoder: LDLMTokenEncoder, batches: Sequence[torch.Tensor], device: torch.device) -> None:
    """Fills in the statistics of a frozen encoder from batches of token ids (B, L), the same on all ranks."""
    token_encoder.to(device)
    token_encoder.fit_statistics(batches)
    # accelerators' sums may differ in the last bit from rank to rank
    broadcast([token_encoder.mean, token_encoder.std])


@torch.no_grad()
def standardize_latents(
    objective: JointObjective, batches: Sequence[dict[str, torch.Tensor]], device: torch.device
) -> None:
    """Standardises the latents of a frozen autoencoder (COSMOS, Meshchaninov et al., 2025), the same on all ranks."""
    mean, std = measure_latents(objective, batches, device)
    broadcast([mean, std])
    for part in (objective.latent_encoder, objective.latent_decoder):
        part.set_latent_statistics(mean, std)


@torch.no_grad()
def measure_latents(
    objective: JointObjective, batches: Sequence[dict[str, torch.Tensor]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (d_z,) of each dimension of what the latent encoder gives before it standardises, of
    batches of `input_ids` and, for pairs, `given` (B, L)."""
    objective.to(device)

    def latents() -> Iterator[torch.Tensor]:
        for batch in batches:
            mask = Conditions(batch["given"].to(device)).attention_mask() if "given" in batch else None
            states = objective.token_encoder(batch["input_ids"].to(device), attention_mask=mask, return_dict=True)
            yield objective.latent_encoder.map_sequence(states.hidden_states, attention_mask=mask)

    mean, std, _ = mean_and_std(latents())
    return mean, std
