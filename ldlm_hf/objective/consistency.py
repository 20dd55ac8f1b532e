"""Consistency along the denoiser's own trajectories: what it predicts now, it shall predict after the next step.

    L_ct = || z^(z_t, t, s) - sg z^_ema(z_t', t', z^(z_t, t, s)) ||^2

z_t' is where one step of DDIM leads from z_t with the prediction, at the step size of a sampler of few steps, and
z^_ema the denoiser with its EMA weights, whose self-condition is the prediction, as in sampling (AURORA, arXiv
2608.02602). It is what makes few evaluations good without distillation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..loading.checks import check_settings
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers.scheduling_tangent import TangentScheduler
from .base import without_autocast_cache
from .diffusion import Denoised, example_errors
from .flow_map import flow_map_step


@dataclass
class ConsistencySettings:
    """The consistency loss; ours, the paper has none.

    Attributes:
        weight: of the loss, after the warmup; 0 leaves it out.
        warmup_steps: optimiser steps over which the weight rises from 0 in a straight line.
        num_steps: of the sampler whose steps are taken, evenly spaced in the warped time F(t).
    """

    weight: float = 0.0
    warmup_steps: int = 0
    num_steps: int = 16

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__, vars(self), weight="[0, inf)", warmup_steps="[0, inf)", num_steps="[1, inf)"
        )

    def weight_at(self, step: int) -> float:
        """The weight at an optimiser step."""
        return self.weight * min(1.0, step / self.warmup_steps if self.warmup_steps else 1.0)


def consistency_losses(
    averaged_transformer: LDLMTransformer1DModel,
    scheduler: TangentScheduler,
    denoised: Denoised,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
    given: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """L_ct of each example, a mean over its entries, (B,).

    Args:
        averaged_transformer: the denoiser with its EMA weights.
        scheduler: the noise process.
        denoised: the denoiser's pass, whose prediction carries its graph.
        timesteps: t in (0, 1], (B,).
        next_timesteps: t' <= t, where the step leads, (B,).
        given: what the denoiser was told of given latents.
    """
    given = given or {}
    prediction = denoised.clean_latents
    with torch.no_grad(), without_autocast_cache(prediction.device):
        clean_latents = prediction.detach().float()
        next_latents = flow_map_step(
            denoised.noisy_latents.detach(), clean_latents, timesteps, next_timesteps, scheduler.config.tangent_d
        )
        # without guidance, which would strengthen itself from step to step
        target = averaged_transformer(next_latents, next_timesteps, clean_latents, **given).sample
    return example_errors(prediction, target, given.get("given"))
