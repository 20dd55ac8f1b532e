"""Which times t the diffusion loss is taken at: uniform, or adapted to where the loss grows (Section 5.3, Eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..loading.checks import check_settings


@dataclass
class TimestepSamplerSettings:
    """Settings of the timestep sampler; ValueError for a number outside of its range.

    Attributes:
        adaptive: Eq. 5; False draws t uniformly.
        num_bins: equal bins that [0, 1] is divided into.
        ema_decay: decay of the running loss estimate, for each optimiser step.
        update_every: optimiser steps between two refreshes of the probabilities.
        floor: added to every bin's probability before normalising, so that none starves; with 0 a bin whose loss has
            no slope would never be drawn again.
        uniform_share: share of the draws that stay uniform (0: none, as in the paper; ours). In a small run the loss
            changes faster than a bin that is hardly drawn is seen again: the denoiser forgets it, its loss rises above
            that of later times, and Eq. 5 then never draws it.
    """

    adaptive: bool = True
    num_bins: int = 100
    ema_decay: float = 0.999
    update_every: int = 5000
    floor: float = 1e-6
    uniform_share: float = 0.0

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            num_bins="[1, inf)",
            ema_decay="[0, 1)",
            update_every="[1, inf)",
            floor="(0, inf)",
            uniform_share="[0, 1]",
        )

    def build(self) -> AdaptiveTimestepSampler | UniformTimestepSampler:
        """The sampler that these settings describe."""
        if not self.adaptive:
            return UniformTimestepSampler()
        return AdaptiveTimestepSampler(
            self.num_bins, self.ema_decay, self.update_every, self.floor, self.uniform_share
        )


class UniformTimestepSampler:
    """Draws t uniformly from [0, 1]; the counterpart of [`AdaptiveTimestepSampler`] without state."""

    is_active = False
    updates_until_refresh = None

    def sample(
        self,
        batch_size: int,
        device: str | torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draws `batch_size` times in [0, 1], float32 of shape (batch_size,)."""
        return torch.rand(batch_size, generator=generator).to(device)

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Learns nothing: the draw stays uniform."""

    def cdf(self, timesteps: torch.Tensor) -> torch.Tensor:
        """F(t) = t"""
        return timesteps

    def density(self, timesteps: torch.Tensor) -> torch.Tensor:
        """f(t) = 1"""
        return torch.ones_like(timesteps)

    def quantile(self, probabilities: torch.Tensor) -> torch.Tensor:
        """F^-1(u) = u"""
        return probabilities

    def learned_cdf(self) -> list[float] | None:
        """None: nothing is learned."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            raise ValueError(
                "This state belongs to an adaptive timestep sampler, but the run samples uniformly "
                "(timestep_sampler.adaptive=false). Resume with the settings that the run was started with."
            )


