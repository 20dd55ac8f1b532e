"""Smoothness of a latent space: how likely a judge finds what lies between two real texts (Fig. 3, left)."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import torch

from ldlm_hf.metrics.generative_perplexity import sequence_losses
from ldlm_hf.metrics.inputs import TextMetric, check_positive_int, check_texts
from ldlm_hf.metrics.judge import Judge, as_judge


def latent_smoothness(
    predictions: list[str],
    positions: list[float],
    judge: str | Judge | tuple[Any, Any] = "gpt2-large",
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> dict[str, Any]:
    """Generative perplexity of texts decoded along lines between the latents of real texts.

    Where a space is smooth, what is decoded between two texts reads like text, and the curve stays near its ends; in
    a rough one it rises between them. The paper shows the curve. Its one number, `roughness`, is ours: how much the
    judge loses on average between the ends, in nats a token, over what it would lose if log perplexity ran straight
    from the one end to the other. So a worse reconstruction, which lifts the whole curve, does not count as roughness.

    The perplexity is that of `generative_perplexity`: the texts at a position are one set.

    Args:
        predictions (`list[str]`): texts decoded from points on the lines between the latents of pairs of real texts.
        positions (`list[float]`): the place of each on its line, in [0, 1]; every pair at the same places, 0 and 1
            among them.
        judge, batch_size, device, dtype: as in `generative_perplexity`.

    Returns:
        positions (`list[float]`): the places, increasing.
        perplexities (`list`): generative perplexity of the texts at each of them, `None` with nothing to score.
        roughness (`float`): mean over the inner places of log perplexity minus its straight line from 0 to 1, in nats
            a token; `None` where a perplexity is missing.
        num_pairs, num_unscored_texts (`int`): lines; texts with nothing to score.
        judge (`str`), max_length (`int` or `None`): what the numbers depend on.

    Raises:
        ValueError: an argument is out of range, or the judge cannot be loaded.
    """
    check_texts("predictions", predictions)
    batch_size = check_positive_int("batch_size", batch_size)
    places = sorted(set(positions))
    if len(places) < 3 or places[0] != 0 or places[-1] != 1:
        raise ValueError(
            f"`positions` holds the places {places}, but it must hold 0, 1 and at least one between them, and none "
            "outside."
        )
    counts = {place: positions.count(place) for place in places}
    if len(set(counts.values())) > 1:
        raise ValueError(f"`positions` holds places unequally often, {counts}: give every pair the same places.")
    judge = as_judge(judge, device, dtype)
    sequences = judge.encode(predictions, judge.context_length)
    scored = [index for index, sequence in enumerate(sequences) if len(sequence) >= 2]
    losses, _ = sequence_losses(judge, [sequences[index] for index in scored], batch_size)

    totals, num_tokens = dict.fromkeys(places, 0.0), dict.fromkeys(places, 0)
    for index, loss in zip(scored, losses, strict=True):
        totals[positions[index]] += loss
        num_tokens[positions[index]] += len(sequences[index]) - 1
    perplexities = [math.exp(totals[place] / num_tokens[place]) if num_tokens[place] else None for place in places]
    return {
        "positions": places,
        "perplexities": perplexities,
        "roughness": roughness(places, perplexities),
        "num_pairs": counts[0],
        "num_unscored_texts": len(predictions) - len(scored),
        "judge": judge.name,
        "max_length": judge.context_length,
    }


def roughness(positions: list[float], perplexities: list[float | None]) -> float | None:
    """Mean over inner positions s of log PPL(s) - [(1 - s) log PPL(0) + s log PPL(1)], in nats a token."""
    logarithms = [math.log(perplexity) for perplexity in perplexities if perplexity is not None]
    if len(logarithms) < len(perplexities):
        return None
    first, last = logarithms[0], logarithms[-1]
    excess = [
        value - ((1 - position) * first + position * last)
        for position, value in zip(positions[1:-1], logarithms[1:-1], strict=True)
    ]
    return math.fsum(excess) / len(excess)


class LatentSmoothness(TextMetric, evaluate.Metric):
    """[`latent_smoothness`] as a metric of `evaluate`."""

    citation_text = (
        "Meshchaninov et al., How to Train Your Latent Diffusion Language Model Jointly With the Latent Space, 2026."
    )
    columns = TextMetric.columns | {"positions": datasets.Value("float64")}
    _compute = staticmethod(latent_smoothness)
