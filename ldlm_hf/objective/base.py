"""What the objectives share: one module with one forward, errors in float32, and passes without gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn


class Objective(nn.Module):
    """One batch → losses by one `forward`, so that DDP and FSDP see one call.

    Attributes:
        batch_sizes_vary: whether components are called with other numbers of examples from step to step, so that
            compiled blocks have to take any.
    """

    batch_sizes_vary: ClassVar[bool] = False

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the layers that FSDP shards one by one, for which accelerate asks where it is told none."""
        declared = {name for child in self.children() for name in getattr(child, "_no_split_modules", None) or ()}
        return sorted(declared & {type(module).__name__ for module in self.modules()})


def squared_errors(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(prediction - target)^2 in float32, not reduced."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none")


def without_autocast_cache(device: torch.device) -> AbstractContextManager:
    """Autocast as it is, for a pass without gradients before one that is trained.

    Else it would keep the weights that the first pass casts, which have no graph, for the second.
    """
    if device.type == "meta":  # where FLOPs are counted, and nothing is cast
        return nullcontext()
    return torch.autocast(
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )
