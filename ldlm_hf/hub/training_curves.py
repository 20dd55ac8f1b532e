"""A run's log as pictures, for its model card. Needs matplotlib, which the extra `training` installs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError as error:
    raise ImportError(
        "The pictures of a model card need matplotlib, which is not installed: pip install 'ldlm_hf[training]'."
    ) from error


HELD_OUT_PREFIX = "eval/"
GRID_PREFIX = "eval/diffusion_loss/t="
DISTANCE_PREFIX = "eval/distance_to_teacher/steps="
# evaluations that one picture tells apart
MAX_GRID_CURVES = 6
# more points of a curve than this are averaged in groups: they would only blacken the picture
MAX_POINTS = 400
WIDTH = 9.0  # inches
DPI = 100


@dataclass(frozen=True)
class Panel:
    """One pair of axes over the optimiser's steps.

    Attributes:
        label: of the vertical axis, with its unit.
        curves: key of the log → name of the curve.
        logarithmic: whether the vertical axis is.
        limits: of the vertical axis; None fits them to the curves.
    """

    label: str
    curves: dict[str, str]
    logarithmic: bool = False
    limits: tuple[float, float] | None = None


PANELS = (
    Panel(
        "training loss",
        {
            "token_loss": "tokens (nats a token)",
            "hidden_loss": "hidden states (MSE)",
            "diffusion_loss": "diffusion (MSE of latents)",
        },
        logarithmic=True,
    ),
    Panel(
        "token accuracy (share)",
        {
            "token_accuracy": "training text, noisy latents",
            "eval/reconstruction_accuracy": "held-out text, clean latents",
        },
        limits=(-0.03, 1.03),
    ),
    Panel(
        "distillation loss (MSE of latents)",
        {
            "semigroup_loss": "training text, two times",
            "diagonal_loss": "training text, one time",
            "eval/distillation_loss": "held-out text",
        },
        logarithmic=True,
    ),
    Panel("gate (share of the gradient)", {"gate": "diffusion loss → encoder"}, limits=(-0.03, 1.03)),
    Panel("standard deviation of latents", {"latent_std": "training text"}),
)


def plot_training_curves(log: Sequence[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Writes the pictures that a log has the numbers for, as PNG files of less than 100 KB.

    Args:
        log: lines of `metrics.jsonl`.
        folder: where to write them; it exists.

    Returns:
        File → caption of the pictures that were written: losses, token accuracy, gate, scale of the latents and a
        student's distance to its teacher over steps; and the held-out diffusion loss over t, one curve an evaluation.
        The same log gives the same files.
    """
    pictures = {}
    # a figure of its own, not pyplot's: no display, and no settings of the user's
    with matplotlib.style.context("default", after_reset=True):
        panels = panels_of(log)
        if panels:
            save_png(plot_over_steps(log, panels), folder / "training_curves.png")
            labels = ", ".join(panel.label.partition(" (")[0] for panel in panels)
            pictures["training_curves.png"] = f"Over the steps of training: {labels}."
        evaluations = [record for record in log if any(key.startswith(GRID_PREFIX) for key in record)]
        if evaluations:
            save_png(plot_diffusion_loss(evaluations), folder / "diffusion_loss.png")
            pictures["diffusion_loss.png"] = (
                "Held-out diffusion loss over the time t, after several numbers of training steps."
            )
    return pictures


def panels_of(log: Sequence[dict[str, Any]]) -> list[Panel]:
    """The panels that a log has the numbers for."""
    possible = (*PANELS, distance_panel(log))
    return [panel for panel in possible if any(series(log, key)[0] for key in panel.curves)]


def distance_panel(log: Sequence[dict[str, Any]]) -> Panel:
    """How far a student's samples are from its teacher's, a curve a number of steps that distillation has compared."""
    keys = {key for record in log for key in record if key.startswith(DISTANCE_PREFIX)}
    steps = sorted(int(key.removeprefix(DISTANCE_PREFIX)) for key in keys)
    curves = {f"{DISTANCE_PREFIX}{number}": f"{number} step{'s' * (number > 1)}" for number in steps}
    return Panel("distance to the teacher (MSE of latents)", curves, logarithmic=True)


def series(log: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key of the log."""
    points = [(record["step"], record[key]) for record in log if key in record and not record.get("skipped")]
    return [step for step, _ in points], [value for _, value in points]


def grid_points(record: dict[str, Any], prefix: str) -> list[tuple[float, float]]:
    """Times and values of one line of the log: all its keys `prefix` + time, by time."""
    return sorted((float(key[len(prefix) :]), value) for key, value in record.items() if key.startswith(prefix))


def group_means(values: Sequence[float]) -> list[float]:
    """Means of neighbouring values, at most `MAX_POINTS` of them."""
    size = max(1, math.ceil(len(values) / MAX_POINTS))
    return [statistics.fmean(values[first : first + size]) for first in range(0, len(values), size)]


def plot_over_steps(log: Sequence[dict[str, Any]], panels: Sequence[Panel]) -> Figure:
    """One pair of axes a panel, two in a row."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH, 3.0 * rows), layout="constrained")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for key, name in panel.curves.items():
            steps, values = series(log, key)
            if steps:
                marker = "o" if key.startswith(HELD_OUT_PREFIX) else None
                axes.plot(
                    group_means(steps), group_means(values), linewidth=1.2, marker=marker, markersize=4, label=name
                )
        if panel.logarithmic:
            axes.set_yscale("log")
        if panel.limits is not None:
            axes.set_ylim(*panel.limits)
        label_with_legend(axes, "optimiser step", panel.label)
    return figure


def plot_diffusion_loss(evaluations: Sequence[dict[str, Any]]) -> Figure:
    """The held-out diffusion loss over t, for evaluations spread over the run, its first and last among them."""
    places = np.linspace(0, len(evaluations) - 1, min(len(evaluations), MAX_GRID_CURVES)).round().astype(int)
    evaluations = [evaluations[place] for place in places]
    figure = Figure(figsize=(WIDTH * 0.7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"]
    for place, record in enumerate(evaluations):
        grid = grid_points(record, GRID_PREFIX)
        # dark is late; the lightest part of the colour map does not show on white
        shade = 0.9 * (1 - place / max(1, len(evaluations) - 1))
        axes.plot(
            *zip(*grid, strict=True), color=colours(shade), linewidth=1.4, label=f"after step {record['step']:,}"
        )
    axes.set_yscale("log")
    label_with_legend(axes, "time t (0: clean, 1: noise)", "held-out diffusion loss (MSE of latents)")
    return figure


def label_with_legend(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, a faint grid and a legend."""
    label(axes, x_label, y_label)
    axes.legend(fontsize="small", frameon=False)


def label(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels and a faint grid."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save_png(figure: Figure, file: Path, colours: int | None = 64) -> None:
    """Writes a PNG without metadata, which changes only where the picture does, of few `colours` or all (None)."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if colours is not None:
        image = image.quantize(colours, dither=Image.Dither.NONE)
    image.save(file, optimize=True)
