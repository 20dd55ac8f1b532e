"""The frontier of quality and diversity: Gen. PPL against entropy over the number of steps (Fig. 1)."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.result_files import finish_perplexity
from figures.style import run_style
from ldlm_hf.hub.training_curves import WIDTH


# square points of the marker of the slowest set, and of one that takes no time
LARGEST_MARKER, SMALLEST_MARKER = 260.0, 24.0


def pareto_frontier(points: list[tuple[float, float]]) -> list[int]:
    """Which of the points (perplexity, entropy) no other beats, by entropy.

    A point beats another if its perplexity is not higher and its entropy not lower, and one of the two is better.
    """
    frontier: list[int] = []
    best_perplexity = float("inf")
    # by falling entropy, then rising perplexity: a point is on the frontier if it is better than all before it
    for index in sorted(range(len(points)), key=lambda index: (-points[index][1], points[index][0])):
        if points[index][0] < best_perplexity or (frontier and points[index] == points[frontier[-1]]):
            best_perplexity = points[index][0]
            frontier.append(index)
    return frontier[::-1]


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
    draw_real_text(axes, results)
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


def draw_real_text(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Each real text of the results once."""
    drawn: set[tuple[float, float]] = set()
    for one in results:
        point = one["real_text"]["entropy"], one["real_text"]["generative_perplexity"]
        if point not in drawn and None not in point:
            axes.scatter(*point, marker="*", s=160, color="black", zorder=4, label=None if drawn else "real text")
            drawn.add(point)
