"""What is measured on held-out text while a run trains: reconstruction, the diffusion loss over t, and samples."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from ..evaluation.samplers import Sampler
from ..evaluation.samples import sample
from ..evaluation.scores import score_without_judge
from ..models.conditions import Conditions
from ..models.statistics import LatentSpread
from ..objective import ConditioningSettings, JointObjective
from ..objective.diffusion import example_errors
from ..pipelines.prompts import GivenTokens
from .randomness import RowRandomness
from .settings import EvaluationSettings


@torch.no_grad()
def reconstruction(
    objective: JointObjective,
    sequences: torch.Tensor,
    batch_size: int,
    device: torch.device,
    given: torch.Tensor | None = None,
) -> dict[str, float]:
    """Held-out reconstruction from clean latents: mean squared error of hidden states, token accuracy, and how the
    latents are spread ([`LatentSpread`]). Of pairs, `given` (B, L) says which tokens are a source's.
    """
    squared_error = correct = 0.0
    spread = LatentSpread()
    for first in range(0, len(sequences), batch_size):
        rows = slice(first, first + batch_size)
        input_ids = sequences[rows].to(device)
        mask = None if given is None else Conditions(given[rows].to(device)).attention_mask()
        hidden_states = objective.token_encoder(input_ids, attention_mask=mask, return_dict=True).hidden_states
        latents = objective.latent_encoder(hidden_states, attention_mask=mask, return_dict=True).latents
        spread.add(latents)
        predicted = objective.latent_decoder(latents, return_dict=True).hidden_states
        squared_error += float((predicted.float() - hidden_states.float()).square().mean()) * len(input_ids)
        if objective.token_decoder is not None:
            tokens = objective.token_decoder(predicted, return_dict=True).logits.argmax(-1)
            correct += float((tokens == input_ids).float().mean()) * len(input_ids)
    rank, position_share = spread.measure()
    result = {
        "reconstruction_mse": squared_error / len(sequences),
        "latent_rank": rank,
        "latent_position_share": position_share,
    }
    if objective.token_decoder is not None:
        result["reconstruction_accuracy"] = correct / len(sequences)
    return result


def diffusion_loss_at(
    objective: JointObjective,
    sequences: torch.Tensor,
    times: torch.Tensor,
    batch_size: int,
    device: torch.device,
    given: torch.Tensor | None = None,
) -> list[float]:
    """Held-out diffusion loss at each of `times` (G,), in [0, 1]; a sequence has the same noise at each call. With
    `given` (B, L), it is that of the other tokens.

    The sequences are dealt out to the times in turn, so there must be at least as many of them; with fewer, the times
    behind the last one are left out.
    """
    totals = torch.zeros(len(times), dtype=torch.float64)
    counts = torch.zeros(len(times), dtype=torch.float64)
    places = torch.arange(len(sequences)) % len(times)
    conditions = None if given is None else Conditions(given)
    losses = denoising_errors(objective, sequences, times[places], batch_size, device, conditions)
    totals.index_add_(0, places, losses)
    counts.index_add_(0, places, torch.ones_like(losses))
    return (totals / counts)[counts > 0].tolist()


def held_out_conditions(count: int, sequence_length: int, settings: ConditioningSettings) -> torch.Tensor:
    """What is given of `count` held-out texts, bool (count, L), as of the conditional rows in training; the same at
    each call."""
    rows = RowRandomness(0, 0, range(count), count)
    of_conditional_rows = rows.places() * (settings.prefix_share + settings.gaps_share)
    return settings.draw(of_conditional_rows.tolist(), rows.numpy_generators(), sequence_length).given


def conditional_diffusion_losses(
    objective: JointObjective,
    sequences: torch.Tensor,
    given: torch.Tensor,
    times: torch.Tensor,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Held-out diffusion loss of what is written where a part of each text is `given` (B, L), and of the same where
    the denoiser is not told what; over `times` (G,), which are dealt out to the sequences in turn."""
    times = times[torch.arange(len(sequences)) % len(times)]
    losses = {}
    for name, dropped in (("conditional_diffusion_loss", False), ("dropped_diffusion_loss", True)):
        conditions = Conditions(given, torch.full((len(given),), dropped))
        losses[name] = float(denoising_errors(objective, sequences, times, batch_size, device, conditions).mean())
    return losses


@torch.no_grad()
def denoising_errors(
    objective: JointObjective,
    sequences: torch.Tensor,
    times: torch.Tensor,
    batch_size: int,
    device: torch.device,
    conditions: Conditions | None = None,
) -> torch.Tensor:
    """Diffusion loss of each of the sequences (B, L) at a time of its own (B,), in float64 on the CPU; a sequence has
    the same noise at each call."""
    losses = []
    for first in range(0, len(sequences), batch_size):
        rows = slice(first, first + batch_size)
        input_ids = sequences[rows].to(device)
        randomness = RowRandomness(0, 0, range(first, first + len(input_ids)), len(sequences))
        self_conditioned = randomness.uniform() < objective.settings.self_conditioning_probability
        some = None if conditions is None else conditions[rows].to(device)
        mask = None if some is None else some.attention_mask()
        hidden_states = objective.token_encoder(input_ids, attention_mask=mask, return_dict=True).hidden_states
        latents = objective.latent_encoder(hidden_states, attention_mask=mask, return_dict=True).latents.float()
        denoised = objective.denoise(
            latents,
            times[rows].float().to(device),
            randomness.generators(device),
            self_conditioned.tolist(),
            given=None if some is None else some.of_denoiser(latents),
        )
        errors = example_errors(denoised.clean_latents, latents, None if some is None else some.given)
        losses.append(errors.double().cpu())
    return torch.cat(losses)


def preview(
    pipeline: DiffusionPipeline, settings: EvaluationSettings, sources: GivenTokens | None = None
) -> tuple[list[str], dict[str, float]]:
    """A few samples by the sampler of the settings, of sources where there are some: texts, and what can be said
    without a judge, for the log."""
    Sampler.parse(settings.sampler).become_default(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    count = settings.num_preview_samples
    sequences, texts = sample(pipeline, count, settings.num_inference_steps, 0, settings.batch_size, sources)
    return texts, {f"samples/{name}": value for name, value in score_without_judge(sequences, texts).items()}
