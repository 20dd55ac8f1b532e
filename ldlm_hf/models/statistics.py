"""Mean and standard deviation of each dimension over a sample that does not fit into memory."""

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
