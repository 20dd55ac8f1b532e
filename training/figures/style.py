"""How figures look, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldlm_hf.hub.training_curves import save_png


# the colours of Okabe and Ito that show on white, which readers with any colour vision tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
FILLS = ("full", "none", "left", "top")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# inches of a figure's height that a line of its legend takes
LEGEND_LINE = 0.2


def save_figure(figure: Figure, file: Path) -> None:
    """Writes a figure as `file`.png, whether or not `file` has that ending; it changes only where the figure does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # all colours: fewer would make one of two runs' similar ones
    save_png(figure, file.with_name(file.name.removesuffix(".png") + ".png"), colours=None)


def run_style(place: int) -> dict[str, Any]:
    """Colour, line and marker of the run at a place; line and filling tell apart what shares a colour."""
    turn, place = divmod(place, len(COLOURS))
    turn %= len(LINES)
    return {"color": COLOURS[place], "linestyle": LINES[turn], "marker": MARKERS[place], "fillstyle": FILLS[turn]}


def legend_below(figure: Figure, labels: Mapping[int, str]) -> None:
    """One legend for all axes: the place of a run's style → its label."""
    handles = [Line2D([], [], label=text, markersize=4, **run_style(place)) for place, text in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize="small")
