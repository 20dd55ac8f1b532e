"""Trains with two processes that are killed again and again, and compares with a run that was not.

    python checks/soak.py [--kills 20] [--steps 100] [--seed 0]

It trains the demo's model for some steps, without a stop, and once more with SIGKILL at random moments: to one process
or to both, between steps, within them and while a checkpoint is being written. After each kill every checkpoint has to
be whole; after the last, the logs have to be the same, bit for bit. What happened is printed, and written to
checks/soak.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ldlm_hf.evaluation.markdown import markdown_table
from ldlm_hf.training.checkpoints import TEMPORARY_PREFIX, damage, find_checkpoints, step_of


REPOSITORY = Path(__file__).resolve().parents[1]
COMPARED = ("loss", "hidden_loss", "token_loss", "diffusion_loss", "gradient_norm", "latent_std", "token_accuracy")
DEMO = [
    "--config",
    "training/configs/demo.yaml",
    "loop.logging_steps=1",
    "loop.checkpointing_steps=5",
    "loop.checkpoints_total_limit=3",
    "timestep_sampler.update_every=10",
    "warmup.steps=60",
    "conditioning.start_step=60",
    "optimizer.lr_decay_steps=20",
    "loop.trackers=[]",
    "evaluation.every=0",
    "evaluation.num_sequences=16",
    "evaluation.num_samples=0",
]


# one for each rank
Processes = list[subprocess.Popen[bytes]]


def start(script: str, arguments: Sequence[str], log: Path, world_size: int = 1, on_cpu: bool = True) -> Processes:
    """Starts a script of `training/`, as a cluster does; what it prints is appended to `log`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    if world_size > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world_size),
        }
    command = [sys.executable, f"training/{script}.py", *arguments]
    processes = []
    with log.open("ab") as output:
        for rank in range(world_size):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else environment
            processes.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=own, stdout=output, stderr=subprocess.STDOUT)
            )
    return processes


def wait(processes: Processes, timeout: float) -> list[int]:
    """Exit statuses; a process that runs after `timeout` seconds is killed."""
    end = time.monotonic() + timeout
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]


def finish(processes: Processes, log: Path, timeout: float = 3600) -> None:
    """Waits for the end of a script; RuntimeError if that was an error, with its text."""
    statuses = wait(processes, timeout)
    if any(statuses):
        raise RuntimeError(f"ended with {statuses}: {log.read_text(encoding='utf-8')[-3000:]}")


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


@dataclass(frozen=True)
class Kill:
    """SIGKILL for some processes: once a step is logged, after a delay in seconds or while a checkpoint is saved."""

    step: int
    ranks: Sequence[int]
    delay: float = 0.0
    saving: bool = False


def random_kills(count: int, steps: int, seed: int) -> list[Kill]:
    """Kills of one of two processes or of both, one after the other."""
    generator = random.Random(seed)
    return [
        Kill(
            step,
            ranks=generator.choice([(0,), (1,), (0, 1)]),
            delay=generator.uniform(0, 0.5),
            saving=generator.random() < 0.5,
        )
        for step in sorted(generator.sample(range(1, steps - 1), count))
    ]


@dataclass
class KilledRun:
    """What was seen of a run that was killed; the largest difference is relative, of all numbers compared."""

    steps: int
    kills: int = 0
    kills_while_saving: int = 0
    checkpoints_read: int = 0
    steps_done_again: int = 0
    largest_difference: float = 0.0


def apply_kill(kill: Kill, processes: Processes, run: Path, seen: KilledRun) -> None:
    """Waits for the moment of a kill, ends all processes, and checks what they have left."""
    if not wait_for(lambda: max(records(run), default=0) >= kill.step, processes):
        raise RuntimeError(f"the run ended by itself before step {kill.step}")
    if kill.saving:
        wait_for(lambda: any(run.glob(f"{TEMPORARY_PREFIX}*")), processes, seconds=20)
    else:
        time.sleep(kill.delay)
    seen.kills += 1
    seen.kills_while_saving += any(run.glob(f"{TEMPORARY_PREFIX}*"))
    for rank in kill.ranks:
        processes[rank].kill()
    wait(processes, timeout=20)
    checkpoints = find_checkpoints(run)
    for checkpoint in checkpoints:
        problem = damage(checkpoint)
        if problem is not None:
            raise RuntimeError(f"{checkpoint.name}: {problem}")
    seen.checkpoints_read += len(checkpoints)
    seen.steps_done_again += max(records(run)) - (step_of(checkpoints[-1]) if checkpoints else 0)


def compared_numbers(run: Path) -> torch.Tensor:
    rows = [[record[name] for name in COMPARED] for record in records(run).values()]
    return torch.tensor(rows, dtype=torch.float64)


def train_and_kill(
    arguments: Sequence[str], folder: Path, steps: int, kills: Sequence[Kill], world_size: int, on_cpu: bool = True
) -> KilledRun:
    """Trains without a stop, in `folder/whole`, and with kills, in `folder/killed`, and compares the two.

    Raises:
        RuntimeError: a run failed, a checkpoint is damaged, or the killed run has logged other steps.
    """
    whole, killed, log, seen = folder / "whole", folder / "killed", folder / "log.txt", KilledRun(steps)
    folder.mkdir(parents=True, exist_ok=True)

    def launch(*options: str) -> Processes:
        return start("train_joint", [*arguments, f"loop.max_steps={steps}", *options], log, world_size, on_cpu)

    # one that was killed before its first checkpoint starts anew
    go_on = [f"loop.output_dir={killed}", "--resume_from_checkpoint", "latest", "--overwrite_output_dir"]
    finish(launch(f"loop.output_dir={whole}"), log)
    for kill in kills:
        apply_kill(kill, launch(*go_on), killed, seen)
    finish(launch(*go_on), log)
    if list(records(killed)) != list(records(whole)):
        raise RuntimeError(f"the killed run has logged the steps {list(records(killed))}")
    expected, found = compared_numbers(whole), compared_numbers(killed)
    seen.largest_difference = float((torch.where(found == expected, 0.0, found / expected - 1)).abs().max())
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    kills = random_kills(arguments.kills, arguments.steps, arguments.seed)
    seen = train_and_kill(DEMO, folder, arguments.steps, kills, world_size=2)
    if seen.largest_difference != 0:
        raise SystemExit(f"{seen}; everything is in {folder}")
    rows = [[name.replace("_", " "), str(value)] for name, value in asdict(seen).items()]
    line_break = "\n"
    differing = ", ".join(f"`{name}`" for name in COMPARED)
    text = f"""# Two processes, killed at random

Written by `python checks/soak.py --kills {arguments.kills} --steps {arguments.steps} --seed {arguments.seed}`: the
demo's model and text (`training/configs/demo.yaml`), two gloo processes with one thread each on {os.cpu_count()}
cores ({platform.machine()}), torch {torch.__version__}; {(time.monotonic() - began) / 60:.0f} minutes.

{line_break.join(markdown_table(["", ""], rows))}

The largest difference is that of {differing} over all steps, relative to the run without a stop; 0 is bit for bit.
Steps done again are those behind a kill's last checkpoint.
"""
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
