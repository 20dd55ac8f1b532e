"""A model hub on the loopback interface, and processes of their own, with and without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopback_hub import LoopbackHub


@pytest.fixture
def loopback_hub() -> Iterator[LoopbackHub]:
    """A running server. The access token `hf_org` is that of the user `org`, `hf_other` that of `other`."""
    with LoopbackHub({"hf_org": "org", "hf_other": "other"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def run_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs code in a fresh process and returns what its last line of output says, as JSON.

    With `installed=False` the process imports from every place that this one does, except those that hold `ldlm_hf`.
    It leaves `.pth` files unread (-S), by which an editable installation shows itself.
    """

    def run(code: str, *arguments: str | Path, installed: bool) -> Any:
        home = tmp_path_factory.mktemp("home")
        places = [place for place in sys.path if place and not (Path(place) / "ldlm_hf").exists()]
        environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment.pop("HF_MODULES_CACHE", None)
        if not installed:
            environment["PYTHONPATH"] = os.pathsep.join(places)
        command = [sys.executable, *([] if installed else ["-S"]), "-c", code, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run
