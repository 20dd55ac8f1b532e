"""Densities that the times of the likelihood bound's integral are drawn from (importance sampling)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..schedulers import tangent
from .timesteps import AdaptiveTimestepSampler, UniformTimestepSampler


PROPOSALS = ("log_snr", "uniform", "adaptive")


@dataclass(frozen=True)
class TimeProposal:
    """A density over [start, 1] that the times of the diffusion term are drawn from; the estimate is divided by it.

    Attributes:
        quantile: uniform numbers in [0, 1) → times, float64.
        density: times → their density, float64.
    """

    quantile: Callable[[torch.Tensor], torch.Tensor]
    density: Callable[[torch.Tensor], torch.Tensor]


def sampler_proposal(sampler: AdaptiveTimestepSampler | UniformTimestepSampler, start: float) -> TimeProposal:
    """The density of a timestep sampler of training, restricted to [start, 1]."""
    below = float(sampler.cdf(torch.tensor(start, dtype=torch.float64)))

    def quantile(uniforms: torch.Tensor) -> torch.Tensor:
        return sampler.quantile(below + (1 - below) * uniforms.double()).clamp(min=start)

    def density(timesteps: torch.Tensor) -> torch.Tensor:
        return sampler.density(timesteps.double()) / (1 - below)

    return TimeProposal(quantile, density)


def log_snr_proposal(start: float, d: float, latent_std: float) -> TimeProposal:
    """Uniform in log(1 + c^2 SNR): in log-SNR where the latents stand out of the noise, in SNR where they do not.

    Against latents N(0, c^2 I) and their best denoiser every draw then has the same value, whatever d is.
    """
    variance = latent_std**2

    def stretched(timesteps: torch.Tensor) -> torch.Tensor:
        return torch.log1p(variance * tangent.log_snr(timesteps, d).exp())

    largest = float(stretched(torch.tensor(start, dtype=torch.float64)))

    def quantile(uniforms: torch.Tensor) -> torch.Tensor:
        log_snr = torch.expm1(largest * (1 - uniforms.double())).log() - math.log(variance)
        return tangent.timesteps_from_log_snr(log_snr, d)

    def density(timesteps: torch.Tensor) -> torch.Tensor:
        slope = -variance * tangent.snr_slope(timesteps, d)
        return slope / (torch.exp(stretched(timesteps)) * largest)

    return TimeProposal(quantile, density)


def equal_mixture(first: TimeProposal, second: TimeProposal) -> TimeProposal:
    """Either of two proposals with the same probability."""

    def quantile(uniforms: torch.Tensor) -> torch.Tensor:
        doubled = 2 * uniforms.double()
        # one uniform number chooses the part and the place in it, so that strata stay strata
        return torch.where(doubled < 1, first.quantile(doubled % 1), second.quantile(doubled % 1))

    def density(timesteps: torch.Tensor) -> torch.Tensor:
        return (first.density(timesteps) + second.density(timesteps)) / 2

    return TimeProposal(quantile, density)


def build_proposal(
    name: str, start: float, d: float, latent_std: float, sampler: AdaptiveTimestepSampler | None = None
) -> TimeProposal:
    """The proposal of a name; all give the same expectation.

    * `log_snr`: see [`log_snr_proposal`].
    * `uniform`: uniform times.
    * `adaptive`: half from the adaptive sampler, half from `log_snr`. The sampler alone hardly ever draws where the
      training loss is flat, and the likelihood's weight does not vanish there: rare and enormous draws, which the
      other half bounds (ours).

    The estimate's variance depends on `latent_std`, the standard deviation of the latents' entries; its mean does not.

    Raises:
        ValueError: an unknown name, or `adaptive` without a sampler that has learned anything.
    """
    if name not in PROPOSALS:
        raise ValueError(f"proposal={name!r} is unknown; it is one of {', '.join(PROPOSALS)}.")
    if name == "uniform":
        return sampler_proposal(UniformTimestepSampler(), start)
    log_snr = log_snr_proposal(start, d, latent_std)
    if name == "log_snr":
        return log_snr
    if sampler is None or not sampler.is_active:
        raise ValueError(
            "proposal='adaptive' needs an adaptive timestep sampler whose probabilities have been refreshed in "
            "training; use proposal='log_snr'."
        )
    return equal_mixture(sampler_proposal(sampler, start), log_snr)


def stratified_uniforms(num_draws: int, num_sequences: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Uniform numbers (K, N), float64: each draw is one shifted grid over the N sequences (Kingma et al., 2021).

    Each number alone is uniform; the K shifts are independent, so the spread of the draws' means is their true error.
    """
    shifts = torch.rand(num_draws, 1, dtype=torch.float64, generator=generator)
    return (shifts + torch.arange(num_sequences, dtype=torch.float64) / num_sequences) % 1
