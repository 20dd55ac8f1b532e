"""Trains and evaluates the runs of a plan: each in a thread that starts its commands and waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

from ablations.runs import AblationRun, Plan, check_finished, read_scores
from ldlm_hf.evaluation.real_text import check_mauve_size
from ldlm_hf.training.launch import check_judge
from ldlm_hf.training.settings import EvaluationSettings


TRAINING = Path(__file__).resolve().parents[1]
# seconds between two looks whether the processes that were asked to stop have ended
POLLING_INTERVAL = 0.2


def launch_command(accelerate: Path, script: str) -> list[str]:
    """The beginning of every command: how accelerate launches a script, with its first arguments."""
    config = os.path.relpath(accelerate)
    name, *arguments = script.split()
    return ["accelerate", "launch", "--config_file", config, os.path.relpath(TRAINING / name), *arguments]


def training_command(run: AblationRun, accelerate: Path) -> list[str]:
    """Trains a run, or goes on with it from its last checkpoint; one that was stopped before its first starts anew."""
    config = [] if run.config is None else ["--config", os.path.relpath(run.config)]
    flags = ["--resume_from_checkpoint", "latest", "--overwrite_output_dir"]
    return [*launch_command(accelerate, run.script), *config, *flags, *run.overrides]


def evaluation_command(run: AblationRun, plan: Plan) -> list[str]:
    """Evaluates a run's pipeline."""
    evaluation = plan.evaluation
    options = {
        "pipeline": run.pipeline,
        "names": run.row,
        "output_dir": run.evaluation,
        "num_samples": evaluation.num_samples,
        "seeds": evaluation.sampling_seeds,
        "steps": evaluation.steps,
        "judge": evaluation.judge or "none",
        "batch_size": evaluation.batch_size,
        "judge_batch_size": evaluation.judge_batch_size,
        # the same reference texts for all of them
        "cache_dir": plan.root / "reference-features",
        "config": os.path.relpath(plan.config),
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    data = [override for override in run.overrides if override.startswith("data.")]
    return [*launch_command(plan.accelerate, "evaluate.py"), *arguments, *data]


def check_evaluation(judge: str | None, num_samples: int) -> None:
    """Raises OSError or ValueError, before any run is trained, where it could not be scored afterwards."""
    if judge is None:
        return
    check_mauve_size(num_samples)
    try:
        check_judge(EvaluationSettings(judge=judge, num_samples=num_samples))
    except OSError as error:
        raise OSError(f"{error} Of this command, that is --judge JUDGE|none.") from error


class CommandRunner:
    """Runs commands of `accelerate launch`, each in a process group of its own, until it is asked to stop."""

    is_stopped = False

    def __init__(self, environment: Mapping[str, str], lock: TextIO):
        self.environment = environment
        self.lock = lock
        self.running: set[subprocess.Popen] = set()

    def run(self, command: list[str], log: Path) -> int:
        """Runs a command, its output appended to a file, and returns its exit status.

        Its processes keep the lock as long as they run, also where this one is killed and leaves them behind. OSError
        where the command cannot be started, or no more shall be.
        """
        if self.is_stopped:
            raise InterruptedError("asked to stop")
        # the launcher that belongs to this interpreter, whatever the search path says
        command = [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
                pass_fds=[self.lock.fileno()],
            )
        self.running.add(process)
        if self.is_stopped:
            # the request has come while it was being started
            signal_group(process, signal.SIGTERM)
        status = process.wait()
        # the launcher dies of the signal at once, the training process when its checkpoint is written
        while self.is_stopped and signal_group(process, 0):
            time.sleep(POLLING_INTERVAL)
        self.running.remove(process)
        return status

    def stop(self, *_: object) -> None:
        """Asks all that is running to stop, which makes training save a checkpoint; can be the handler of a signal."""
        self.is_stopped = True
        for process in tuple(self.running):
            signal_group(process, signal.SIGTERM)


def signal_group(process: subprocess.Popen, number: int) -> bool:
    """Sends a signal (0: none) to a process group; False where all of it has ended."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def run_all(
    runs: Sequence[AblationRun], work: Callable[[AblationRun], None], jobs: int, runner: CommandRunner
) -> dict[AblationRun, str | None]:
    """Works on runs, `jobs` at a time, each after what it needs; what each has failed by, if anything.

    Each run comes after all that it needs. `work` raises OSError or ValueError where it has failed.
    """
    futures: dict[AblationRun, Future[str | None]] = {}
    with ThreadPoolExecutor(max_workers=jobs) as threads:
        # those that need nothing first, so that few threads wait for others
        for run in sorted(runs, key=lambda run: run.needs is not None):
            needed = None if run.needs is None else futures[run.needs]
            futures[run] = threads.submit(work_on, run, needed, work, runner)
    return {run: future.result() for run, future in futures.items()}


def work_on(
    run: AblationRun, needed: Future[str | None] | None, work: Callable[[AblationRun], None], runner: CommandRunner
) -> str | None:
    """Works on one run, unless what it needs has failed; prints and returns what it has failed by, if anything."""
    needed_problem = None if needed is None else needed.result()
    if runner.is_stopped:
        return "stopped before it began"
    problem = None
    try:
        if run.needs is not None and needed_problem is not None:
            raise ValueError(f"needs {run.needs.name}, which failed")
        work(run)
    except (OSError, ValueError) as error:
        problem = "stopped before its end; the same call goes on with it" if runner.is_stopped else str(error)
    print(f"{run.name}: {'done' if problem is None else 'FAILED: ' + problem}", flush=True)
    return problem


def train(run: AblationRun, accelerate: Path, runner: CommandRunner) -> None:
    """Trains a run, unless it is trained already; OSError or ValueError where that has failed."""
    if check_finished(run):
        print(f"{run.name}: is trained already", flush=True)
        return
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    ending = execute("training", training_command(run, accelerate), run, runner)
    if not check_finished(run):
        raise ValueError(ending)


def evaluate(run: AblationRun, plan: Plan, runner: CommandRunner) -> None:
    """Evaluates a trained run, unless that is done already; OSError or ValueError where it has failed."""
    if read_scores(run, plan.evaluation) is None:
        ending = execute("evaluation", evaluation_command(run, plan), run, runner)
        if read_scores(run, plan.evaluation) is None:
            raise ValueError(ending)


def execute(what: str, command: list[str], run: AblationRun, runner: CommandRunner) -> str:
    """Runs a command of a run; how it has ended, for people."""
    print(f"{run.name}: {what}, log in {run.log}", flush=True)
    earlier = run.log.stat().st_size if run.log.is_file() else 0
    try:
        status = runner.run(command, run.log)
    except OSError as error:
        raise OSError(f"could not be started: {error}") from error
    printed = run.log.read_bytes()[earlier:].decode(errors="replace")
    lines = [line for line in printed.splitlines() if line.strip()]
    # the launcher's own complaint about a process that has failed comes after what that process says
    errors = [line for line in lines if "Error" in line and "CalledProcessError" not in line]
    said = (errors or lines or ["no output"])[-1].strip()[:400]
    return f"{what} ended with status {status}: {said} (log: {run.log})"
