"""The figures of what `evaluate.py` measures (Fig. 1, and 3 left)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from figures.style import run_style, save_figure
from ldlm_hf.hub.training_curves import WIDTH, label_with_legend
from ldlm_hf.metrics.registry import MAIN_COLUMNS


# square points of the marker of the slowest set, and of one that takes no time
LARGEST_MARKER, SMALLEST_MARKER = 260.0, 24.0


def draw_figures(results: dict[str, Any], folder: Path) -> None:
    """Draws what results with a judge have the numbers for; without one there is no perplexity to draw."""
    if results["judge"] is None:
        return
    save_figure(plot_pareto([results]), folder / "pareto")
    if len(results["settings"]["steps"]) > 1:
        save_figure(plot_over_evaluations([results]), folder / "evaluations")
    if results["settings"]["interpolation"] is not None:
        save_figure(plot_smoothness([results]), folder / "interpolation")


def pareto_frontier(points: list[tuple[float, float]]) -> list[int]:
    """Which of the points (perplexity, entropy) no other beats, by entropy.

    A point beats another if its perplexity is not higher and its entropy not lower, and one of the two is better.
    """
    frontier = [
        index
        for index, (perplexity, entropy) in enumerate(points)
        if not any(p <= perplexity and e >= entropy and (p, e) != (perplexity, entropy) for p, e in points)
    ]
    return sorted(frontier, key=lambda index: points[index][1])


def plot_pareto(results: list[dict[str, Any]]) -> Figure:
    """Means over seeds, their standard deviations as bars, number of steps beside each; real text as a star.

    The line joins the sets of a pipeline that none of its others beats; beaten ones are hollow. The area of a marker
    grows with the seconds that sampling took. Sets without a perplexity have no place; the title counts them.
    """
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    axes = figure.add_subplot()
    entries = [entry for one in results for entry in one["pipelines"]]
    slowest = max(one["mean"]["seconds"] for entry in entries for one in entry["sets"])
    num_missing = 0
    for place, entry in enumerate(entries):
        sets = [one for one in entry["sets"] if one["mean"]["generative_perplexity"] is not None]
        num_missing += len(entry["sets"]) - len(sets)
        draw_sets(axes, entry["name"], sets, run_style(place), slowest)
    real = dict.fromkeys((one["real_text"]["entropy"], one["real_text"]["generative_perplexity"]) for one in results)
    for number, point in enumerate(point for point in real if None not in point):
        axes.scatter(*point, marker="*", s=160, color="black", zorder=4, label=None if number else "real text")
    axes.margins(0.08)
    finish_perplexity(axes, results, "entropy (nats)")
    axes.set_title(
        f"Number: denoising steps. Area: seconds of sampling (largest: {slowest:,.1f} s a set). "
        "Hollow: beaten by another number of steps."
        + (f"\nNot shown, since a seed has no text to score: {num_missing}." if num_missing else ""),
        fontsize="small",
        loc="left",
    )
    return figure


def draw_sets(axes: Axes, name: str, sets: list[dict[str, Any]], style: dict[str, Any], slowest: float) -> None:
    """The sets of a pipeline and their frontier; `slowest` is the most seconds of all pipelines' sets."""
    points = [(one["mean"]["generative_perplexity"], one["mean"]["entropy"]) for one in sets]
    frontier = pareto_frontier(points)
    axes.plot(
        [points[index][1] for index in frontier],
        [points[index][0] for index in frontier],
        linewidth=1.2,
        **(style | {"marker": ""}),
    )
    axes.plot([], [], label=name, markersize=6, **style)
    for index, one in enumerate(sets):
        perplexity, entropy = points[index]
        axes.errorbar(
            entropy,
            perplexity,
            xerr=one["std"]["entropy"],
            yerr=one["std"]["generative_perplexity"],
            color=style["color"],
            linewidth=0.8,
        )
        axes.scatter(
            entropy,
            perplexity,
            s=SMALLEST_MARKER + (LARGEST_MARKER - SMALLEST_MARKER) * one["mean"]["seconds"] / max(slowest, 1e-9),
            marker=style["marker"],
            facecolor=style["color"] if index in frontier else "white",
            edgecolor=style["color"],
            alpha=0.8,
            zorder=3,
        )
        axes.annotate(
            f"{one['steps']:,}", (entropy, perplexity), xytext=(7, 5), textcoords="offset points", fontsize="small"
        )


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


def plot_smoothness(results: list[dict[str, Any]]) -> Figure:
    """One curve a pipeline, its roughness in the legend; ValueError where no pipeline of the results has lines."""
    figure = Figure(figsize=(WIDTH * 0.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    entries = [entry for one in results for entry in one["pipelines"] if "interpolation" in entry]
    if not entries:
        raise ValueError("None of the results has an interpolation: evaluate with --interpolation.")
    for place, entry in enumerate(entries):
        curve = entry["interpolation"]
        # a position without a score is a gap
        perplexities = [float("nan") if value is None else value for value in curve["generative_perplexity"]]
        roughness = "not measured" if curve["roughness"] is None else f"{curve['roughness']:+.3f} nats a token"
        axes.plot(
            curve["positions"],
            perplexities,
            markersize=4,
            linewidth=1.4,
            label=f"{entry['name']} (roughness {roughness})",
            **run_style(place),
        )
    finish_perplexity(axes, results, "position between two real texts")
    return figure


def finish_perplexity(axes: Axes, results: list[dict[str, Any]], x_label: str) -> None:
    """Generative perplexity up, on a logarithmic axis with plain numbers; labels and legend."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    judge = results[0]["judge"]["name"].rpartition("/")[2]
    label_with_legend(axes, x_label, f"Gen. PPL under {judge}")
