"""Being asked to stop: by SIGTERM (clusters, containers, `kill`) or SIGUSR1 (SLURM's warning, see slurm.sh).

accelerate's `set_trigger` and `check_trigger` agree by a sum on the device, which each step would wait for.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether the run shall stop, agreed on by all processes whichever of them got the signal; a context manager.

    The processes agree through a group of the CPU's own, one call behind, so that no accelerator is waited for.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self.sent = torch.zeros(1, dtype=torch.int32)
        self.arrival: dist.Work | None = None
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self.handlers[number] = signal.signal(number, self.take_note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.arrival is not None:
            self.arrival.wait()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def take_note(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        self.signal_name = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether to stop now; all processes call it once a step and get the same answer."""
        if self.group is None:
            return self.signal_name is not None
        stop = False
        if self.arrival is not None:
            self.arrival.wait()
            stop = bool(self.sent)
        if not stop:
            self.sent = torch.tensor([int(self.signal_name is not None)], dtype=torch.int32)
            self.arrival = dist.all_reduce(self.sent, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return stop
