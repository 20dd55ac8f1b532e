"""Trains a Latent Diffusion Language Model: encoder, denoiser and decoders together (Sections 4 and 5 of the paper).

accelerate launch training/train_joint.py --config training/configs/NAME.yaml [section.key=value ...]
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from components import (
    build_models,
    build_objective,
    build_pipeline,
    build_token_encoder,
    build_tokenizer,
    save_components,
)
from evaluation import diffusion_loss_on_grid, held_out_sequences, reconstruction, sample, score
from launch import (
    build_accelerator,
    build_loop,
    finish_run,
    fit_token_encoder,
    load_text,
    parse_arguments,
    prepare_run,
    print_overview,
    speed_up,
)
from ldlm_hf import JointObjective, warmup_gate
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
            observations=(timesteps, losses.diffusion_per_example),
        )

    def observe(self, *observations: torch.Tensor) -> None:
        self.timestep_sampler.update(*observations)

    def steps_until_observation(self) -> int | None:
        return self.timestep_sampler.updates_until_refresh

    def log_values(self, step: int) -> dict[str, float]:
        return {"gate": self.gate(step), "adaptive_timesteps": float(self.timestep_sampler.is_active)}

    def state_dict(self) -> dict[str, object]:
        return self.timestep_sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.timestep_sampler.load_state_dict(state_dict)

    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        assert isinstance(snapshot, JointObjective)
        evaluation = self.settings.evaluation
        results = reconstruction(snapshot, self.held_out, evaluation.batch_size, self.device)
        grid = diffusion_loss_on_grid(
            snapshot, self.held_out, evaluation.grid_size, evaluation.batch_size, self.device
        )
        results |= {f"diffusion_loss/t={t:.2f}": loss for t, loss in grid}
        results["diffusion_loss"] = sum(loss for _, loss in grid) / len(grid)
        if snapshot.token_decoder is None:
            return Evaluation(results, loss_over_time=grid)
        texts: list[str] = []
        pipeline = build_pipeline(snapshot, self.tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        if step < self.settings.loop.max_steps:
            sequences, texts = sample(pipeline, evaluation, evaluation.num_preview_samples, seed=0)
            results |= {f"samples/{name}": value for name, value in score(sequences).items()}
        return Evaluation(results, texts, grid)


def main() -> None:
    arguments = parse_arguments(__doc__)
    settings: RunSettings = load_settings(RunSettings, arguments.config, arguments.overrides)
    accelerator = build_accelerator(settings.loop)
    # every rank starts from the same weights
    set_seed(settings.loop.seed)
    tokenizer = build_tokenizer(settings.model)
    token_encoder = build_token_encoder(settings.model, tokenizer)
    if arguments.dry_run:
        models = build_models(settings, token_encoder)
        trained = nn.ModuleDict({name: model for name, model in models.items() if isinstance(model, nn.Module)})
        print_overview(settings, trained, settings.model.sequence_length, accelerator)
        return

    checkpoint, uploads = prepare_run(arguments, settings, accelerator)
    length = settings.model.sequence_length
    corpora = load_text(settings.data, tokenizer, length, accelerator)
    fit_token_encoder(token_encoder, corpora.train, settings, accelerator)
    objective = build_objective(settings, token_encoder)
    speed_up(objective, settings.loop)
    print_overview(settings, objective, length, accelerator)
    held_out = held_out_sequences(corpora.validation, settings.evaluation.num_sequences)
    task = JointTask(objective, settings, tokenizer, held_out, accelerator.device)
    loop = build_loop(task, corpora.train, length, settings, accelerator, arguments, checkpoint, uploads)
    evaluation = loop.run()
    if evaluation is None or not accelerator.is_main_process:
        return
    if settings.train_token_decoder:
        pipeline = build_pipeline(loop.snapshot, tokenizer)
        finish_run(pipeline, corpora.validation, settings, evaluation, loop.seconds, arguments, uploads)
    else:
        save_components(loop.snapshot, tokenizer, Path(settings.loop.output_dir) / "pipeline")
        print(
            "The token decoder was left out of training (train_token_decoder=false). To get a pipeline, run "
            f"training/train_token_decoder.py components={settings.loop.output_dir}/pipeline"
        )


if __name__ == "__main__":
    main()
