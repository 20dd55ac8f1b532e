"""Checks of the arguments that constructors and functions are called with; each error names argument and value."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin, get_type_hints


def check_settings(
    constructor: Callable[..., None], settings: Mapping[str, Any], **ranges: str | tuple[Any, ...]
) -> None:
    """Raises ValueError where a value has not the type that the constructor declares, is no finite number, or lies
    outside of its range.

    Args:
        constructor: an `__init__` with annotated parameters.
        settings: its arguments by name, as `locals()` gives them at its beginning, or `vars(self)` of a dataclass.
        ranges: name → interval, such as `[0, 1)` or `(0, inf)`, or all values that there are; None lies in every one.
    """
    if "num_labels" in settings.get("kwargs", {}):
        raise ValueError("num_labels: no model of this package has labels; leave it out.")
    for name, hint in get_type_hints(constructor).items():
        if name in settings and not has_type(settings[name], hint):
            expected = getattr(hint, "__name__", str(hint))
            raise ValueError(f"{name}={reprlib.repr(settings[name])} must be of type {expected} (numbers: finite).")
    for name, allowed in ranges.items():
        value = settings[name]
        if isinstance(allowed, tuple):
            if value is not None and value not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, allowed))}.")
        elif value is not None and not lies_in(value, allowed):
            raise ValueError(f"{name}={value} must lie in {allowed}.")


def lies_in(value: float, interval: str) -> bool:
    """Whether a number lies in an interval, whose round brackets leave its end out."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (value > low or (interval[0] == "[" and value == low)) and (
        value < high or (interval[-1] == "]" and value == high)
    )


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type; whole numbers are also floating-point numbers, truth values are none."""
    if hint is Any:
        return True
    types = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if isinstance(value, bool):
        return bool in types
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, int) and float in types:
        return True
    return isinstance(value, tuple(get_origin(one) or one for one in types))


def whole_number(value: Any) -> int | None:
    """A whole number as an int, be it one of numpy's or of torch's, or the 4.0 of a form; None for everything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        is_whole = isinstance(value, numbers.Real) and float(value).is_integer()
        return int(float(value)) if is_whole else None
