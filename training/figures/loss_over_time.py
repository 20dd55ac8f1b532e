"""The held-out diffusion loss over the time that a run samples uniformly, and how straight it is (Fig. 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from figures.logged_runs import LoggedRun, NotLoggedError, differing_settings
from ldlm_hf.hub.training_curves import GRID_PREFIX, grid_points


CDF_PREFIX = "eval/timestep_cdf/t="
WARPED_PREFIX = "eval/warped_diffusion_loss/u="
# a straight line fits any two points
MIN_POINTS = 3


@dataclass(frozen=True)
class Deviation:
    """How far a curve is from its least-squares straight line, as shares of its range (largest − smallest value).

    `scatter` is how much of `rms` noise from point to point would make: sqrt(mean((L_{i-1} − 2 L_i + L_{i+1})²) / 6),
    which for independent noise of equal variance on a straight line is its standard deviation.
    """

    slope: float
    intercept: float
    rms: float
    maximum: float
    scatter: float


def line_deviation(times: np.ndarray, losses: np.ndarray) -> Deviation:
    """Deviation of finite losses (G,) at 3 or more times (G,) from a straight line, whatever the loss's unit."""
    centred = times - times.mean()
    slope = float(centred @ losses / (centred @ centred))
    intercept = float(losses.mean() - slope * times.mean())
    distances = np.abs(losses - (slope * times + intercept))
    bends = losses[:-2] - 2 * losses[1:-1] + losses[2:]
    # a constant curve is a straight line, and has no range to divide by
    range_of_curve = float(np.ptp(losses)) or 1.0
    return Deviation(
        slope,
        intercept,
        float(np.sqrt(np.mean(distances**2))) / range_of_curve,
        float(distances.max()) / range_of_curve,
        float(np.sqrt(np.mean(bends**2) / 6)) / range_of_curve,
    )


@dataclass(frozen=True)
class LossOverTime:
    """A held-out diffusion loss over the time that a run samples uniformly."""

    variable: str  # `t`, or `u` for the warped time u = F(t)
    times: np.ndarray  # (G,), increasing
    losses: np.ndarray  # (G,)
    steps: tuple[int, ...]  # of the evaluations that it is the mean of
    is_interpolated: bool = False  # where it was logged over t and F alone, between those times

    @cached_property
    def deviation(self) -> Deviation:
        """From the straight line that fits it best."""
        return line_deviation(self.times, self.losses)


def last_evaluations(run: LoggedRun, count: int) -> list[dict[str, Any]]:
    """The last `count` evaluations of the loss over t; ValueError where fewer have the same keys."""
    evaluations = [record for record in run.evaluations if grid_points(record, GRID_PREFIX)]
    if not evaluations:
        raise NotLoggedError(f"the log of {run.name} has no diffusion loss over t")
    prefixes = (GRID_PREFIX, CDF_PREFIX, WARPED_PREFIX)
    keys = [[[time for time, _ in grid_points(record, prefix)] for prefix in prefixes] for record in evaluations]
    usable = next((place for place, key in enumerate(reversed(keys)) if key != keys[-1]), len(keys))
    if count > usable:
        raise ValueError(
            f"--last_evaluations {count}: {run.name} has {usable} at its end that are over the same times and with "
            f"the same kind of sampling; ask for {usable} at most."
        )
    return evaluations[-count:]


