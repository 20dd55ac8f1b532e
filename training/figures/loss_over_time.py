"""The held-out diffusion loss over the time that a run samples uniformly, and how straight it is (Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from figures.logged_runs import LoggedRun
from ldlm_hf.hub.training_curves import GRID_PREFIX, grid_points


CDF_PREFIX = "eval/timestep_cdf/t="
WARPED_PREFIX = "eval/warped_diffusion_loss/u="
# a straight line fits any two points
MIN_POINTS = 3


@dataclass(frozen=True)
class LossOverTime:
    """A held-out diffusion loss over the time that a run samples uniformly, and that run's F(t)."""

    variable: str  # `t`, or `u` for the warped time u = F(t)
    times: np.ndarray  # (G,), increasing
    losses: np.ndarray  # (G,)
    grid: np.ndarray  # t from 0 to 1
    cdf: np.ndarray  # F(t) there; t itself where it was drawn uniformly
    steps: tuple[int, ...]  # of the evaluations that it is the mean of

    @cached_property
    def line(self) -> np.ndarray:
        """Slope and intercept of the least-squares straight line."""
        return np.polyfit(self.times, self.losses, 1)

    @cached_property
    def deviation(self) -> float:
        """Root mean square distance from that line, as a share of the range (largest − smallest loss)."""
        distances = self.losses - np.polyval(self.line, self.times)
        # a constant curve is a straight line, and has no range to divide by
        return float(np.sqrt(np.mean(distances**2))) / (float(np.ptp(self.losses)) or 1.0)


def loss_over_time(run: LoggedRun, count: int) -> LossOverTime | None:
    """The mean of the last `count` evaluations; None where it has too few points or one that is not finite.

    ValueError where the run has not as many evaluations over the same times at its end.
    """
    evaluations = last_evaluations(run, count)
    variable = "t"
    times, losses = mean_points(run, evaluations, GRID_PREFIX)
    grid = cdf = times
    if grid_points(evaluations[-1], CDF_PREFIX):
        variable = "u"
        grid, cdf = mean_points(run, evaluations, CDF_PREFIX)
        times, losses = mean_points(run, evaluations, WARPED_PREFIX)
    if len(times) < MIN_POINTS or not np.isfinite(losses).all():
        return None
    steps = tuple(record["step"] for record in evaluations)
    return LossOverTime(variable, times, losses, np.append(0.0, grid), np.append(0.0, cdf), steps)


def last_evaluations(run: LoggedRun, count: int) -> list[dict[str, Any]]:
    """The last `count` evaluations; ValueError where these have not the same keys of losses over time."""
    evaluations = run.evaluations[-count:]
    prefixes = (GRID_PREFIX, CDF_PREFIX, WARPED_PREFIX)
    keys = {tuple(key for key in record if key.startswith(prefixes)) for record in evaluations}
    if len(evaluations) < count or len(keys) > 1:
        raise ValueError(
            f"--last_evaluations {count}: {run.name} has not as many at its end that are over the same times and "
            "with the same kind of sampling; ask for fewer."
        )
    return evaluations


def mean_points(run: LoggedRun, evaluations: Sequence[dict[str, Any]], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Times and the mean over evaluations of what was logged there, float64 of shape (G,) each.

    The log's keys round the times to two digits; they are k / `evaluation.grid_size`.
    """
    values = np.array([[value for _, value in grid_points(record, prefix)] for record in evaluations], np.float64)
    return np.arange(1, values.shape[1] + 1) / run.settings["evaluation.grid_size"], values.mean(0)
