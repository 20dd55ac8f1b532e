"""The paper's figures of training (Fig. 3 middle and right, 5 and 6), from the logs of runs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from figures.logged_runs import LoggedRun, logged_gate
from figures.loss_over_time import LossOverTime
from figures.style import run_style
from ldlm_hf.hub.training_curves import HELD_OUT_PREFIX, MAX_POINTS, WIDTH, Panel, group_means, label, series
from ldlm_hf.objective.warmup import warmup_gate


# points of the logged gate that are drawn of each run
MAX_GATE_POINTS = 24
# characters of a legend to an inch of a figure's width
LEGEND_DENSITY = 11
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


def training_panels(runs: Sequence[LoggedRun]) -> list[Panel]:
    """The panels of Figure 3 that at least one log has a curve for."""
    return [panel for panel in PANELS if any(series(run.log, key)[0] for run in runs for key in panel.curves)]


def plot_training(runs: Sequence[LoggedRun], window: int) -> Figure:
    """Diffusion loss, decoder accuracy and scale of the latents over steps, one curve a run (Fig. 3 middle, right).

    Curves of training text are moving means over `window` steps, with what was logged as a faint line behind them.
    """
    panels = training_panels(runs)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, 2.7 * rows + 0.5), layout="constrained")
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
        every = max(1, len(steps) // MAX_POINTS)
        smooth = moving_mean(steps, values, window)
        style = style | {"marker": None}
        axes.plot(group_means(steps), group_means(values), color=style["color"], alpha=0.25, linewidth=0.8)
        axes.plot([*steps[::every], steps[-1]], [*smooth[::every], smooth[-1]], **style, linewidth=1.4)


def count_steps(axes: Axes) -> None:
    """A few whole numbers along the horizontal axis."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def legend_below(figure: Figure, names: Mapping[int, str]) -> None:
    """One legend for all axes: the place of a run's style → its name."""
    axes = figure.axes[0]
    handles = [axes.plot([], [], **run_style(place), linewidth=1.4, markersize=4)[0] for place in names]
    width = round(LEGEND_DENSITY * figure.get_figwidth())
    labels = [textwrap.fill(name, width) for name in names.values()]
    columns = max(1, min(len(labels), width // (max(map(len, labels)) + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def plot_loss_over_time(
    runs: Sequence[LoggedRun],
    curves: Mapping[str, LossOverTime],
    cdfs: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Figure:
    """The held-out diffusion loss over t and over u = F(t), each with its straight line, and times and F (Fig. 5)."""
    titles = {"t": "Uniform sampling", "u": "Adaptive sampling"}
    x_labels = {"t": "time t (0: clean, 1: noise)", "u": "warped time u = F(t)"}
    variables = [name for name in titles if any(curve.variable == name for curve in curves.values())]
    labels = {run.name: textwrap.fill(run.name, 40) for run in runs}
    # the axes stay as high as they are however long the legends below them are
    rows = sum(name.count("\n") + 2 for name in labels.values())
    figure = Figure(figsize=(WIDTH, 3.8 + 0.17 * rows), layout="constrained")
    *loss_axes, cdf_axes = figure.subplots(1, len(variables) + 1, squeeze=False)[0]
    ends = np.array([0.0, 1.0])
    for axes, variable in zip(loss_axes, variables, strict=True):
        for place, run in enumerate(runs):
            curve = curves.get(run.name)
            if curve is not None and curve.variable == variable:
                line, style = curve.deviation, run_style(place)
                name = f"{labels[run.name]}\n(RMS {line.rms:.1%}, maximum {line.maximum:.1%})"
                axes.plot(ends, line.intercept + line.slope * ends, **style | {"marker": None}, linewidth=1.2)
                axes.plot(curve.times, curve.losses, **style | {"linestyle": ""}, markersize=4, label=name)
        axes.set_title(titles[variable], fontsize="medium")
        label(axes, x_labels[variable], f"held-out {LOSS_LABEL}")
    for place, run in enumerate(runs):
        if run.name in cdfs:
            style = run_style(place)
            cdf_axes.plot(*cdfs[run.name], **style, markersize=3, linewidth=1.2, label=labels[run.name])
    cdf_axes.set_title("Share of the draws below t", fontsize="medium")
    label(cdf_axes, x_labels["t"], "F(t)")
    for axes in (*loss_axes, cdf_axes):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False, fontsize="small")
    return figure


def plot_warmup(runs: Sequence[LoggedRun]) -> Figure:
    """gamma(s) of each run's warmup settings, and the logged gate as points (Fig. 6)."""
    longest = max(run.warmup[0] for run in runs)
    end = max(run.last_step for run in runs)
    end = min(end, round(1.15 * longest)) if longest else end
    curve = sorted({round(step) for step in np.linspace(0, end, MAX_POINTS)})
    figure = Figure(figsize=(WIDTH * 0.7, 4.0), layout="constrained")
    axes = figure.add_subplot()
    # runs of the same warmup share a curve, which would hide one another
    names: dict[int, str] = {}
    places = {run.warmup: place for place, run in reversed(list(enumerate(runs)))}
    for warmup, place in sorted(places.items(), key=lambda item: item[1]):
        alike = [run for run in runs if run.warmup == warmup]
        style = run_style(place)
        axes.plot(curve, [warmup_gate(step, *warmup) for step in curve], **style | {"marker": None}, linewidth=1.4)
        for run in alike:
            points = [point for point in logged_gate(run) if point[0] <= end]
            shown = np.reshape(points[:: max(1, len(points) // MAX_GATE_POINTS)], (-1, 2))
            axes.plot(shown[:, 0], shown[:, 1], **style | {"linestyle": ""}, markersize=4)
        names[place] = ", ".join(run.name for run in alike)
    count_steps(axes)
    label(axes, f"{STEPS_LABEL} s", "gate γ(s) (share of the gradient)")
    legend_below(figure, names)
    return figure
