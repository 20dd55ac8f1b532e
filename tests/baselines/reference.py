"""The reference numbers of the methods' own functions, and the closed-form denoiser that they were computed with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


REFERENCE = json.loads((Path(__file__).parent / "baseline_reference.json").read_text())


def tensor(values: Any) -> torch.Tensor:
    """float64, or int64 of whole numbers."""
    return torch.from_numpy(np.asarray(values))


class Case:
    """One of the two cases: K words, clean ids x (B, L), and noisy ones."""

    def __init__(self, name: str):
        case = REFERENCE["cases"][name]
        self.name = name
        self.vocab_size = case["K"]
        self.x = tensor(case["x"])
        self.z_masked = tensor(case["z_masked"])
        self.z_uniform = tensor(case["z_uniform"])

    @property
    def noise(self) -> torch.Tensor:
        """eps (B, L, K), at every draw."""
        b, length = self.x.shape
        angles = 1.7 * steps(b)[:, None, None] + 0.9 * steps(length)[:, None] + 2.3 * steps(self.vocab_size) + 0.3
        return 1.5 * torch.sin(angles)


def steps(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float64)


def fake_logits(inputs: torch.Tensor, vocab_size: int, c: Any = 0.0, c2: Any = 0.0) -> torch.Tensor:
    """The denoiser: logits (B, L, K) by ids (B, L), or by vectors (B, L, .) of which the entry v counts v."""
    ids = inputs.double() if inputs.ndim == 2 else inputs.double() @ steps(inputs.shape[-1])
    times = [torch.as_tensor(one, dtype=torch.float64).reshape(-1, 1, 1) for one in (c, c2)]
    angles = 0.9 * ids[..., None] + 0.5 * steps(inputs.shape[1])[:, None] + 1.3 * steps(vocab_size)
    return 2 * torch.sin(angles + 0.7 * times[0] + 0.4 * times[1])
