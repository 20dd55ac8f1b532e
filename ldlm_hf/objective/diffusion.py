"""The denoiser's pass on noisy latents, self-conditioned on its own first estimate, and what it is trained to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers.scheduling_tangent import TangentScheduler
from .base import squared_errors, without_autocast_cache


@dataclass
class Denoised:
    """One pass of the denoiser; all of shape (B, N, d_z).

    Attributes:
        noisy_latents: z_t, what was denoised.
        self_condition: the first estimate that it was denoised with; zeros where there was none.
        clean_latents: the prediction z^.
    """

    noisy_latents: torch.Tensor
    self_condition: torch.Tensor
    clean_latents: torch.Tensor


def denoise(
    transformer: LDLMTransformer1DModel,
    scheduler: TangentScheduler,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    self_conditioned: Sequence[bool] | None,
    guidance: torch.Tensor | None = None,
    given: dict[str, torch.Tensor] | None = None,
) -> Denoised:
    """Puts noise on latents and denoises them.

    Args:
        transformer: the denoiser.
        scheduler: the noise process.
        latents: clean latents z (B, N, d_z).
        timesteps: t in [0, 1], (B,).
        noise: standard normal, of the latents' shape.
        self_conditioned: which examples are denoised with their own first estimate, of length B; None where no batch
            ever has one.
        guidance: weights (B,) of the self-condition that a denoiser with `guidance_embeds` is told.
        given: what the denoiser is told of given latents (see [`Conditions.of_denoiser`]).
    """
    given = given or {}
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    self_condition = torch.zeros_like(noisy_latents)
    if self_conditioned is not None:
        self_condition = first_estimate(transformer, noisy_latents, timesteps, self_conditioned, given)
    clean_latents = transformer(noisy_latents, timesteps, self_condition, guidance=guidance, **given).sample
    return Denoised(noisy_latents, self_condition, clean_latents)


def guided_target(latents: torch.Tensor, denoised: Denoised, guidance: torch.Tensor) -> torch.Tensor:
    """z + (1 - 1 / w) (z^ - z^_0), by which the denoiser learns what guidance by the self-condition would give it.

    z^_0 is the first estimate, z^ the prediction from it and w the weight that the denoiser is told. Where z^ is what
    it is trained to, z^ = z^_0 + w (E[z | z_t, z^_0] - z^_0): the guided prediction, in one evaluation instead of two
    (the target of ELF's guidance in training, written so that it needs no further pass).

    Examples without a first estimate have z as their target, whatever weight the denoiser is told: else it would take
    the weight for a sign of whether there is one.

    Args:
        latents: clean latents z (B, N, d_z).
        denoised: the denoiser's pass with these weights.
        guidance: w > 0, (B,).
    """
    is_guided = denoised.self_condition.flatten(1).any(1)
    share = ((1 - 1 / guidance) * is_guided)[:, None, None]
    return latents + share * (denoised.clean_latents - denoised.self_condition).detach().float()


def example_errors(prediction: torch.Tensor, target: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error over the entries of each example (B, N, d_z), but those of latents that are given (B, N), →
    (B,)."""
    if given is None:
        return squared_errors(prediction, target).flatten(1).mean(1)
    errors = squared_errors(prediction, target).mean(-1).masked_fill(given, 0)  # (B, N)
    return errors.sum(1) / (~given).sum(1).clamp(min=1)


def first_estimate(
    transformer: LDLMTransformer1DModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    self_conditioned: Sequence[bool],
    given: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The self-condition: a first estimate of the clean latents for the chosen examples, zeros for the others.

    The extra pass has no gradient and runs on the chosen examples only.
    """
    device = noisy_latents.device
    # ranks of a sharded run must call the denoiser equally often, so one example stands in where none was drawn
    places = torch.tensor([place for place, drawn in enumerate(self_conditioned) if drawn] or [0])
    chosen = places.to(device, non_blocking=True)
    with torch.no_grad(), without_autocast_cache(device):
        of_chosen = {name: value[chosen] for name, value in (given or {}).items()}
        estimate = transformer(noisy_latents[chosen].detach(), timesteps[chosen], **of_chosen).sample
        estimate = estimate.to(noisy_latents.dtype) * any(self_conditioned)
        return torch.zeros_like(noisy_latents).index_copy(0, chosen, estimate)
