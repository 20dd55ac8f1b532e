"""Trains with two processes that are killed again and again, and compares with a run that was not.

    python checks/soak.py [--kills 20] [--seed 0]

It trains the demo's model for some steps, without a stop, and once more with SIGKILL at random moments: to one process
or to both, between steps, within them and while a checkpoint is being written. After each kill every checkpoint is
read; after the last, the losses are compared bit for bit, and the timestep sampler's state between the ranks. Then it
asks a run to stop by SIGTERM, and by SIGUSR1, and takes the disk away from one that is saving. What happened is
printed, and written to checks/soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ldlm_hf.evaluation.markdown import markdown_table
from ldlm_hf.training.checkpoints import TEMPORARY_PREFIX, damage, find_checkpoints, step_of


REPOSITORY = Path(__file__).resolve().parents[1]
WORLD_SIZE = 2
COMPARED = ("loss", "hidden_loss", "token_loss", "diffusion_loss", "gradient_norm", "latent_std", "token_accuracy")
DEMO = [
    "--config",
    "training/configs/demo.yaml",
    "loop.logging_steps=1",
    "loop.checkpointing_steps=5",
    "loop.checkpoints_total_limit=3",
    "timestep_sampler.update_every=10",
    "warmup.steps=60",
    "loop.trackers=[]",
    "evaluation.every=0",
    "evaluation.num_sequences=16",
    "evaluation.num_samples=0",
]


# one for each rank
Processes = list[subprocess.Popen[bytes]]


def wait(processes: Processes, timeout: float) -> list[int]:
    """Exit statuses; a process that runs after `timeout` seconds is killed."""
    end = time.monotonic() + timeout
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]


def start(arguments: Sequence[str], log: Path) -> Processes:
    """Starts `train_joint.py` on two CPU processes, as a cluster does; what they print is appended to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "WORLD_SIZE": str(WORLD_SIZE),
    }
    command = [sys.executable, "training/train_joint.py", *arguments]
    processes = []
    with log.open("ab") as output:
        for rank in range(WORLD_SIZE):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=own, stdout=output, stderr=subprocess.STDOUT)
            )
    return processes


def records(run: Path) -> dict[int, dict[str, Any]]:
    """The log's training lines by step; half a line at the end is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    parsed = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record for record in parsed if "loss" in record}


def wait_for(condition: Callable[[], Any], processes: Processes, seconds: float = 300) -> bool:
    """Waits until a condition holds; False if the run ended before."""
    end = time.monotonic() + seconds
    while all(process.poll() is None for process in processes) and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return bool(condition())


@dataclass
class SoakResult:
    """What a soak has seen; `problems` is empty if all is well."""

    kills: int = 0
    kills_while_saving: int = 0
    resumes: int = 0
    checkpoints_read: int = 0
    steps: int = 0
    steps_done_again: int = 0
    steps_lost: int = 0
    steps_that_differ: int = 0
    sampler_states_compared: int = 0
    problems: list[str] = field(default_factory=list)


def read_checkpoints(run: Path, result: SoakResult) -> None:
    """Reads every file of every checkpoint, and compares the ranks' sampler states."""
    for checkpoint in find_checkpoints(run):
        problem = damage(checkpoint)
        if problem is not None:
            result.problems.append(f"{checkpoint.name}: {problem}")
            continue
        for path in checkpoint.glob("*.safetensors"):
            load_file(path)
        state = torch.load(checkpoint / "run_state.pt", weights_only=True)
        tasks = [torch.load(path, weights_only=True)["task"] for path in sorted(checkpoint.glob("rank_*.pt"))]
        if state["step"] != step_of(checkpoint) or len(tasks) != WORLD_SIZE:
            result.problems.append(f"{checkpoint.name}: step {state['step']}, {len(tasks)} ranks")
        for other in tasks[1:]:
            result.sampler_states_compared += 1
            if not all(torch.equal(torch.as_tensor(tasks[0][key]), torch.as_tensor(other[key])) for key in tasks[0]):
                result.problems.append(f"{checkpoint.name}: the ranks' timestep samplers differ")
        result.checkpoints_read += 1


def kill_at(moment: int, processes: Processes, run: Path, generator: random.Random, result: SoakResult) -> bool:
    """Kills one process or both soon after a step, or while a checkpoint is saved; False if the run ended before."""
    saving = generator.random() < 0.5
    if not wait_for(lambda: max(records(run), default=0) >= moment, processes):
        return False
    if saving:
        wait_for(lambda: any(run.glob(f"{TEMPORARY_PREFIX}*")), processes, seconds=20)
    else:
        time.sleep(generator.uniform(0, 0.5))
    result.kills_while_saving += any(run.glob(f"{TEMPORARY_PREFIX}*"))
    victims = processes if generator.random() < 0.5 else [generator.choice(processes)]
    for process in victims:
        process.kill()
    wait(processes, timeout=20)
    result.kills += 1
    read_checkpoints(run, result)
    last = max((step_of(path) for path in find_checkpoints(run)), default=0)
    result.steps_done_again += max(records(run), default=0) - last
    return True


