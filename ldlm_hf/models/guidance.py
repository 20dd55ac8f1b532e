"""Guidance: a prediction moved further along what its self-condition, or what is given, changes."""

from __future__ import annotations

import torch


def guide(
    unconditional: torch.Tensor,
    conditional: torch.Tensor,
    scale: float,
    rescale: float = 0.0,
    contrast: torch.Tensor | None = None,
) -> torch.Tensor:
    """x^ = x^_0 + w (x^_sc - x^_0) in float32, classifier-free guidance with the self-condition in the condition's
    place.

    Args:
        unconditional: x^_0, the prediction without a self-condition, (B, ...).
        conditional: x^_sc, that from it.
        scale: w.
        rescale: phi in [0, 1], how far the standard deviation of each example, which guidance raises, goes back to
            that of x^_sc ("Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891, 3.4).
        contrast: what else the prediction is moved by, of its shape, such as guidance by a prompt.
    """
    conditional = conditional.float()
    guided = torch.lerp(unconditional.float(), conditional, scale)
    if contrast is not None:
        guided = guided + contrast
    if rescale == 0:
        return guided
    ratio = conditional.flatten(1).std(1) / guided.flatten(1).std(1)
    return guided * torch.lerp(torch.ones_like(ratio), ratio, rescale).view(-1, *[1] * (guided.ndim - 1))
