"""How the tabs call the pipeline: one visitor at a time, and what is wrong is said in a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch

from ..loading.checks import whole_number


# arguments of events: those that share the id wait for each other
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline"}


@contextmanager
def errors_shown() -> Iterator[None]:
    """Shows a ValueError's sentence on the page, and prints no traceback."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def seeded_generator(seed: int) -> torch.Generator:
    """`torch.Generator().manual_seed(seed)`; ValueError for a seed that is no integer or out of range."""
    return torch.Generator().manual_seed(check_integer("seed", seed, 0))


def check_integer(name: str, value: int, minimum: int) -> int:
    """The whole number that a form gave; ValueError where it is none or out of range."""
    number = whole_number(value)
    if number is None or not minimum <= number < 2**63:
        raise ValueError(f"`{name}` must be an integer from {minimum} to 2**63 - 1, got {value!r}.")
    return number


def check_text(name: str, text: str | None) -> None:
    """Raises ValueError where nothing was written."""
    if not text or not text.strip():
        raise ValueError(f"The {name} is empty; write one.")
