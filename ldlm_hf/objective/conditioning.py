"""Which tokens of a training text are given: prompts of every length, and texts with gaps (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..loading.checks import check_settings
from ..models.conditions import Conditions


@dataclass
class ConditioningSettings:
    """Shares of the texts that are trained on with a part of them given; with 0 and 0, the paper, none are.

    Attributes:
        prefix_share: share of texts whose beginning is given, as many tokens as exp(u) for u even in
            [0, log L): short prompts as often as long ones.
        gaps_share: share of texts of which everything is given but some gaps.
        max_gaps: most gaps of such a text; as many of 1 up to this.
        dropout: share of these texts whose denoiser is not told what is given, which classifier-free guidance needs.
        start_step: optimiser steps of the run before the first such text; small models learn whole texts first.
    """

    prefix_share: float = 0.0
    gaps_share: float = 0.0
    max_gaps: int = 4
    dropout: float = 0.1
    start_step: int = 0

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("prefix_share", "gaps_share", "dropout"), "[0, 1]")
        check_settings(type(self).__init__, vars(self), **shares, max_gaps="[1, inf)", start_step="[0, inf)")
        if self.prefix_share + self.gaps_share > 1:
            raise ValueError(
                f"prefix_share={self.prefix_share} and gaps_share={self.gaps_share} are more than all texts."
            )

    @property
    def gives_texts(self) -> bool:
        """Whether any part of any text is given."""
        return self.prefix_share + self.gaps_share > 0

    def draw(
        self, places: Iterable[float], generators: Iterable[np.random.Generator], sequence_length: int
    ) -> Conditions:
        """What is given of a batch, on the CPU.

        Args:
            places: numbers in [0, 1), spread evenly over a batch in a random order, which say what kind of a row each
                is, so that each batch has its shares.
            generators: one a row, for where its prefix or its gaps end.
            sequence_length: L.
        """
        rows, dropped = [], []
        for place, generator in zip(places, generators, strict=True):
            if place < self.prefix_share:
                rows.append(draw_prefix(sequence_length, generator))
                dropped.append(place < self.dropout * self.prefix_share)
            elif place < self.prefix_share + self.gaps_share:
                rows.append(draw_gaps(sequence_length, self.max_gaps, generator))
                dropped.append(place - self.prefix_share < self.dropout * self.gaps_share)
            else:
                rows.append(np.zeros(sequence_length, dtype=bool))
                dropped.append(False)
        return Conditions(torch.from_numpy(np.stack(rows)), torch.tensor(dropped))


def draw_prefix(sequence_length: int, generator: np.random.Generator) -> np.ndarray:
    """Bool (L,), True for the first n tokens: n = floor(L^u), u uniform in [0, 1), so 1 <= n < L."""
    length = math.floor(sequence_length ** generator.random())
    return np.arange(sequence_length) < min(length, sequence_length - 1)


def draw_gaps(sequence_length: int, max_gaps: int, generator: np.random.Generator) -> np.ndarray:
    """Bool (L,), False in one to `max_gaps` gaps, whose ends are any different places between or beside tokens."""
    num_gaps = int(generator.integers(1, min(max_gaps, (sequence_length + 1) // 2) + 1))
    ends = generator.choice(sequence_length + 1, size=2 * num_gaps, replace=False)
    # behind an odd number of ends lies a gap
    return np.searchsorted(np.sort(ends), np.arange(sequence_length), side="right") % 2 == 0
