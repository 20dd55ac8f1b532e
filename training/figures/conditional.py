"""The figure of `evaluate.py --task continuation|infilling`: what guidance buys, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from figures.style import legend_below, run_style, save_figure
from ldlm_hf.hub.training_curves import WIDTH, label


PANELS = {
    "perplexity": "perplexity where given",
    "mauve": "MAUVE",
    "entropy": "entropy (nats)",
    "rouge_l": "ROUGE-L",
}


def draw_guidance(results: dict[str, Any], folder: Path) -> None:
    """Draws the scores over guidance, where there are several weights and a judge."""
    weights = {one["guidance_scale"] for entry in results["pipelines"] for one in entry["sets"]}
    if results["judge"] is not None and len(weights) > 1:
        save_figure(plot_guidance(results), folder / "guidance")


def plot_guidance(results: dict[str, Any]) -> Figure:
    """Means over seeds with their standard deviations over the weight v, a panel a score, a line a pipeline, number of
    steps and what it is told; one without guidance has a level line, and real text a dotted one."""
    panels = [name for name in PANELS if results["real_text"][name] is not None]
    lines: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for entry in results["pipelines"]:
        for one in sorted(entry["sets"], key=lambda one: one["guidance_scale"]):
            lines.setdefault((entry["name"], one["steps"], one["told"]), []).append(one)
    labels = [f"{name}, {steps} steps, told {told}" for name, steps, told in lines]
    num_rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(WIDTH, 2.6 * num_rows + 0.2 * len(lines)), layout="constrained")
    grid = figure.subplots(num_rows, 2, squeeze=False).flatten()
    for axes, name in zip(grid, panels, strict=False):
        if name != "rouge_l":  # likeness to itself
            axes.axhline(results["real_text"][name], color="0.4", linestyle=":")
        for place, sets in enumerate(lines.values()):
            # blank texts have no perplexity
            means = [math.nan if one["mean"][name] is None else one["mean"][name] for one in sets]
            if len(sets) == 1:
                axes.axhline(means[0], color=run_style(place)["color"])
            else:
                errors = [one["std"][name] or 0.0 for one in sets]
                axes.errorbar([one["guidance_scale"] for one in sets], means, errors, **run_style(place))
        label(axes, "weight of what is given, v", PANELS[name])
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    legend_below(figure, dict(enumerate(labels)))
    return figure
