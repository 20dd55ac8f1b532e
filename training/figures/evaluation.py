"""The figures that `evaluate.py` draws beside its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures.over_evaluations import plot_over_evaluations
from figures.pareto import plot_pareto
from figures.smoothness import plot_smoothness
from figures.style import save_figure


def draw_figures(results: dict[str, Any], folder: Path) -> None:
    """Draws what results with a judge have the numbers for; without one there is no perplexity to draw."""
    if results["judge"] is None:
        return
    save_figure(plot_pareto([results]), folder / "pareto")
    if len(results["settings"]["steps"]) > 1:
        save_figure(plot_over_evaluations([results]), folder / "evaluations")
    if results["settings"]["interpolation"] is not None:
        save_figure(plot_smoothness([results]), folder / "interpolation")
