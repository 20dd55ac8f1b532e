"""The paper's figures of training (Fig. 3 middle and right, 5 and 6), from the logs of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from figures.logged_runs import LoggedRun
from figures.loss_over_time import LossOverTime
from figures.style import LEGEND_LINE, legend_below, run_style
from ldlm_hf.hub.training_curves import HELD_OUT_PREFIX, MAX_POINTS, WIDTH, Panel, group_means, label, series
from ldlm_hf.objective.warmup import warmup_gate


STEPS_LABEL = "optimiser step"
LOSS_LABEL = "diffusion loss (MSE of latents)"

# training text on the left, held-out text on the right
PANELS = (
    Panel(LOSS_LABEL, {"diffusion_loss": "Training text, smoothed"}, logarithmic=True),
    Panel(LOSS_LABEL, {"eval/diffusion_loss": "Held-out text, t evenly spaced"}, logarithmic=True),
    Panel("token accuracy (share)", {"token_accuracy": "Training text, noisy latents, smoothed"}),
    Panel("token accuracy (share)", {"eval/reconstruction_accuracy": "Held-out text, clean latents"}),
    Panel("standard deviation of latents", {"latent_std": "Training text, smoothed"}),
    Panel("MSE of hidden states", {"eval/reconstruction_mse": "Held-out text, clean latents"}, logarithmic=True),
)


def moving_mean(steps: Sequence[int], values: Sequence[float], window: int) -> list[float]:
    """Mean of the values whose steps are at most window / 2 away from each step."""
    position, total = np.asarray(steps), np.append(0.0, np.cumsum(values, dtype=np.float64))
    first = np.searchsorted(position, position - window / 2, side="left")
    behind = np.searchsorted(position, position + window / 2, side="right")
    return ((total[behind] - total[first]) / (behind - first)).tolist()


def plot_training(runs: Sequence[LoggedRun], window: int) -> Figure:
    """Diffusion loss, decoder accuracy and scale of the latents over steps, one curve a run (Fig. 3 middle, right).

    Curves of training text are moving means over `window` steps, with what was logged as a faint line behind them.
    What no run has logged has no panel.
    """
    panels = [panel for panel in PANELS if any(series(run.log, key)[0] for run in runs for key in panel.curves)]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, 2.7 * rows + 0.3 + LEGEND_LINE * len(runs)), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, 2, number)
        [(key, title)] = panel.curves.items()
        for place, run in enumerate(runs):
            draw_curve(axes, run, key, run_style(place), window)
        axes.set_title(title, fontsize="medium")
        if panel.logarithmic:
            axes.set_yscale("log")
            # 0.2 rather than 2 × 10^-1
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, 1.02 * max(run.last_step for run in runs))
        count_steps(axes)
        label(axes, STEPS_LABEL, panel.label)
    legend_below(figure, {place: run.name for place, run in enumerate(runs)})
    return figure


def draw_curve(axes: Axes, run: LoggedRun, key: str, style: dict[str, Any], window: int) -> None:
    """What a run has logged under a key, if anything; of training text smoothed, and faintly as it is."""
    steps, values = series(run.log, key)
    if key.startswith(HELD_OUT_PREFIX):
        axes.plot(steps, values, **style, linewidth=1.4, markersize=4)
    elif steps:
        axes.plot(group_means(steps), group_means(values), color=style["color"], alpha=0.25, linewidth=0.8)
        axes.plot(steps, moving_mean(steps, values, window), **style | {"marker": None}, linewidth=1.4)


def count_steps(axes: Axes) -> None:
    """A few whole numbers along the horizontal axis."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def plot_loss_over_time(runs: Sequence[LoggedRun], curves: Mapping[str, LossOverTime]) -> Figure:
    """The held-out diffusion loss over t and over u = F(t), each with its straight line, and times and F (Fig. 5)."""
    titles = {"t": "Uniform sampling", "u": "Adaptive sampling"}
    x_labels = {"t": "time t (0: clean, 1: noise)", "u": "warped time u = F(t)"}
    variables = [name for name in titles if any(curve.variable == name for curve in curves.values())]
    figure = Figure(figsize=(WIDTH, 3.5 + LEGEND_LINE * len(curves)), layout="constrained")
    *loss_axes, cdf_axes = figure.subplots(1, len(variables) + 1)
    labels = {}
    for place, run in enumerate(runs):
        if run.name in curves:
            curve, style = curves[run.name], run_style(place)
            axes = loss_axes[variables.index(curve.variable)]
            axes.plot([0, 1], np.polyval(curve.line, [0, 1]), **style | {"marker": None}, linewidth=1.2)
            axes.plot(curve.times, curve.losses, **style | {"linestyle": ""}, markersize=4)
            cdf_axes.plot(curve.grid, curve.cdf, **style, markersize=3, linewidth=1.2)
            labels[place] = f"{run.name} ({curve.deviation:.1%})"
    for axes, variable in zip(loss_axes, variables, strict=True):
        axes.set_title(titles[variable], fontsize="medium")
        label(axes, x_labels[variable], f"held-out {LOSS_LABEL}")
    cdf_axes.set_title("Share of the draws below t", fontsize="medium")
    label(cdf_axes, x_labels["t"], "F(t)")
    legend_below(figure, labels)
    return figure


def plot_warmup(runs: Sequence[LoggedRun]) -> Figure:
    """gamma(s) of each run's warmup settings, and the logged gate as points (Fig. 6)."""
    longest = max(run.warmup[0] for run in runs)
    end = max(run.last_step for run in runs)
    end = min(end, round(1.15 * longest)) if longest else end
    curve = sorted({round(step) for step in np.linspace(0, end, MAX_POINTS)})
    figure = Figure(figsize=(WIDTH * 0.7, 4.0), layout="constrained")
    axes = figure.add_subplot()
    # runs of the same warmup share a curve: they would hide one another
    alike: dict[tuple[int, float, float], list[int]] = {}
    for place, run in enumerate(runs):
        alike.setdefault(run.warmup, []).append(place)
    for warmup, places in alike.items():
        style = run_style(places[0])
        axes.plot(curve, [warmup_gate(step, *warmup) for step in curve], **style | {"marker": None}, linewidth=1.4)
        for place in places:
            steps, gates = series(runs[place].log, "gate")
            # a line that is written after s steps holds the last one's, gamma(s - 1)
            before = [step - 1 for step in steps]
            axes.plot(before, gates, **style | {"linestyle": ""}, markersize=4, markevery=0.05)
    axes.set_xlim(0, end)
    count_steps(axes)
    label(axes, f"{STEPS_LABEL} s", "gate γ(s) (share of the gradient)")
    legend_below(figure, {places[0]: ", ".join(runs[place].name for place in places) for places in alike.values()})
    return figure
