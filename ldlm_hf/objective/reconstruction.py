"""The reconstruction losses: hidden states (Eq. 2) and tokens (Eq. 3) from noisy latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class ReconstructionLosses(NamedTuple):
    """Scalars of one batch.

    Attributes:
        hidden: mean squared error of the reconstructed hidden states (Eq. 2).
        token: cross-entropy in nats a token (Eq. 3); 0 where none are decoded.
        token_accuracy: share of tokens decoded right; NaN where none are decoded.
    """

    hidden: torch.Tensor
    token: torch.Tensor
    token_accuracy: torch.Tensor

    @classmethod
    def none(cls, device: torch.device) -> ReconstructionLosses:
        """Those of a batch that is not reconstructed."""
        zero = torch.zeros((), device=device)
        return cls(zero, zero, torch.full_like(zero, torch.nan))


def token_cross_entropy(
    logits: torch.Tensor, input_ids: torch.Tensor, chunk_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy in nats a token, in float32, and accuracy of logits (B, L, V) for token ids (B, L).

    Taken over `chunk_size` tokens at a time: its float32 intermediates are the largest tensors of a training step, and
    small ones stay in the cache.
    """
    logits, input_ids = logits.flatten(0, 1), input_ids.flatten().long()  # (B * L, V), (B * L,)
    losses = [
        F.cross_entropy(some_logits.float(), some_ids, reduction="sum")
        for some_logits, some_ids in zip(logits.split(chunk_size), input_ids.split(chunk_size), strict=True)
    ]
    # max finds the index several times faster than argmax on a CPU
    accuracy = (logits.detach().max(-1).indices == input_ids).float().mean()
    return torch.stack(losses).sum() / len(input_ids), accuracy
