"""What clusters do to a run: other numbers of processes, signals, kills, disks that are full."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldlm_hf import LDLMTokenEncoder
from ldlm_hf.training.checkpoints import damage, find_checkpoints, step_of
from soak import random_kills, records, start, train_and_kill, wait, wait_for


Run = Callable[..., None]
TOLERANCE = 1e-5  # of losses and gradient norms, relative; sums in another order, in float32


def launch(repository: Path, script: str, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A training script on several CPU processes."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(repository / script), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def assert_same_losses(found: Path, expected: Path, steps: range) -> None:
    mine, others = records(found), records(expected)
    assert list(mine) == list(others) == list(steps)
    for step in steps:
        for name in ("loss", "hidden_loss", "token_loss", "diffusion_loss", "gradient_norm"):
            assert mine[step][name] == pytest.approx(others[step][name], rel=TOLERANCE), (step, name)


@pytest.fixture
def one_process(run_script: Run, tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """Settings of a run that has been done on one process, as `tmp_path/one`."""
    settings = [*tiny_overrides, "loop.max_steps=6", "loop.checkpointing_steps=3", "evaluation.num_samples=0"]
    run_script("train_joint", *settings, f"loop.output_dir={tmp_path / 'one'}")
    return settings


def test_accumulated_passes_give_the_losses_of_one_pass(
    run_script: Run, one_process: list[str], tmp_path: Path
) -> None:
    run_script("train_joint", *one_process, "loop.device_batch_size=2", f"loop.output_dir={tmp_path / 'accumulated'}")
    assert_same_losses(tmp_path / "accumulated", tmp_path / "one", range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["training/train_joint.py", "tests/training/sharded_on_cpu.py"])
def test_two_processes_give_the_losses_of_one(
    one_process: list[str], tmp_path: Path, repository: Path, script: str
) -> None:
    """DDP and FSDP; and both resume from their own checkpoint with the losses of a run that was not stopped."""
    run = tmp_path / "two"
    finished = launch(repository, script, 2, *one_process, f"loop.output_dir={run}", "loop.max_steps=3")
    assert finished.returncode == 0, finished.stderr[-2000:]
    arguments = [*one_process, f"loop.output_dir={run}", "--resume_from_checkpoint", "latest"]
    finished = launch(repository, script, 2, *arguments)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "at step 3" in finished.stdout
    assert_same_losses(run, tmp_path / "one", range(1, 7))
    sharded = [path.name for path in (run / "checkpoint-6").glob("averaged_weights_*.safetensors")]
    assert len(sharded) == (2 if "sharded" in script else 0)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(
    run_script: Run, one_process: list[str], tmp_path: Path, repository: Path
) -> None:
    run = tmp_path / "two"
    finished = launch(
        repository, "training/train_joint.py", 2, *one_process, f"loop.output_dir={run}", "loop.max_steps=3"
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    run_script("train_joint", *one_process, f"loop.output_dir={run}", "--resume_from_checkpoint", "latest")
    assert_same_losses(run, tmp_path / "one", range(1, 7))


@pytest.mark.slow
def test_a_stream_does_not_go_on_with_another_number_of_processes(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, repository: Path
) -> None:
    settings = [
        *tiny_overrides,
        "data.streaming=true",
        "data.holdout_documents=0",
        "data.holdout_fraction=0.3",
        "data.holdout_selection=random",
        "data.max_validation_documents=8",
        "evaluation.num_samples=0",
    ]
    finished = launch(repository, "training/train_joint.py", 2, *settings, "loop.max_steps=2")
    assert finished.returncode == 0, finished.stderr[-2000:]
    with pytest.raises(ValueError, match=r"another layout: world_size=1 \(saved: 2\)"):
        run_script("train_joint", *settings, "--resume_from_checkpoint", "latest")


@pytest.mark.slow
def test_a_kill_loses_no_step(tiny_overrides: list[str], tmp_path: Path) -> None:
    """The short form of `make soak`."""
    settings = [*tiny_overrides, "loop.checkpointing_steps=4", "evaluation.num_samples=0"]
    seen = train_and_kill(settings, tmp_path / "soak", 16, random_kills(2, 16, seed=0), world_size=2)
    assert (seen.kills, seen.largest_difference) == (2, 0)
    assert seen.checkpoints_read > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_both(tiny_overrides: list[str], tmp_path: Path, number: signal.Signals) -> None:
    run, settings = tmp_path / "run", [*tiny_overrides, "loop.max_steps=1000000"]
    processes = start("train_joint", settings, tmp_path / "log.txt", world_size=2)
    assert wait_for(lambda: len(records(run)) >= 3, processes)
    processes[1].send_signal(number)
    assert wait(processes, timeout=120) == [0, 0]
    (checkpoint,) = find_checkpoints(run)
    assert damage(checkpoint) is None
    assert step_of(checkpoint) == max(records(run))


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_it(tiny_overrides: list[str], tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    settings = [*tiny_overrides, "loop.max_steps=1000000", "loop.checkpointing_steps=4"]
    processes = start(
        "train_joint", [*settings, "loop.checkpoints_total_limit=null"], tmp_path / "log.txt", world_size=2
    )

    def limit_files(size: int) -> None:
        # as for a full disk, writing fails in the middle of a file
        for process in processes:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def failures() -> list[str]:
        return [line for line in log.read_text().splitlines() if "checkpoint_failed" in line and line.endswith("}")]

    assert wait_for(lambda: find_checkpoints(run), processes)
    first = find_checkpoints(run)[0]
    limit_files(1 << 16)
    assert wait_for(failures, processes), "no checkpoint failed"
    assert damage(first) is None
    limit_files(resource.RLIM_INFINITY)
    failed = json.loads(failures()[0])
    assert "are untouched" in failed["checkpoint_failed"]
    assert wait_for(lambda: step_of(find_checkpoints(run)[-1]) > failed["step"], processes), "the run did not go on"
    assert damage(find_checkpoints(run)[-1]) is None
    for process in processes:
        process.terminate()
    assert wait(processes, timeout=120) == [0, 0]


def test_one_process_stops_at_once_and_goes_on_from_there(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldlm_hf.training.recipes import joint as train_joint

    class InterruptedTask(train_joint.JointRecipe):
        """Gets SIGTERM in its third step."""

        def losses(self, *arguments, **named):
            if arguments[2] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().losses(*arguments, **named)

    whole, task = tmp_path / "whole", train_joint.JointRecipe
    run_script("train_joint", *tiny_overrides, f"loop.output_dir={whole}")
    train_joint.JointRecipe = InterruptedTask
    try:
        run_script("train_joint", *tiny_overrides)
    finally:
        train_joint.JointRecipe = task
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    assert not (tmp_path / "run" / "pipeline").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run_script("train_joint", *tiny_overrides, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "run" / "pipeline" / "README.md").is_file()
    compared = [{step: row["loss"] for step, row in records(run).items()} for run in (whole, tmp_path / "run")]
    assert compared[0] == compared[1]


class NoReading(TorchDispatchMode):
    """Raises where a value is read from a tensor, which on an accelerator waits for everything that was queued."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name in self.FORBIDDEN:
            raise AssertionError(f"{name} in a training step")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_reads_nothing_back(
    run_script: Run, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Losses are read when they are logged; the host never waits for the device in a step."""
    from ldlm_hf.training import loop

    taken = []
    train_step = loop.TrainingLoop.train_step

    def watched_step(self: loop.TrainingLoop) -> dict[str, torch.Tensor]:
        # the first one makes the optimiser's state
        with NoReading() if self.state.step else contextlib.nullcontext():
            values = train_step(self)
        taken.append(self.state.step)
        return values

    monkeypatch.setattr(loop.TrainingLoop, "train_step", watched_step)
    # on an accelerator it looks at no values
    monkeypatch.setattr(LDLMTokenEncoder, "check_input_ids", lambda self, input_ids: None)
    run_script(
        "train_joint",
        *tiny_overrides,
        f"loop.mixed_precision={precision}",
        "loop.logging_steps=4",
        "timestep_sampler.update_every=50",
        "loop.checkpointing_steps=4",
        "evaluation.num_samples=0",
    )
    assert taken == [0, 1, 2, 3]
