"""What is trained, as the training loop sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from randomness import RowRandomness


@dataclass
class StepLosses:
    """What a task computes on one batch.

    Attributes:
        total: the loss that is minimised.
        values: scalars for the log.
        observations: tensors of shape (B,) that `Task.observe` is given, gathered from all ranks.
    """

    total: torch.Tensor
    values: dict[str, torch.Tensor]
    observations: tuple[torch.Tensor, ...] = ()


@dataclass
class Evaluation:
    """What a task has measured on held-out text.

    Attributes:
        values: numbers for the log; those with a `/` in their names are left out of the printed summary.
        texts: a few samples.
        loss_over_time: pairs of t and the diffusion loss there.
    """

    values: dict[str, float]
    texts: list[str] = field(default_factory=list)
    loss_over_time: list[tuple[float, float]] = field(default_factory=list)


class Task(ABC):
    """What is trained: one module with one `forward`, and how a batch becomes a loss."""

    def __init__(self, module: nn.Module):
        self.module = module

    @abstractmethod
    def losses(self, module: nn.Module, input_ids: torch.Tensor, step: int, randomness: RowRandomness) -> StepLosses:
        """Losses of one batch of token ids (B, L); `module` is `self.module` as accelerate has prepared it.

        All that is random comes from `randomness`, and nothing here may wait for the device.
        """

    @abstractmethod
    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        """Evaluates a copy of the module that holds the averaged weights; draws from generators of its own only."""

    def observe(self, *observations: torch.Tensor) -> None:
        """Takes in what one optimiser step has shown: observations of the whole batch, in its order, on the CPU."""

    def steps_until_observation(self) -> int | None:
        """How many steps may be taken before `observe` has to have seen the last of them; None: any number."""
        return None

    def log_values(self, step: int) -> dict[str, float]:
        """Further numbers for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State beside the module's weights that a resumed run needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over such a state."""
