"""Diffusion-to-encoder warmup: how much of the diffusion loss's gradient reaches the latent encoder (Eq. 28–30)."""

from __future__ import annotations

import math

import torch


def warmup_gate(step: int, warmup_steps: int, midpoint: float = 0.8, steepness: float = 10.0) -> float:
    """gamma(s): 0 at step 0, 1 from `warmup_steps` on, a logistic curve between (Eq. 29–30).

        S(s) = sigmoid(steepness (s / warmup_steps - midpoint)),  gamma(s) = (S(s) - S(0)) / (S(warmup_steps) - S(0))

    Args:
        step: optimiser step s, from 0.
        warmup_steps: S_wu; 0 means no warmup, gamma = 1 throughout.
        midpoint: c, where the logistic curve is steepest, as a share of the warmup.
        steepness: k.
    """
    if step >= warmup_steps:
        return 1.0

    def logistic(progress: float) -> float:
        # the logistic function as a hyperbolic tangent, which does not overflow
        return (1 + math.tanh(steepness * (progress - midpoint) / 2)) / 2

    return (logistic(step / warmup_steps) - logistic(0)) / (logistic(1) - logistic(0))


def scale_gradient(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Returns x, bit for bit, and multiplies the gradient that flows back through it by `scale` (Eq. 28).

    gamma x + (1 - gamma) stop_gradient(x), written as an interpolation: its end points are equal, so it is exact in
    every floating-point type, which the sum is not.
    """
    return torch.lerp(x.detach(), x, scale)