def mean_points(run: LoggedRun, evaluations: Sequence[dict[str, Any]], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Times and the mean over evaluations of what was logged there, float64 of shape (G,) each.

    The log's keys round the times to two digits. Where they agree with k / `evaluation.grid_size`, that is the time.
    """
    points = np.array([grid_points(record, prefix) for record in evaluations], dtype=np.float64)  # (K, G, 2)
    times, values = points[0, :, 0], points[:, :, 1].mean(0)
    exact = np.arange(1, len(times) + 1) / run.settings["evaluation.grid_size"]
    return (exact if np.abs(exact - times).max() < 0.00501 else times), values


def loss_over_t(run: LoggedRun, count: int) -> LossOverTime:
    """The loss over t, whatever the run samples, as the mean of the last `count` evaluations."""
    evaluations = last_evaluations(run, count)
    steps = tuple(record["step"] for record in evaluations)
    return checked(run, LossOverTime("t", *mean_points(run, evaluations, GRID_PREFIX), steps))


def timestep_cdf(run: LoggedRun, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Times from 0 to 1 and F there, of shape (G + 1,) each: the mean of the last `count` evaluations.

    F(t) = t where t was drawn uniformly. NotLoggedError where the adaptive sampler's F was not logged.
    """
    evaluations = last_evaluations(run, count)
    if grid_points(evaluations[-1], CDF_PREFIX):
        times, cdf = mean_points(run, evaluations, CDF_PREFIX)
    elif run.is_adaptive and run.was_active(evaluations[-1]["step"]):
        raise NotLoggedError(
            f"the log of {run.name} has neither the loss over u = F(t) nor F itself; its sampler was at work, so over "
            "t alone nothing can be said"
        )
    else:
        times = cdf = mean_points(run, evaluations, GRID_PREFIX)[0]
    return np.append(0.0, times), np.append(0.0, cdf)


def loss_over_own_time(run: LoggedRun, count: int) -> LossOverTime:
    """The loss over the time that the run samples uniformly: t, or the warped time u = F(t) (Section 5.3)."""
    evaluations = last_evaluations(run, count)
    over_t = loss_over_t(run, count)
    if grid_points(evaluations[-1], WARPED_PREFIX):
        return checked(run, LossOverTime("u", *mean_points(run, evaluations, WARPED_PREFIX), over_t.steps))
    _, cdf = timestep_cdf(run, count)
    if not grid_points(evaluations[-1], CDF_PREFIX):
        return over_t
    # evenly spaced u, as far as the logged times reach: at t = 0 there is no loss to interpolate from
    times = np.arange(1, len(cdf)) / (len(cdf) - 1)
    times = times[times >= cdf[1]]
    losses = np.interp(times, cdf[1:], over_t.losses)
    return checked(run, LossOverTime("u", times, losses, over_t.steps, is_interpolated=True))


def checked(run: LoggedRun, curve: LossOverTime) -> LossOverTime:
    """The curve; raises NotLoggedError if it has too few points or one that is not finite."""
    if len(curve.times) < MIN_POINTS or not np.isfinite(curve.losses).all():
        raise NotLoggedError(
            f"the diffusion loss of {run.name} over {curve.variable} has {np.isfinite(curve.losses).sum()} finite "
            f"values at {len(curve.times)} times; it takes {MIN_POINTS}, and all of them finite"
        )
    return curve


def largest_fall(losses: np.ndarray) -> float:
    """How far the loss lies at most below what it was at an earlier time, as a share of its range."""
    return float((np.maximum.accumulate(losses) - losses).max()) / (float(np.ptp(losses)) or 1.0)


@dataclass(frozen=True)
class Comparison:
    """The deviation of an adaptive run over u, as a share of that of a uniform run over t (Fig. 5)."""

    adaptive: str
    uniform: str
    rms: float
    maximum: float
    other_settings: list[str]  # keys in which the runs differ beside the sampler's


def compare_sampling(runs: Sequence[LoggedRun], curves: Mapping[str, LossOverTime]) -> list[Comparison]:
    """Each adaptive run that has a curve beside the uniform ones least different from it in the other settings."""
    measured = [run for run in runs if run.name in curves]
    comparisons = []
    # a run that is set to sample adaptively and has not begun to is neither
    for run in (run for run in measured if curves[run.name].variable == "u"):
        others = {
            other.name: [key for key in differing_settings([run, other]) if not key.startswith("timestep_sampler.")]
            for other in measured
            if not other.is_adaptive
        }
        fewest = min(map(len, others.values()), default=0)
        for name, keys in others.items():
            if len(keys) == fewest:
                ours, theirs = curves[run.name].deviation, curves[name].deviation
                ratios = (ratio(ours.rms, theirs.rms), ratio(ours.maximum, theirs.maximum))
                comparisons.append(Comparison(run.name, name, *ratios, keys))
    return comparisons


def ratio(value: float, of: float) -> float:
    """value / of; infinite where that is 0."""
    return value / of if of else math.inf
