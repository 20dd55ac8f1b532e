"""What the tests of several commands share."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from ablations.execution import CommandRunner


class InThisProcess(CommandRunner):
    """Runs scripts in this process, and keeps their commands."""

    def __init__(self, run_script: Callable):
        self.run_script = run_script
        self.launched: list[list[str]] = []

    def run(self, command: list[str], log: Path) -> int:
        self.launched.append(command)
        script, *arguments = command[command.index("--config_file") + 2 :]
        with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                self.run_script(Path(script).stem, *arguments)
            except Exception:
                traceback.print_exc()
                return 1
        return 0


@pytest.fixture
def runner(run_script: Callable, monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    # scripts have their signals handled, which threads must not
    monkeypatch.setattr(signal, "signal", lambda number, handler: handler)
    return InThisProcess(run_script)
