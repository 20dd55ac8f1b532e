"""Whole numbers of whatever type."""

from __future__ import annotations

import numbers
import operator
from typing import Any


def whole_number(value: Any) -> int | None:
    """A whole number as an int, be it one of numpy's or of torch's, or the 4.0 of a form; None for everything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        is_whole = isinstance(value, numbers.Real) and float(value).is_integer()
        return int(float(value)) if is_whole else None
