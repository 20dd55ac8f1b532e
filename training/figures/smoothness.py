"""Smoothness of latent spaces: Gen. PPL along lines between the latents of real texts (Fig. 3, left)."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.result_files import finish_perplexity
from figures.style import run_style
from ldlm_hf.hub.training_curves import WIDTH


def plot_smoothness(results: list[dict[str, Any]]) -> Figure:
    """One curve a pipeline; its roughness in the legend.

    Raises:
        ValueError: no pipeline of the results has lines.
    """
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
    pairs = sorted({entry["interpolation"]["num_pairs"] for entry in entries})
    counts = ", ".join(f"{count:,}" for count in pairs)
    finish_perplexity(axes, results, f"position between two real texts ({counts} pairs)")
    return figure
