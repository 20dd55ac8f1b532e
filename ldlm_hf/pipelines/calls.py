"""The calls of a pipeline that are running, of which each thread may have one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class CallState:
    """What one call of a pipeline has reached.

    Attributes:
        num_timesteps: denoising steps that it takes.
        num_function_evaluations: how often the transformer has seen each sample.
        interrupt: whether the remaining steps are skipped.
    """

    num_timesteps: int = 0
    num_function_evaluations: int = 0
    interrupt: bool = False


class Calls:
    """The calls of one pipeline, by the threads that they run in."""

    def __init__(self) -> None:
        self._last = CallState()
        self._running: dict[int, CallState] = {}

    @property
    def current(self) -> CallState:
        """The call that this thread is in, otherwise the one that began last."""
        return self._running.get(threading.get_ident(), self._last)

    @contextmanager
    def running(self, call: CallState) -> Iterator[None]:
        """Makes a call the one that this thread is in; a callback may call the pipeline again."""
        thread = threading.get_ident()
        outer = self._running.get(thread)
        self._running[thread] = self._last = call
        try:
            yield
        finally:
            if outer is None:
                del self._running[thread]
            else:
                self._running[thread] = outer
