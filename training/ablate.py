"""Trains, evaluates and tabulates the paper's ablations: Tables 1, 2, 4, 5, 6 and 7 (configs/ablations.yaml).

    python training/ablate.py --table 1 --base openwebtext_128|demo [--rows ROW ...] [section.key=value ...]

Runs that are finished are reused, and one that was stopped goes on from its last checkpoint. `--print_commands` prints
the commands for a cluster instead. Overrides change the base; what a row sets wins over them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ablations import AblationRun, Ablations, Plan, check_known, read_ablations


TRAINING = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Outcome:
    """What became of a run; `problem` is None where all went well."""

    run: AblationRun
    problem: str | None = None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="append", default=[], metavar="N", help="a table of the paper; repeatable")
    parser.add_argument("--base", default="openwebtext_128", help="what is ablated: openwebtext_128 or demo")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these rows only")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds: 0 to one less than this")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all steps, warmups included")
    parser.add_argument("--output_dir", default="runs/ablations", help="folder of all ablations")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time on this machine")
    parser.add_argument("--train_only", action="store_true", help="neither evaluate nor tabulate")
    parser.add_argument("--print_commands", action="store_true", help="print the commands and do nothing")
    parser.add_argument("--num_samples", type=int, help="texts of one sampling seed")
    parser.add_argument("--sampling_seeds", type=int, help="sampling seeds of each run")
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--judge", help="causal language model, or none")
    parser.add_argument("--config", default=str(TRAINING / "configs/ablations.yaml"), help="file of the ablations")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all rows")
    return parser.parse_intermixed_args(arguments)


def shown(path: Path) -> str:
    """A path as it is typed: relative to the working directory where it lies below it."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def training_command(run: AblationRun, plan: Plan) -> list[str]:
    """Trains a run, or goes on with it from its last checkpoint."""
    config = [] if run.config is None else ["--config", shown(run.config)]
    return [
        *("accelerate", "launch", "--config_file", shown(plan.directory / plan.base.accelerate)),
        shown(TRAINING / run.script),
        *config,
        *("--resume_from_checkpoint", "latest"),
        *run.overrides,
    ]


class Runner:
    """Runs commands one after another, or `jobs` at a time, and stops them all when it is asked to stop."""

    def __init__(self, plan: Plan, jobs: int, launch: Callable[[list[str], Path], int] | None = None):
        self.plan = plan
        self.jobs = jobs
        self.launch = launch or self.launch_process
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def launch_process(self, command: list[str], log: Path) -> int:
        """Runs a command in a process group of its own, its output appended to a file; the exit status."""
        environment = dict(os.environ)
        if self.jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"
        # the launcher that belongs to this interpreter, whatever the search path says
        command = [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]
        with log.open("a", encoding="utf-8") as output, self.lock:
            if self.stopped:
                return 1
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            self.processes.add(process)
        status = process.wait()
        with self.lock:
            self.processes.discard(process)
        return status

    def stop(self, *_: object) -> None:
        """Asks all processes to stop, which makes training save a checkpoint, and starts no further ones."""
        self.stopped = True
        for process in list(self.processes):
            os.killpg(process.pid, signal.SIGTERM)

    def train(self, run: AblationRun) -> str | None:
        """Trains a run unless it is finished; what went wrong, if anything did."""
        try:
            if run.is_finished:
                print(f"{run.name}: trained already, in {shown(run.folder)}", flush=True)
                return None
        except ValueError as error:
            return str(error)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"{run.name}: training, log in {shown(run.log)}", flush=True)
        started = time.monotonic()
        status = self.launch(training_command(run, self.plan), run.log)
        if run.is_finished:
            print(f"{run.name}: trained in {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
            return None
        return failure("training", status, run.log)


def failure(what: str, status: int, log: Path) -> str:
    """What went wrong in a process, with the last line that it has printed."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = lines[-1].split("\r")[-1].strip()[:300] if lines else "nothing printed"
    return f"{what} ended with status {status} before its end: {said} (log: {shown(log)})"


def with_needs(runs: Iterable[AblationRun]) -> list[AblationRun]:
    """Runs and what they need, each once, and after all that it needs."""
    ordered: dict[Path, AblationRun] = {}

    def add(run: AblationRun) -> None:
        if run.needs is not None:
            add(run.needs)
        ordered.setdefault(run.folder, run)

    for run in runs:
        add(run)
    # those that need nothing first, so that no worker waits while there is other work
    return sorted(ordered.values(), key=lambda run: run.needs is not None)


def carry_out(runs: Sequence[AblationRun], runner: Runner) -> list[Outcome]:
    """Trains runs, in their order; one that fails takes only those with it that need it."""
    futures: dict[Path, Future[Outcome]] = {}

    def work(run: AblationRun) -> Outcome:
        if runner.stopped:
            return Outcome(run, "stopped before it began")
        if run.needs is not None and futures[run.needs.folder].result().problem is not None:
            return Outcome(run, f"needs {run.needs.name}, which failed")
        problem = runner.train(run)
        if problem is not None:
            print(f"{run.name}: FAILED: {problem}", flush=True)
        return Outcome(run, problem)

    with ThreadPoolExecutor(runner.jobs) as pool:
        for run in runs:
            futures[run.folder] = pool.submit(work, run)
        return [futures[run.folder].result() for run in runs]


def selected_rows(ablations: Ablations, arguments: argparse.Namespace) -> list[str]:
    """Names of the rows of the tables asked for, in their order, each once.

    Raises:
        ValueError: an unknown table or row, or nothing asked for.
    """
    for table in arguments.table:
        check_known("table", table, ablations.tables)
    rows = list(dict.fromkeys(name for table in arguments.table for name in ablations.tables[table].rows))
    if arguments.rows is None:
        if not rows:
            raise ValueError(f"Nothing to do: give --table N ({', '.join(ablations.tables)}) or --rows ROW ...")
        return rows
    known = rows or list(ablations.rows)
    for name in arguments.rows:
        check_known("row" + (f" of table {' and '.join(arguments.table)}" if rows else ""), name, known)
    return list(arguments.rows)


def main() -> int:
    arguments = parse_arguments()
    config = Path(arguments.config)
    ablations = read_ablations(config)
    check_known("base", arguments.base, ablations.bases)
    rows = selected_rows(ablations, arguments)
    folder = arguments.base if arguments.scale == 1 else f"{arguments.base}-scale-{arguments.scale:g}"
    plan = Plan(
        ablations,
        config.parent,
        arguments.base,
        arguments.scale,
        tuple(arguments.overrides),
        Path(arguments.output_dir) / folder,
    )
    runs = with_needs(plan.run(name, seed) for name in rows for seed in range(arguments.seeds))
    if arguments.print_commands:
        for run in runs:
            print(shlex.join(training_command(run, plan)))
        return 0
    runner = Runner(plan, arguments.jobs)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, runner.stop)
    outcomes = carry_out(runs, runner)
    failed = [outcome for outcome in outcomes if outcome.problem is not None]
    for outcome in failed:
        print(f"{outcome.run.name}: {outcome.problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
