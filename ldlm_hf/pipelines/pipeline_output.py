"""What [`LDLMPipeline`] returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.utils import BaseOutput


@dataclass
class LDLMPipelineOutput(BaseOutput):
    """
    Attributes:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Generated token ids; `None` with `output_type="latent"`.
        texts (`list[str]`, *optional*): decoded texts, with `output_type="text"` only.
        latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`):
            Clean latents, as they were decoded.
        rewards (`torch.Tensor` of shape `(batch_size,)`, *optional*): of the texts, by [`LDLMPipeline.steer`].
    """

    sequences: torch.Tensor | None = None
    texts: list[str] | None = None
    latents: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
