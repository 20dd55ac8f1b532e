"""checks/cuda.py on the CPU with tiny models: the same code, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn


REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "checks" / "cuda.py"


@pytest.fixture
def cuda_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    specification = importlib.util.spec_from_file_location("cuda_check", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "cuda_check", module)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_part_holds_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--output", str(tmp_path / "cuda.md")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "cuda.md").read_text(encoding="utf-8")
    assert report.count("\n## ") == report.count("As it should be") == 11


class Shift(nn.Module):
    """Adds to its input what is not the same on every device and in every type."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("on_device", "in_bfloat16", "expected"),
    [(1e-5, 5e-3, 0), (1e-3, 5e-3, 1), (1e-5, 0.1, 1), (float("nan"), float("nan"), 2)],
)
def test_an_output_that_differs_is_a_problem(
    cuda_check: ModuleType, on_device: float, in_bfloat16: float, expected: int
) -> None:
    calls = iter([0.0, on_device, in_bfloat16, 0.0])

    def run(module: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(4) + next(calls) + module.shift

    part = cuda_check.parity_part("Outputs")
    scale = cuda_check.Scale(torch.device("cpu"), "tiny", 16, (), 1, 1)
    cuda_check.compare_with_cpu("shift", Shift(), run, scale, part)
    assert len(part.problems) == expected


def test_a_part_that_raises_leaves_its_error_in_the_report(cuda_check: ModuleType) -> None:
    def check(scale: object) -> object:
        raise RuntimeError("CUDA error: misaligned address")

    part = cuda_check.run_check(check, cuda_check.Scale(torch.device("cpu"), "tiny", 16, (), 1, 1))
    report = cuda_check.section("Models", part, 1.0)
    assert "FAILED" in report and "misaligned address" in report


@pytest.mark.slow
def test_other_checks_find_no_package_cuda_in_their_folder() -> None:
    code = "import torch\ntry:\n    import cuda.bindings\nexcept ImportError as error:\n    print('no package', error)"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no package")
