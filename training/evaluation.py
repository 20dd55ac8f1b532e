"""What is measured on held-out text: reconstruction, the diffusion loss over t, and samples beside real text."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from ldlm_hf import JointObjective, LDLMPipeline, NGramDiversity, TokenEntropy
from randomness import RowRandomness
from sampling import sample_latents
from settings import EvaluationSettings


def held_out_sequences(dataset: Dataset[dict[str, torch.Tensor]], count: int) -> torch.Tensor:
    """`count` sequences (or all, if there are fewer), spread evenly over a data set: (count, L)."""
    length = len(dataset)  # type: ignore[arg-type]
    indices = torch.linspace(0, length - 1, min(count, length)).round().long().unique()
    return torch.stack([dataset[int(index)]["input_ids"] for index in indices])


@torch.no_grad()
def reconstruction(
    objective: JointObjective, sequences: torch.Tensor, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Held-out reconstruction from clean latents: mean squared error of hidden states, and token accuracy."""
    squared_error = correct = 0.0
    for input_ids in sequences.split(batch_size):
        input_ids = input_ids.to(device)
        hidden_states = objective.token_encoder(input_ids, return_dict=True).hidden_states
        latents = objective.latent_encoder(hidden_states, return_dict=True).latents
        predicted = objective.latent_decoder(latents, return_dict=True).hidden_states
        squared_error += float((predicted.float() - hidden_states.float()).square().mean()) * len(input_ids)
        if objective.token_decoder is not None:
            tokens = objective.token_decoder(predicted, return_dict=True).logits.argmax(-1)
            correct += float((tokens == input_ids).float().mean()) * len(input_ids)
    result = {"reconstruction_mse": squared_error / len(sequences)}
    if objective.token_decoder is not None:
        result["reconstruction_accuracy"] = correct / len(sequences)
    return result


@torch.no_grad()
def diffusion_loss_at(
    objective: JointObjective, sequences: torch.Tensor, times: torch.Tensor, batch_size: int, device: torch.device
) -> list[float]:
    """Held-out diffusion loss at each of `times` (in [0, 1], of shape (G,)), with the same noise for a sequence at
    each call, in batches of any size.

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
        losses = objective.diffusion_losses(
            latents,
            times[some_places].float().to(device),
            randomness.generators(device),
            self_conditioned.tolist(),
        )
        totals.index_add_(0, some_places, losses.double().cpu())
        counts.index_add_(0, some_places, torch.ones(len(some_places), dtype=torch.float64))
    return (totals / counts)[counts > 0].tolist()


def sample(
    pipeline: LDLMPipeline, settings: EvaluationSettings, count: int, seed: int
) -> tuple[torch.Tensor, list[str]]:
    """`count` samples of a pipeline, those that `evaluate.py` makes of this seed: token ids (count, L) and texts."""
    batches = torch.arange(count).split(settings.batch_size)
    latents = (sample_latents(pipeline, settings.num_inference_steps, seed, batch.tolist()) for batch in batches)
    sequences = torch.cat([pipeline.decode_to_sequences(some).cpu() for some in latents])
    return sequences, pipeline.tokenizer.batch_decode(sequences, skip_special_tokens=True)


def score(sequences: torch.Tensor) -> dict[str, float]:
    """Entropy (nats) and n-gram diversity of a set of samples (n, L): what needs no judge."""
    rows = sequences.tolist()
    return {
        "entropy": TokenEntropy().compute(predictions=rows)["entropy"],
        "diversity": NGramDiversity().compute(predictions=rows)["diversity"],
    }
