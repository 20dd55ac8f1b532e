"""Random numbers of a training step: a function of seed, step and place in the whole batch, and of nothing else.

A row of the batch gets the same time, the same noise and the same self-conditioning whatever device and pass it falls
on. So runs on one process and on many are the same run, up to rounding, and a resumed one needs no random states.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class RowRandomness:
    """The random numbers of some rows of one step's whole batch."""

    seed: int
    step: int  # optimiser steps done before
    rows: range  # places in the whole batch
    batch_size: int  # rows of the whole batch

    def uniform(self) -> torch.Tensor:
        """A number in [0, 1) for each row, float64 of shape (rows,), on the CPU."""
        numbers = np.random.default_rng((self.seed, self.step)).random(self.batch_size)
        return torch.from_numpy(numbers[self.rows.start : self.rows.stop])

    def uniforms(self, count: int) -> torch.Tensor:
        """`count` numbers in [0, 1) for each row, float64 of shape (rows, count), on the CPU."""
        numbers = np.random.default_rng((self.seed, self.step, 3)).random((self.batch_size, count))
        return torch.from_numpy(numbers[self.rows.start : self.rows.stop])

    def shared_uniform(self) -> float:
        """One number in [0, 1) that all rows of the step share."""
        return np.random.default_rng((self.seed, self.step, 1)).random()

    def places(self) -> torch.Tensor:
        """A number in [0, 1) for each row, float64 of shape (rows,): those of the whole batch lie evenly, in a random
        order."""
        rng = np.random.default_rng((self.seed, self.step, 4))
        places = (rng.permutation(self.batch_size) + rng.random()) / self.batch_size
        return torch.from_numpy(places[self.rows.start : self.rows.stop])

    def numpy_generators(self) -> list[np.random.Generator]:
        """A source of numbers for each row, on the CPU."""
        return [np.random.default_rng((self.seed, self.step, 5, row)) for row in self.rows]

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """A source of noise for each row, on the device that the noise is needed on."""
        seeds = [np.random.SeedSequence((self.seed, self.step, 2, row)).generate_state(1) for row in self.rows]
        return [torch.Generator(device).manual_seed(int(seed[0])) for seed in seeds]
