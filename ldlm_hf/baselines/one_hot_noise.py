"""Gaussian noise on one-hot vectors: its embedding, and the law of its argmax, on which Duo's curriculum and FLM's
time rest.

In mu x + n, with x one-hot of K words and n standard normal, the right word is the largest with probability
A(mu) + (1 - A(mu)) / K, and each other one with (1 - A(mu)) / K:

    A(mu) = K/(K-1) ( E[Phi(n + mu)^(K-1)] - 1/K ),    A(0) = 0,  A(inf) = 1

Computed in float64 by a quadrature over the largest of the K - 1 others, M(y) = -Phi^-1(-expm1(-exp(-y) / (K-1))) with
y standard Gumbel, whose error is below 1e-13 for any K.
"""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext

import torch


GUMBEL_STEP = 0.25
GUMBEL_RANGE = (-4.0, 40.0)
MAX_SIGNAL = 12.0
TABLE_SIZE = 4096


@functools.lru_cache(maxsize=8)
def largest_of_others(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes M_y, the largest of K - 1 standard normal numbers, and their weights; float64 of shape (nodes,)."""
    y = torch.arange(GUMBEL_RANGE[0], GUMBEL_RANGE[1], GUMBEL_STEP, dtype=torch.float64)
    nodes = -torch.special.ndtri(-torch.expm1(-torch.exp(-y) / (vocab_size - 1)))
    return nodes, GUMBEL_STEP * torch.exp(-y - torch.exp(-y))


def normal_density(x: torch.Tensor) -> torch.Tensor:
    """phi(x)"""
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def argmax_signal(mu: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """A(mu), float64 of the shape of `mu`.

    Both terms of the sum over y are taken at once, so that nothing cancels at small mu.
    """
    nodes, weights = largest_of_others(vocab_size)
    gains = torch.special.ndtr(mu.double().cpu()[..., None] - nodes) - torch.special.ndtr(-nodes)
    return vocab_size / (vocab_size - 1) * (gains @ weights)


def argmax_signal_slope(mu: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """dA/dmu, float64 of the shape of `mu`."""
    nodes, weights = largest_of_others(vocab_size)
    return vocab_size / (vocab_size - 1) * (normal_density(mu.double().cpu()[..., None] - nodes) @ weights)


@functools.lru_cache(maxsize=8)
def signal_table(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """mu from 0 to 12, and A there, as far as it rises in float64."""
    mu = torch.linspace(0, MAX_SIGNAL, TABLE_SIZE, dtype=torch.float64)
    signal = argmax_signal(mu, vocab_size)
    rising = torch.cat([torch.ones(1, dtype=torch.bool), signal[1:] > signal.cummax(0).values[:-1]])
    return mu[rising], signal[rising]


def inverse_argmax_signal(signal: torch.Tensor, vocab_size: int, newton_steps: int = 4) -> torch.Tensor:
    """mu with A(mu) = signal in [0, 1), float64: from a table by a straight line, then by Newton's steps within its
    interval."""
    signal = signal.double().cpu()
    table_mu, table_signal = signal_table(vocab_size)
    right = torch.searchsorted(table_signal, signal).clamp(1, len(table_mu) - 1)
    low, high = table_mu[right - 1], table_mu[right]
    share = (signal - table_signal[right - 1]) / (table_signal[right] - table_signal[right - 1])
    mu = torch.lerp(low, high, share.clamp(0, 1))
    for _ in range(newton_steps):
        step = (argmax_signal(mu, vocab_size) - signal) / argmax_signal_slope(mu, vocab_size)
        mu = torch.minimum(torch.maximum(mu - step, low), high)
    return mu


# FLM's time: t = 0 is noise and t = 1 data, x_t = (1 - t) eps + t x, so mu = t / (1 - t)


def warp_time(tau: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """t = g(tau), the time at which a share tau in [0, 1] of positions has the right argmax, corrected for chance;
    float64, exactly 0 and 1 at the ends."""
    tau = tau.double().cpu()
    mu = inverse_argmax_signal(tau, vocab_size)
    return torch.where(tau >= 1, 1.0, torch.where(tau <= 0, 0.0, mu / (1 + mu)))


def unwarp_time(times: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """tau = g^-1(t) = A(t / (1 - t)), float64, for t in [0, 1]."""
    times = times.double().cpu()
    return torch.where(times >= 1, 1.0, argmax_signal(times / (1 - times).clamp(min=1e-300), vocab_size))


# what a network reads of the noise


def embedded_noise(noise: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """eps @ embeddings of standard normal eps (B, L, K), in law, without an array of all words: (B, L, D).

    Its covariance is e^T e, so it is other standard normal noise times the Cholesky factor of that.

    Args:
        noise: standard normal, (B, L, D).
        embeddings: e, (K, D).
    """
    # in bfloat16 it would not be positive definite
    words = embeddings.float()
    with nullcontext() if words.is_meta else torch.autocast(words.device.type, enabled=False):
        gram = (words.mT @ words).double()
    # fewer words than channels leave directions without noise
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + ridge)
    return noise @ factor.mT.to(noise.dtype)
