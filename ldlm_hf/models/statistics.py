"""Statistics over a sample that does not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch


# of the variance; that of the same authors' COSMOS
VARIANCE_FLOOR = 1e-4


def mean_and_std(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and standard deviation of each dimension, both float64 of shape (D,), and the number of vectors.

    Sums are taken in float64; the variance is floored at 1e-4, so that a dimension that hardly varies is not blown up.

    Args:
        batches: vectors (..., D).

    Raises:
        ValueError: there is no vector.
    """
    count = 0
    offset: torch.Tensor | None = None
    total = total_of_squares = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        vectors = batch.double().flatten(0, -2)  # (n, D)
        if not len(vectors):
            continue
        if offset is None:
            # the variance of what is left after a rough mean does not cancel
            offset = vectors.mean(0)
        vectors = vectors - offset
        count += len(vectors)
        total = total + vectors.sum(0)
        total_of_squares = total_of_squares + vectors.square().sum(0)
    if offset is None:
        raise ValueError("Statistics need at least one token; `batches` held none.")
    centred_mean = total / count
    variance = (total_of_squares / count - centred_mean.square()).clamp_min(VARIANCE_FLOOR)
    return offset + centred_mean, variance.sqrt(), count


class LatentSpread:
    """How the variance of latents (n, N, d_z), taken in batches, is spread over their dimensions and places.

    `rank` is the participation ratio of the covariance of what differs between texts, (sum of its eigenvalues)^2 over
    the sum of their squares: d_z for white latents, k for latents that fill a space of k dimensions evenly.
    `position_share` is the share of the variance that is between the places of a sequence, and says nothing of the
    text.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = self.products = torch.zeros((), dtype=torch.float64)

    def add(self, latents: torch.Tensor) -> None:
        latents = latents.double()
        self.count += len(latents)
        self.total = self.total + latents.sum(0)  # (N, d_z)
        vectors = latents.flatten(0, 1)
        self.products = self.products + vectors.T @ vectors  # (d_z, d_z)

    def measure(self) -> tuple[float, float]:
        """`rank` and `position_share`."""
        means = self.total / self.count
        between_texts = self.products / self.count / len(means) - means.T @ means / len(means)
        between_places = (means - means.mean(0)).square().mean(0).sum()
        variance = between_texts.trace()
        rank = variance.square() / between_texts.square().sum()
        return float(rank), float(between_places / (variance + between_places))
