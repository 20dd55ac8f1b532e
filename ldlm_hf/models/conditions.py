"""What of a text is given, and who may attend to whom, so that what is given knows nothing of what is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def check_attention_mask(attention_mask: torch.Tensor, batch_size: int, length: int) -> None:
    """Raises ValueError unless a mask is bool of shape (B, L, L)."""
    shape = (batch_size, length, length)
    if attention_mask.dtype != torch.bool or tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask must be bool of shape (batch_size, sequence_length, sequence_length) = {shape}, got "
            f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}."
        )


@dataclass(frozen=True)
class Conditions:
    """Which tokens of a batch are given, the others being written; ours, the paper's models write all of them.

    Latents are contextual: if a given token's latent were encoded together with what is to be written, it would have
    seen the answer. So given tokens attend to given tokens alone.

    Attributes:
        given: bool (B, L).
        dropped: bool (B,), rows whose denoiser is not told what is given, as classifier-free guidance needs them; what
            is written then does not attend to it either. None stands for no such row.
    """

    given: torch.Tensor
    dropped: torch.Tensor | None = None

    def attention_mask(self) -> torch.Tensor:
        """Whether token i may attend to token j, bool (B, L, L)."""
        query, key = self.given[:, :, None], self.given[:, None, :]
        mask = key | ~query
        if self.dropped is not None:
            mask = mask & ((key == query) | ~self.dropped[:, None, None])
        return mask

    def of_denoiser(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """The denoiser's arguments for clean latents (B, N, d_z), one a token: those of given tokens, without their
        gradients, and zeros in dropped rows."""
        shown = self.given if self.dropped is None else self.given & ~self.dropped[:, None]
        return {"given": self.given, "given_latents": latents.detach() * shown[..., None]}

    def __getitem__(self, rows: slice) -> Conditions:
        """Those of some rows."""
        return Conditions(self.given[rows], None if self.dropped is None else self.dropped[rows])

    def repeat(self, times: int) -> Conditions:
        """Those of a batch in which each row comes so many times in a row."""
        dropped = None if self.dropped is None else self.dropped.repeat_interleave(times)
        return Conditions(self.given.repeat_interleave(times, dim=0), dropped)

    def to(self, device: torch.device) -> Conditions:
        """The same on a device."""
        dropped = None if self.dropped is None else self.dropped.to(device, non_blocking=True)
        return Conditions(self.given.to(device, non_blocking=True), dropped)
