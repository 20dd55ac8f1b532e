"""Tables of the reports that scripts write."""

from __future__ import annotations

import re
from collections.abc import Sequence


def cell(mean: float | None, std: float | None, digits: int) -> str:
    """12.3 ± 0.4; a dash was not measured."""
    if mean is None:
        return "–"
    return f"{mean:,.{digits}f}" + ("" if std is None else f" ± {std:,.{digits}f}")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def human_count(number: float) -> str:
    """1234567 → '1.2M'"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return re.sub(r"\.0$", "", f"{number / size:.1f}") + unit
    return f"{number:g}"
