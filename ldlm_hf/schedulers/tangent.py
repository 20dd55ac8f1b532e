"""The tangent noise schedule (App. C): pure functions of time t in [0, 1], 0 = clean and 1 = noise.

    alpha : sigma = cos(pi t / 2) : d sin(pi t / 2),  normalised to alpha^2 + sigma^2 = 1

which is alpha = 1 / sqrt(1 + d^2 tan^2(pi t / 2)) without its pole at t = 1. Everything is computed in float64 and is
exact at both ends; callers cast the results once.
"""

from __future__ import annotations

import math

import torch


def _sine_cosine(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sin(pi t / 2) and cos(pi t / 2) in float64; the cosine as a sine, since only the sine is exact at its zero."""
    timesteps = timesteps.double()
    return torch.sin(math.pi / 2 * timesteps), torch.sin(math.pi / 2 * (1 - timesteps))


def alpha_sigma(timesteps: torch.Tensor, d: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise level of z_t = alpha z + sigma eps, both float64; (1, 0) at t = 0 and (0, 1) at t = 1."""
    sine, cosine = _sine_cosine(timesteps)
    norm = torch.sqrt(cosine.square() + (d * sine).square())
    return cosine / norm, d * sine / norm


def beta(timesteps: torch.Tensor, d: float) -> torch.Tensor:
    """beta = -2 d(log alpha)/dt = pi d^2 sin / (cos (cos^2 + d^2 sin^2)), float64; infinite at t = 1."""
    sine, cosine = _sine_cosine(timesteps)
    return math.pi * d**2 * sine / (cosine * (cosine.square() + (d * sine).square()))


def log_snr(timesteps: torch.Tensor, d: float) -> torch.Tensor:
    """2 log(alpha / sigma) = -2 log(d tan(pi t / 2)), float64; +inf at t = 0 and -inf at t = 1."""
    sine, cosine = _sine_cosine(timesteps)
    return 2 * (torch.log(cosine) - torch.log(d * sine))


def snr_slope(timesteps: torch.Tensor, d: float) -> torch.Tensor:
    """d(alpha^2 / sigma^2)/dt = -pi cos / (d^2 sin^3), float64; -inf at t = 0 and 0 at t = 1."""
    sine, cosine = _sine_cosine(timesteps)
    return -math.pi * cosine / (d**2 * sine**3)


def timesteps_from_log_snr(log_snrs: torch.Tensor, d: float) -> torch.Tensor:
    """The inverse of [`log_snr`], float64."""
    return 2 / math.pi * torch.atan(torch.exp(-log_snrs.double() / 2) / d)


def uniform_time_grid(num_steps: int, t_min: float) -> torch.Tensor:
    """The paper's grid: `num_steps + 1` evenly spaced times from 1 down to `t_min`, float64."""
    return torch.linspace(1.0, t_min, num_steps + 1, dtype=torch.float64)


def log_snr_time_grid(num_steps: int, t_max: float, t_min: float, d: float) -> torch.Tensor:
    """`num_steps + 1` times from `t_max` down to `t_min`, evenly spaced in log-SNR, float64.

    `t_max` < 1, since the log-SNR of pure noise is -inf, and `t_min` > 0.
    """
    ends = log_snr(torch.tensor([t_max, t_min], dtype=torch.float64), d)
    grid = timesteps_from_log_snr(
        torch.linspace(float(ends[0]), float(ends[1]), num_steps + 1, dtype=torch.float64), d
    )
    grid[0], grid[-1] = t_max, t_min
    return grid


def learned_time_grid(num_steps: int, t_min: float, cdf: list[float]) -> torch.Tensor:
    """`num_steps + 1` times from 1 down to `t_min`, evenly spaced in warped time F(t), float64 (Section 5.3).

    Args:
        num_steps: steps between them.
        t_min: last time.
        cdf: F at evenly spaced times from 0 to 1, rising from 0 to 1; F is a straight line between two of them.
    """
    knots = torch.tensor(cdf, dtype=torch.float64)
    position = t_min * (len(knots) - 1)
    left = min(int(position), len(knots) - 2)
    start = torch.lerp(knots[left], knots[left + 1], position - left)
    levels = torch.linspace(1.0, float(start), num_steps + 1, dtype=torch.float64)
    # the bin that a level falls into; where F is flat no level lies, up to rounding, but at its right end
    right = torch.searchsorted(knots, levels).clamp(1, len(knots) - 1)
    within = (levels - knots[right - 1]) / (knots[right] - knots[right - 1])
    grid = (right - 1 + within) / (len(knots) - 1)
    grid[0], grid[-1] = 1.0, t_min
    return grid


def signal_to_noise(timesteps: torch.Tensor, d: float) -> torch.Tensor:
    """rho = alpha / sigma = cot(pi t / 2) / d, float64; +inf at t = 0 and 0 at t = 1.

    In rho the probability-flow ODE is d(z / sigma) = x0(z, t) d(rho), without a linear part.
    """
    sine, cosine = _sine_cosine(timesteps)
    return cosine / (d * sine)