class AdaptiveTimestepSampler:
    """Draws t in proportion to the slope of the loss, so that in warped time F(t) the loss is a straight line (Eq. 5).

    The edges u_0 .. u_N of N equal bins carry a running estimate of the loss; p_i ∝ max(L(u_{i+1}) - L(u_i), 0) +
    floor. A draw picks a bin by p, then a time in it uniformly. Each observed (t, loss) informs the two edges around
    t in proportion to nearness. An edge's estimate is a ratio of two decayed sums, which is free of the start's bias;
    the draw is uniform until every edge has been seen and the first refresh is due.

    In a distributed run, give every rank the gathered pairs of all ranks: then all hold the same probabilities.

    The arguments are those of [`TimestepSamplerSettings`]; an optimiser step is a call of
    [`~AdaptiveTimestepSampler.update`].
    """

    def __init__(
        self,
        num_bins: int = 100,
        ema_decay: float = 0.999,
        update_every: int = 5000,
        floor: float = 1e-6,
        uniform_share: float = 0.0,
    ):
        TimestepSamplerSettings(True, num_bins, ema_decay, update_every, floor, uniform_share)  # checks the ranges
        self.num_bins = num_bins
        self.ema_decay = ema_decay
        self.update_every = update_every
        self.floor = floor
        self.uniform_share = uniform_share
        self.num_updates = 0
        self.is_active = False
        self.probabilities = torch.full((num_bins,), 1 / num_bins, dtype=torch.float64)
        self._weighted_losses = torch.zeros(num_bins + 1, dtype=torch.float64)
        self._weights = torch.zeros(num_bins + 1, dtype=torch.float64)

    @property
    def edges(self) -> torch.Tensor:
        """u_0 .. u_N, float64 of shape (num_bins + 1,)."""
        return torch.linspace(0, 1, self.num_bins + 1, dtype=torch.float64)

    @property
    def edge_losses(self) -> torch.Tensor:
        """Running loss estimate at each edge, float64 of shape (num_bins + 1,); NaN where no time was near yet."""
        return self._weighted_losses / self._weights

    @property
    def updates_until_refresh(self) -> int:
        """Calls of `update` until the probabilities change; before that, draws do not depend on them."""
        return self.update_every - self.num_updates % self.update_every

    def sample(
        self,
        batch_size: int,
        device: str | torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draws `batch_size` times in [0, 1], float32 of shape (batch_size,)."""
        uniform = torch.rand(batch_size, dtype=torch.float64, generator=generator)
        return self.quantile(uniform).float().to(device)

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Takes in the diffusion losses (n,) of one optimiser step at times (n,) in [0, 1].

        Refreshes the probabilities every `update_every` calls. Pairs that are not finite are left out.
        """
        if timesteps.shape != losses.shape or timesteps.ndim != 1:
            raise ValueError(
                f"timesteps of shape {tuple(timesteps.shape)} and losses of shape {tuple(losses.shape)} must be pairs."
            )
        timesteps, losses = timesteps.detach().double().cpu(), losses.detach().double().cpu()
        finite = torch.isfinite(losses) & torch.isfinite(timesteps)
        timesteps, losses = timesteps[finite], losses[finite]
        left, nearness_right = self._bins(timesteps)
        self._weighted_losses *= self.ema_decay
        self._weights *= self.ema_decay
        for edge, nearness in ((left, 1 - nearness_right), (left + 1, nearness_right)):
            self._weighted_losses.index_add_(0, edge, (1 - self.ema_decay) * nearness * losses)
            self._weights.index_add_(0, edge, (1 - self.ema_decay) * nearness)
        self.num_updates += 1
        if self.num_updates % self.update_every == 0:
            self._refresh()

    def _refresh(self) -> None:
        """Eq. 5, once every edge has an estimate."""
        if not torch.all(self._weights > 0):
            return
        slopes = self.edge_losses.diff().clamp(min=0) + self.floor
        self.probabilities = torch.lerp(
            slopes / slopes.sum(), torch.full_like(slopes, 1 / self.num_bins), self.uniform_share
        )
        self.is_active = True

    def _bins(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bin of each time, and where in it the time lies, in [0, 1]."""
        position = timesteps.clamp(0, 1) * self.num_bins
        left = position.floor().clamp(max=self.num_bins - 1).long()
        return left, position - left

    def _cumulative(self) -> torch.Tensor:
        """F at the edges: from exactly 0 to exactly 1."""
        cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), self.probabilities.cumsum(0)])
        cumulative[-1] = 1.0
        return cumulative

    def cdf(self, timesteps: torch.Tensor) -> torch.Tensor:
        """F(t), piecewise linear: the warped time in [0, 1] in which the loss should be a straight line (Fig. 5)."""
        left, within = self._bins(timesteps.double())
        cumulative = self._cumulative()
        return torch.lerp(cumulative[left], cumulative[left + 1], within).to(timesteps.dtype)

    def learned_cdf(self) -> list[float] | None:
        """F at the edges of the bins, as a scheduler's `timestep_cdf`; None while the draw is uniform."""
        return [round(u, 6) for u in self.cdf(self.edges).tolist()] if self.is_active else None

    def density(self, timesteps: torch.Tensor) -> torch.Tensor:
        """f(t) = dF/dt, constant within a bin: dividing a draw by it makes the mean over draws one over uniform t."""
        left, _ = self._bins(timesteps.double())
        return (self.num_bins * self.probabilities[left]).to(timesteps.dtype)

    def quantile(self, probabilities: torch.Tensor) -> torch.Tensor:
        """F^-1(u): the time below which a share u in [0, 1] of the draws falls."""
        cumulative = self._cumulative()
        uniform = probabilities.double().clamp(0, 1)
        left = torch.searchsorted(cumulative, uniform, right=True).clamp(1, self.num_bins) - 1
        within = (uniform - cumulative[left]) / (cumulative[left + 1] - cumulative[left])
        return ((left + within.clamp(0, 1)) / self.num_bins).to(probabilities.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on with the same draws."""
        return {
            "num_bins": self.num_bins,
            "num_updates": self.num_updates,
            "is_active": self.is_active,
            "probabilities": self.probabilities.clone(),
            "weighted_losses": self._weighted_losses.clone(),
            "weights": self._weights.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of another sampler; ValueError unless it has as many bins."""
        if state_dict.get("num_bins") != self.num_bins:
            raise ValueError(
                f"This state is of a timestep sampler with num_bins={state_dict.get('num_bins')}, not "
                f"{self.num_bins}; resume with the settings that the run was started with."
            )
        self.num_updates = int(state_dict["num_updates"])
        self.is_active = bool(state_dict["is_active"])
        self.probabilities = state_dict["probabilities"].clone().double()
        self._weighted_losses = state_dict["weighted_losses"].clone().double()
        self._weights = state_dict["weights"].clone().double()
