"""The diffusion loss (Eq. 1), with self-conditioning on the denoiser's own first estimate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers.scheduling_tangent import TangentScheduler
from .base import squared_errors, without_autocast_cache


def diffusion_losses(
    transformer: LDLMTransformer1DModel,
    scheduler: TangentScheduler,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    self_conditioned: Sequence[bool] | None,
) -> torch.Tensor:
    """||z^(z_t, t) - z||^2 of each example, a mean over its entries, (B,).

    Args:
        transformer: the denoiser.
        scheduler: the noise process.
        latents: clean latents z (B, N, d_z).
        timesteps: t in [0, 1], (B,).
        noise: standard normal, of the latents' shape.
        self_conditioned: which examples are denoised with their own first estimate, of length B; None where no batch
            ever has one.
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    self_condition = torch.zeros_like(noisy_latents)
    if self_conditioned is not None:
        self_condition = first_estimate(transformer, noisy_latents, timesteps, self_conditioned)
    clean_latents = transformer(noisy_latents, timesteps, self_condition).sample  # (B, N, d_z)
    return squared_errors(clean_latents, latents).flatten(1).mean(1)


def first_estimate(
    transformer: LDLMTransformer1DModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    self_conditioned: Sequence[bool],
) -> torch.Tensor:
    """The self-condition: a first estimate of the clean latents for the chosen examples, zeros for the others.

    The extra pass has no gradient and runs on the chosen examples only.
    """
    device = noisy_latents.device
    # ranks of a sharded run must call the denoiser equally often, so one example stands in where none was drawn
    places = torch.tensor([place for place, drawn in enumerate(self_conditioned) if drawn] or [0])
    chosen = places.to(device, non_blocking=True)
    with torch.no_grad(), without_autocast_cache(device):
        estimate = transformer(noisy_latents[chosen].detach(), timesteps[chosen]).sample
        estimate = estimate.to(noisy_latents.dtype) * any(self_conditioned)
        return torch.zeros_like(noisy_latents).index_copy(0, chosen, estimate)
