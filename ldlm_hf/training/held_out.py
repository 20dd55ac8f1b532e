"""What is measured on held-out text while a run trains: reconstruction, the diffusion loss over t, and samples."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from ..evaluation.samplers import Sampler
from ..evaluation.samples import sample
from ..evaluation.scores import score_without_judge
from ..models.statistics import LatentSpread
from ..objective import JointObjective
from ..objective.diffusion import example_errors
from .randomness import RowRandomness
from .settings import EvaluationSettings


@torch.no_grad()
def reconstruction(
    objective: JointObjective, sequences: torch.Tensor, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Held-out reconstruction from clean latents: mean squared error of hidden states, token accuracy, and how the
    latents are spread ([`LatentSpread`]).
    """
    squared_error = correct = 0.0
    spread = LatentSpread()
    for input_ids in sequences.split(batch_size):
        input_ids = input_ids.to(device)
        hidden_states = objective.token_encoder(input_ids, return_dict=True).hidden_states
        latents = objective.latent_encoder(hidden_states, return_dict=True).latents
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


@torch.no_grad()
def diffusion_loss_at(
    objective: JointObjective, sequences: torch.Tensor, times: torch.Tensor, batch_size: int, device: torch.device
) -> list[float]:
    """Held-out diffusion loss at each of `times` (G,), in [0, 1]; a sequence has the same noise at each call.

    The sequences are dealt out to the times in turn, so there must be at least as many of them; with fewer, the times
    behind the last one are left out.
    """
    totals = torch.zeros(len(times), dtype=torch.float64)
    counts = torch.zeros(len(times), dtype=torch.float64)
    places = torch.arange(len(sequences)) % len(times)
    for first in range(0, len(sequences), batch_size):
        some_places, input_ids = (one[first : first + batch_size] for one in (places, sequences))
        randomness = RowRandomness(0, 0, range(first, first + len(input_ids)), len(sequences))
        self_conditioned = randomness.uniform() < objective.settings.self_conditioning_probability
        hidden_states = objective.token_encoder(input_ids.to(device), return_dict=True).hidden_states
        latents = objective.latent_encoder(hidden_states, return_dict=True).latents.float()
        denoised = objective.denoise(
            latents,
            times[some_places].float().to(device),
            randomness.generators(device),
            self_conditioned.tolist(),
        )
        losses = example_errors(denoised.clean_latents, latents)
        totals.index_add_(0, some_places, losses.double().cpu())
        counts.index_add_(0, some_places, torch.ones(len(some_places), dtype=torch.float64))
    return (totals / counts)[counts > 0].tolist()


def preview(pipeline: DiffusionPipeline, settings: EvaluationSettings) -> tuple[list[str], dict[str, float]]:
    """A few samples by the sampler of the settings: texts, and what can be said without a judge, for the log."""
    Sampler.parse(settings.sampler).become_default(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    count = settings.num_preview_samples
    sequences, texts = sample(pipeline, count, settings.num_inference_steps, seed=0, batch_size=settings.batch_size)
    return texts, {f"samples/{name}": value for name, value in score_without_judge(sequences, texts).items()}