def soak(arguments: Sequence[str], folder: Path, kills: int, steps: int, seed: int) -> SoakResult:
    """One run without a stop, one with `kills` kills at random moments, and what tells them apart."""
    generator = random.Random(seed)
    result = SoakResult(steps=steps)
    common = [*arguments, f"loop.max_steps={steps}"]
    folder.mkdir(parents=True, exist_ok=True)
    whole, killed, log = folder / "whole", folder / "killed", folder / "log.txt"
    # one that was killed before its first checkpoint starts anew
    go_on = [f"loop.output_dir={killed}", "--resume_from_checkpoint", "latest", "--overwrite_output_dir"]
    statuses = wait(start([*common, f"loop.output_dir={whole}"], log), timeout=3600)
    if any(statuses):
        result.problems.append(f"the uninterrupted run ended with {statuses}; see {log.name}")
        return result

    for moment in sorted(generator.sample(range(1, steps - 1), kills)):
        processes = start([*common, *go_on], log)
        result.resumes += bool(find_checkpoints(killed))
        if not kill_at(moment, processes, killed, generator, result):
            result.problems.append(f"the run ended by itself before step {moment}; see {log.name}")
            break

    statuses = wait(start([*common, *go_on], log), timeout=3600)
    result.resumes += 1
    if any(statuses):
        result.problems.append(f"the last part ended with {statuses}; see {log.name}")
    read_checkpoints(killed, result)
    expected, found = records(whole), records(killed)
    result.steps_lost = len(expected.keys() - found.keys())
    result.steps_that_differ = sum(
        any(expected[step][name] != found[step][name] for name in COMPARED) for step in expected.keys() & found.keys()
    )
    if result.steps_lost or result.steps_that_differ or list(found) != sorted(found):
        result.problems.append(f"{result.steps_lost} steps lost, {result.steps_that_differ} differ")
    return result


def asked_to_stop(arguments: Sequence[str], folder: Path, number: signal.Signals) -> str:
    """Sends a signal to one of the processes of a run; what came of it."""
    run = folder / number.name.lower()
    processes = start([*arguments, f"loop.output_dir={run}", "loop.checkpointing_steps=1000000"], folder / "log.txt")
    wait_for(lambda: len(records(run)) >= 3, processes)
    processes[1].send_signal(number)
    statuses = wait(processes, timeout=120)
    checkpoints = find_checkpoints(run)
    last = max(records(run))
    assert statuses == [0, 0], f"{number.name}: the processes ended with {statuses}"
    assert len(checkpoints) == 1 and damage(checkpoints[0]) is None, f"{number.name}: {checkpoints}"
    assert step_of(checkpoints[0]) == last, f"{number.name}: checkpoint of {checkpoints[0].name}, log to {last}"
    return f"{number.name} to rank 1 alone: both processes saved step {last} and ended with exit status 0"


def disk_full(arguments: Sequence[str], folder: Path) -> str:
    """Takes the room to write from a run after its first checkpoint, and gives it back later; what came of it."""
    run = folder / "disk-full"
    processes = start(
        [*arguments, f"loop.output_dir={run}", "loop.checkpoints_total_limit=null"], folder / "disk-full.txt"
    )
    wait_for(lambda: find_checkpoints(run), processes)
    first = find_checkpoints(run)[0]

    def limit_files(size: int) -> None:
        # as for a full disk, writing fails in the middle of a file
        for process in processes:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def failures() -> list[str]:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if "checkpoint_failed" in line and line.endswith("}")]

    limit_files(1 << 16)
    assert wait_for(failures, processes), "no checkpoint failed"
    assert damage(first) is None, f"{first.name}: {damage(first)}"
    limit_files(resource.RLIM_INFINITY)
    failed_at = json.loads(failures()[0])
    wait_for(lambda: step_of(find_checkpoints(run)[-1]) > failed_at["step"], processes)
    later = find_checkpoints(run)[-1]
    for process in processes:
        process.terminate()
    assert wait(processes, timeout=120) == [0, 0], "the run did not go on"
    assert step_of(later) > failed_at["step"] and damage(later) is None, later.name
    said = failed_at["checkpoint_failed"]
    return f'no room to write at step {failed_at["step"]}: "{said}" Training went on, and {later.name} is whole'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    result = soak(DEMO, folder, arguments.kills, arguments.steps, arguments.seed)
    if result.problems:
        raise SystemExit(f"{result.problems}; everything is in {folder}")
    endless = [*DEMO, "loop.max_steps=1000000"]
    further = [asked_to_stop(endless, folder, number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    further.append(disk_full(endless, folder))
    rows = [[name.replace("_", " "), str(value)] for name, value in vars(result).items() if name != "problems"]
    line_break = "\n"
    differing = ", ".join(f"`{name}`" for name in COMPARED)
    text = f"""# Two processes, killed at random

Written by `python checks/soak.py --kills {arguments.kills} --steps {arguments.steps} --seed {arguments.seed}`: the
demo's model and text (`training/configs/demo.yaml`), two gloo processes with one thread each on {os.cpu_count()}
cores ({platform.machine()}), torch {torch.__version__}; {(time.monotonic() - began) / 60:.0f} minutes.

{line_break.join(markdown_table(["", ""], rows))}

A step differs if any of {differing} is not the same number, bit for bit, as in the run without a stop. Steps done
again are those behind a kill's last checkpoint.

{line_break.join(f"* {line}" for line in further)}
"""
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
