"""What makes the latents of an autoencoder robust that is trained before the diffusion (COSMOS, Meshchaninov et al.,
2025): masked tokens, noise on the hidden states that are encoded, and dropped latents.
"""

from __future__ import annotations

import math

import torch

from .draws import Generators, normal_like, random_mask


# fields of `JointObjectiveSettings`; 0 leaves each out
AUGMENTATIONS = ("token_masking", "feature_noise", "latent_dropout")


def mask_tokens(
    input_ids: torch.Tensor, probability: float, mask_token_id: int, generator: Generators
) -> torch.Tensor:
    """Token ids (B, L), each the mask token with the probability."""
    return input_ids.masked_fill(random_mask(input_ids.shape, probability, generator, input_ids.device), mask_token_id)


def add_feature_noise(hidden_states: torch.Tensor, std: float, generator: Generators) -> torch.Tensor:
    """sqrt(1 - n^2) h + n eps, whose variance stays 1, of hidden states (B, L, D) for n in [0, 1]."""
    return math.sqrt(1 - std**2) * hidden_states + std * normal_like(hidden_states, generator)


def drop_latents(latents: torch.Tensor, probability: float, generator: Generators) -> torch.Tensor:
    """Latents (B, N, d_z) with each entry zeroed with the probability, and the others scaled up to the same mean."""
    dropped = random_mask(latents.shape, probability, generator, latents.device)
    return latents.masked_fill(dropped, 0) / (1 - probability)
