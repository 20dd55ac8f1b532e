"""Scores over the number of evaluations of the denoiser (NFE), a curve a pipeline and sampler, real text as a line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import run_style
from ldlm_hf.hub.training_curves import WIDTH
from ldlm_hf.metrics.registry import MAIN_COLUMNS


def plot_over_evaluations(results: list[dict[str, Any]]) -> Figure:
    """Means over seeds with their standard deviations; what was not measured has no panel."""
    entries = [entry for one in results for entry in one["pipelines"]]
    measured = {
        name: score
        for name, score in MAIN_COLUMNS.items()
        if any(one["mean"].get(name) is not None for entry in entries for one in entry["sets"])
    }
    num_rows = (len(measured) + 1) // 2
    figure = Figure(figsize=(WIDTH, 3.2 * num_rows + 0.3 * len(entries)), layout="constrained")
    panels = figure.subplots(num_rows, 2, squeeze=False).flatten()
    for axes, (name, score) in zip(panels, measured.items(), strict=False):
        for place, entry in enumerate(entries):
            draw_curve(axes, entry["sets"], name, label=entry["name"], markersize=4, linewidth=1.2, **run_style(place))
        for value in {one["real_text"].get(name) for one in results} - {None}:
            axes.axhline(value, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="evaluations of the denoiser (NFE)", ylabel=score.heading)
        if score.is_logarithmic:
            axes.set_yscale("log")
        ticks = sorted({one["nfe"] for entry in entries for one in entry["sets"]})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
        axes.minorticks_off()
    for axes in panels[len(measured) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small")
    figure.suptitle("Dotted: real text. Bars: standard deviation over seeds.", fontsize="small", x=0.01, ha="left")
    return figure


def draw_curve(axes: Axes, sets: Iterable[dict[str, Any]], score: str, **style: Any) -> None:
    """Means of a score over the evaluations of the sets that have it, with standard deviations."""
    measured = sorted((one for one in sets if one["mean"].get(score) is not None), key=lambda one: one["nfe"])
    axes.errorbar(
        [one["nfe"] for one in measured],
        [one["mean"][score] for one in measured],
        yerr=[one["std"][score] or 0 for one in measured],
        **style,
    )
