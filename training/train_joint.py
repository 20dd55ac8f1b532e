"""Trains a Latent Diffusion Language Model: encoder, denoiser and decoders together (Sections 4 and 5 of the paper).

accelerate launch training/train_joint.py --config training/configs/NAME.yaml [section.key=value ...]
"""

from __future__ import annotations

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from components import (
    build_diffusion_objective,
    build_models,
    build_objective,
    build_pipeline,
    build_token_encoder,
    build_tokenizer,
    save_components,
)
from evaluation import diffusion_loss_at, held_out_sequences, reconstruction, sample, score
from launch import (
    build_accelerator,
    build_loop,
    finish_run,
    fit_latent_statistics,
    fit_token_encoder,
    load_text,
    parse_arguments,
    pipeline_folder,
    prepare_run,
    print_overview,
    speed_up,
)
from ldlm_hf import JointObjective, TangentEulerMaruyamaScheduler, TangentScheduler, warmup_gate
from ldlm_hf.objective.joint import systematic_sample
from randomness import RowRandomness
from settings import RunSettings, load_settings
from task import Evaluation, StepLosses, Task


class JointTask(Task):
    """Joint training: draws times, opens the gate, and evaluates reconstruction, diffusion loss and samples."""

    module: JointObjective

    def __init__(
        self,
        module: JointObjective,
        settings: RunSettings,
        tokenizer: PreTrainedTokenizerBase,
        held_out: torch.Tensor,
        device: torch.device,
    ):
        super().__init__(module)
        self.settings = settings
        self.tokenizer = tokenizer
        self.held_out = held_out
        self.device = device
        self.timestep_sampler = settings.timestep_sampler.build()

    def gate(self, step: int) -> float:
        """gamma at a step (Eq. 29–30)."""
        warmup = self.settings.warmup
        return warmup_gate(step, warmup.steps, warmup.midpoint, warmup.steepness)

    def losses(self, module: nn.Module, input_ids: torch.Tensor, step: int, randomness: RowRandomness) -> StepLosses:
        device = input_ids.device
        timesteps = self.timestep_sampler.quantile(randomness.uniform()).float().to(device, non_blocking=True)
        probability = self.settings.objective.self_conditioning_probability
        self_conditioned = systematic_sample(randomness.batch_size, probability, randomness.shared_uniform())
        losses = module(
            input_ids,
            timesteps,
            self.gate(step),
            randomness.generators(device),
            [self_conditioned[row] for row in randomness.rows],
        )
        return StepLosses(
            total=losses.total,
            values={
                "hidden_loss": losses.hidden,
                "token_loss": losses.token,
                "diffusion_loss": losses.diffusion,
                "token_accuracy": losses.token_accuracy,
                "latent_std": losses.latent_std,
                # reconstruction depends on the latents' scale through this ratio alone (see configs/README.md)
                "latent_std_over_decoder_noise": losses.latent_std / max(self.settings.objective.decoder_noise, 1e-12),
            },
            observations=() if self.module.transformer is None else (timesteps, losses.diffusion_per_example),
        )

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
            return diffusion_loss_at(snapshot, self.held_out, times, evaluation.batch_size, self.device)

        losses = losses_at(grid)
        values = {"diffusion_loss": sum(losses) / len(losses)}
        values |= {f"diffusion_loss/t={t:.2f}": loss for t, loss in zip(grid.tolist(), losses, strict=False)}
        if self.timestep_sampler.is_active:
            cdf, times = self.timestep_sampler.cdf(grid), self.timestep_sampler.quantile(grid)
            values |= {f"timestep_cdf/t={t:.2f}": float(u) for t, u in zip(grid, cdf, strict=True)}
            warped = zip(grid, losses_at(times), strict=False)
            values |= {f"warped_diffusion_loss/u={u:.2f}": loss for u, loss in warped}
        return list(zip(grid.tolist(), losses, strict=False)), values

    def with_timestep_cdf(self, scheduler: TangentScheduler) -> TangentScheduler:
        """The scheduler with F(t) at the edges of the bins in its configuration, for the learned time grid."""
        if not self.timestep_sampler.is_active:
            return scheduler
        cdf = self.timestep_sampler.cdf(self.timestep_sampler.edges)
        # `register_to_config` would not do: a value that was a default is left out where a scheduler is made from it
        return type(scheduler).from_config(scheduler.config, timestep_cdf=[round(u, 6) for u in cdf.tolist()])

    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        assert isinstance(snapshot, JointObjective)
        evaluation = self.settings.evaluation
        results = reconstruction(snapshot, self.held_out, evaluation.batch_size, self.device)
        if snapshot.transformer is None:
            return Evaluation(results)
        grid, values = self.diffusion_loss_over_time(snapshot)
        results |= values
        if snapshot.token_decoder is None:
            return Evaluation(results, loss_over_time=grid)
        texts: list[str] = []
        pipeline = build_pipeline(snapshot, self.tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        if step < self.settings.loop.max_steps and evaluation.num_preview_samples:
            sequences, texts = sample(pipeline, evaluation, evaluation.num_preview_samples, seed=0)
            results |= {f"samples/{name}": value for name, value in score(sequences).items()}
        return Evaluation(results, texts, grid)


def expected_scheduler(settings: RunSettings) -> TangentScheduler:
    """The trained pipeline's scheduler, with F(t) = t for what it will have learned of the times."""
    scheduler = TangentEulerMaruyamaScheduler(**settings.model.scheduler)
    if not settings.timestep_sampler.adaptive:
        return scheduler
    return TangentEulerMaruyamaScheduler.from_config(scheduler.config, timestep_cdf=[0.0, 1.0])


def main() -> None:
    arguments = parse_arguments(__doc__)
    settings: RunSettings = load_settings(RunSettings, arguments.config, arguments.overrides)
    accelerator = build_accelerator(settings.loop)
    # every rank starts from the same weights
    set_seed(settings.loop.seed)
    tokenizer = build_tokenizer(settings)
    length = settings.model.sequence_length
    if settings.stage == "diffusion":
        objective = build_diffusion_objective(settings)
    else:
        token_encoder = build_token_encoder(settings.model, tokenizer)
    if arguments.dry_run:
        if settings.stage != "diffusion":
            models = build_models(settings, token_encoder)
            objective = nn.ModuleDict({name: model for name, model in models.items() if isinstance(model, nn.Module)})
        print_overview(settings, objective, length, accelerator)
        return

    scheduler = None if settings.stage == "autoencoder" else expected_scheduler(settings)
    checkpoint, uploads = prepare_run(arguments, settings, accelerator, scheduler)
    corpora = load_text(settings.data, tokenizer, length, accelerator)
    if settings.stage == "diffusion":
        fit_latent_statistics(objective, corpora.train, settings, accelerator)
    else:
        fit_token_encoder(token_encoder, corpora.train, settings, accelerator)
        objective = build_objective(settings, token_encoder, tokenizer)
    speed_up(objective, settings.loop)
    print_overview(settings, objective, length, accelerator)
    held_out = held_out_sequences(corpora.validation, settings.evaluation.num_sequences)
    task = JointTask(objective, settings, tokenizer, held_out, accelerator.device)
    loop = build_loop(task, corpora.train, length, settings, accelerator, arguments, checkpoint, uploads)
    folder = pipeline_folder(settings)
    is_whole = objective.transformer is not None and objective.token_decoder is not None

    def save(snapshot: JointObjective) -> None:
        if snapshot.transformer is not None:
            snapshot.scheduler = task.with_timestep_cdf(snapshot.scheduler)
        if is_whole:
            build_pipeline(snapshot, tokenizer).save_pretrained(folder)
        else:
            save_components(snapshot, tokenizer, folder)

    evaluation = loop.run(save)
    if evaluation is None or not accelerator.is_main_process:
        return
    if is_whole:
        pipeline = build_pipeline(loop.snapshot, tokenizer)
        finish_run(pipeline, corpora.validation, settings, evaluation, loop.seconds, arguments, uploads)
    elif objective.transformer is None:
        print(
            f"Trained an autoencoder. To train its denoiser, run this script with stage=diffusion components={folder}"
        )
    else:
        print(
            "The token decoder was left out of training (train_token_decoder=false). To get a pipeline, run "
            f"training/train_token_decoder.py components={folder}"
        )


if __name__ == "__main__":
    main()
