"""Runs the commands of ablations."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TextIO

from ablations.definitions import AblationRun, Ablations, EvaluationPlan, Plan, check_known, read_ablations
from ablations.tables import write_table
from ldlm_hf.evaluation.folder_lock import lock_folder
from ldlm_hf.evaluation.real_text import check_mauve_size
from ldlm_hf.training.launch import check_judge
from ldlm_hf.training.settings import EvaluationSettings


TRAINING = Path(__file__).resolve().parents[1]
# seconds between two looks at the processes that are running
POLLING_INTERVAL = 0.2
# what a run has to be done with still: commands, each answered by its exit status, and in the end what went wrong
Work = Generator[list[str], int, str | None]


class Process(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit status; None while it is running."""

    def stop(self) -> None:
        """Asks it to stop, which makes training save a checkpoint."""


Launch = Callable[[list[str], Path], Process]


class CommandProcess:
    """A command of `accelerate launch` in a process group of its own, its output appended to a file.

    It keeps the lock as long as it runs, also where this process is killed and leaves it behind.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str], lock: TextIO):
        # the launcher that belongs to this interpreter, whatever the search path says
        command = [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]
        with log.open("a", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        self.was_stopped = False

    def poll(self) -> int | None:
        status = self.process.poll()
        if status is not None and self.was_stopped:
            # the launcher dies of the signal at once, the training process when its checkpoint is written
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return status
            return None
        return status

    def stop(self) -> None:
        self.was_stopped = True
        # it may have ended by itself, or have been asked before
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)


def with_needs(runs: Iterable[AblationRun]) -> list[AblationRun]:
    """Runs and what they need, each once, and after all that it needs."""
    ordered: dict[AblationRun, None] = {}

    def add(run: AblationRun) -> None:
        if run.needs is not None:
            add(run.needs)
        ordered.setdefault(run)

    for run in runs:
        add(run)
    return list(ordered)


def shown(path: Path) -> str:
    """A path as it is typed: relative to the working directory where it lies below it."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def launch_command(plan: Plan, script: str) -> list[str]:
    """The beginning of every command."""
    accelerate = shown(plan.directory / plan.base.accelerate)
    return ["accelerate", "launch", "--config_file", accelerate, shown(TRAINING / script)]


def training_command(run: AblationRun, plan: Plan) -> list[str]:
    """Trains a run, or goes on with it from its last checkpoint; one that was stopped before its first starts anew."""
    config = [] if run.config is None else ["--config", shown(run.config)]
    flags = ["--resume_from_checkpoint", "latest", "--overwrite_output_dir"]
    return [*launch_command(plan, run.script), *config, *flags, *run.overrides]


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
        "config": shown(plan.config),
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    data = [override for override in run.overrides if override.startswith("data.")]
    return [*launch_command(plan, "evaluate.py"), *arguments, *data]


def work_on(run: AblationRun, plan: Plan, is_scored: bool) -> Work:
    """The commands that a run still needs; what went wrong, if anything did."""
    try:
        if run.is_finished:
            print(f"{run.name}: is trained already", flush=True)
        else:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            print(f"{run.name}: training, log in {shown(run.log)}", flush=True)
            earlier = size_of(run.log)
            status = yield training_command(run, plan)
            if not run.is_finished:
                return failure("training", status, run.log, earlier)
        if is_scored and run.scores(plan.evaluation) is None:
            print(f"{run.name}: evaluation, log in {shown(run.log)}", flush=True)
            earlier = size_of(run.log)
            status = yield evaluation_command(run, plan)
            if run.scores(plan.evaluation) is None:
                return failure("evaluation", status, run.log, earlier)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def size_of(file: Path) -> int:
    """Bytes of a file; 0 of one that is not there."""
    return file.stat().st_size if file.is_file() else 0


def failure(what: str, status: int, log: Path, earlier: int) -> str:
    """What went wrong in a process: the last line of its own, which stands behind `earlier` bytes of the log."""
    printed = log.read_bytes()[earlier:].decode(errors="replace")
    lines = [line for line in printed.splitlines() if line.strip()]
    # the launcher's own complaint about a process that has failed comes after what that process says
    said = [line for line in lines if "Error" in line and "CalledProcessError" not in line] or lines or ["no output"]
    return f"{what} ended with status {status}: {said[-1].strip()[:400]} (log: {shown(log)})"


class Conductor:
    """Works on runs, several at a time; what each has failed by is in `problems`, None for those that went well."""

    def __init__(self, plan: Plan, jobs: int, launch: Launch):
        self.plan = plan
        self.jobs = jobs
        self.launch = launch
        self.problems: dict[AblationRun, str | None] = {}
        self.active: dict[AblationRun, tuple[Work, Process]] = {}
        self.is_stopped = False

    def stop(self, *_: object) -> None:
        """Asks all that is running to stop, and starts nothing more."""
        self.is_stopped = True
        for _, process in self.active.values():
            process.stop()

    def work(self, runs: Sequence[AblationRun], scored: set[AblationRun]) -> None:
        """Works on runs in their order, as soon as what they need is there; those in `scored` are evaluated."""
        waiting = list(runs)
        while waiting or self.active:
            for run in list(waiting):
                if run.needs is not None and run.needs not in self.problems:
                    continue
                if len(self.active) < self.jobs:
                    waiting.remove(run)
                    self.begin(run, run in scored)
            for run, (work, process) in list(self.active.items()):
                status = process.poll()
                if status is not None:
                    del self.active[run]
                    self.go_on(run, work, status)
            if self.active:
                time.sleep(POLLING_INTERVAL)

    def begin(self, run: AblationRun, is_scored: bool) -> None:
        """Starts on a run, unless what it needs has failed."""
        if self.is_stopped:
            self.problems[run] = "stopped before it began"
        elif run.needs is not None and self.problems[run.needs] is not None:
            self.end(run, f"needs {run.needs.name}, which failed")
        else:
            self.go_on(run, work_on(run, self.plan, is_scored), None)

    def go_on(self, run: AblationRun, work: Work, status: int | None) -> None:
        """Hands over how a command has ended, and starts the next one."""
        try:
            command = next(work) if status is None else work.send(status)
        except StopIteration as returned:
            problem = returned.value
        else:
            if not self.is_stopped:
                try:
                    process = self.launch(command, run.log)
                except OSError as error:
                    self.end(run, f"could not be started: {error}")
                    return
                self.active[run] = (work, process)
                if self.is_stopped:
                    # the request has come while it was being started
                    process.stop()
                return
            problem = ""
        if self.is_stopped and problem is not None:
            problem = "stopped before its end; the same call goes on with it"
        self.end(run, problem)

    def end(self, run: AblationRun, problem: str | None) -> None:
        """Takes note of how a run has ended."""
        self.problems[run] = problem
        print(f"{run.name}: {'done' if problem is None else 'FAILED: ' + problem}", flush=True)


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", action="append", default=[], metavar="N", help="a table of the paper; may be given several times")
    add("--base", default="openwebtext_128", help="what is ablated: openwebtext_128 (default) or demo")
    add("--rows", nargs="+", metavar="ROW", help="train and evaluate these rows only")
    add("--seeds", type=int, default=1, metavar="N", help="training seeds of each row: 0 to N - 1")
    add("--scale", type=float, default=1.0, help="factor on all steps, warmups included")
    add("--output_dir", type=Path, default=Path("runs/ablations"), help="folder of all ablations")
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time on this machine, with one thread each")
    add("--train_only", action="store_true", help="neither evaluate nor tabulate")
    add("--print_commands", action="store_true", help="print the commands and do nothing")
    add("--num_samples", type=int, help="texts of one sampling seed; like the next ones, the base says by default")
    add("--sampling_seeds", type=int, help="sampling seeds of each run")
    add("--steps", type=int, help="sampling steps")
    add("--judge", help="causal language model (Hub id, folder, package:NAME/FILE.gguf), or none")
    add("--config", type=Path, default=TRAINING / "configs/ablations.yaml", help="file of the ablations")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of all rows")
    options = parser.parse_intermixed_args(arguments)
    if options.rows is not None:
        # what follows the names of rows is taken for further ones
        options.overrides += [text for text in options.rows if "=" in text]
        options.rows = [text for text in options.rows if "=" not in text]
    for name in ("seeds", "jobs", "num_samples", "sampling_seeds", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    return options


def selected_rows(ablations: Ablations, options: argparse.Namespace) -> list[str]:
    """Names of the rows asked for: those given, or all of the tables, each once.

    Raises:
        ValueError: an unknown table or row, or nothing asked for.
    """
    for table in options.table:
        check_known("table", table, ablations.tables)
    rows = list(dict.fromkeys(name for table in options.table for name in ablations.tables[table].rows))
    if options.rows is None:
        if not rows:
            raise ValueError(f"Nothing to do: give --table N ({', '.join(ablations.tables)}) or --rows ROW ...")
        return rows
    for name in options.rows:
        check_known(f"row of table {' and '.join(options.table)}" if rows else "row", name, rows or ablations.rows)
    return list(dict.fromkeys(options.rows))


def build_plan(ablations: Ablations, options: argparse.Namespace) -> Plan:
    """The base at the scale asked for, and the folder of its runs."""
    check_known("base", options.base, ablations.bases)
    evaluation = ablations.bases[options.base].evaluation
    given = {name: getattr(options, name) for name in ("num_samples", "sampling_seeds", "steps")}
    evaluation = replace(evaluation, **{name: value for name, value in given.items() if value is not None})
    if options.judge is not None:
        evaluation = replace(evaluation, judge=None if options.judge == "none" else options.judge)
    folder = options.base if options.scale == 1 else f"{options.base}-scale-{options.scale:g}"
    return Plan(
        ablations,
        options.config.parent,
        options.base,
        options.scale,
        tuple(options.overrides),
        evaluation,
        options.output_dir / folder,
    )


def check_evaluation(evaluation: EvaluationPlan) -> None:
    """Raises OSError or ValueError, before any run is trained, where it could not be scored afterwards."""
    if evaluation.judge is None:
        return
    check_mauve_size(evaluation.num_samples)
    try:
        check_judge(EvaluationSettings(judge=evaluation.judge, num_samples=evaluation.num_samples))
    except OSError as error:
        raise OSError(f"{error} Of ablations, this is --judge JUDGE|none.") from error


def print_commands(runs: Sequence[AblationRun], scored: set[AblationRun], plan: Plan) -> None:
    """Prints what `Conductor` would run, as lines for a shell."""
    for run in runs:
        print(shlex.join(training_command(run, plan)))
        if run in scored:
            print(shlex.join(evaluation_command(run, plan)))


def main(description: str, arguments: Sequence[str] | None = None, launch: Launch | None = None) -> int:
    """Runs the command line; the exit status. `launch` starts the commands, by default as processes."""
    options = parse_arguments(description, arguments)
    ablations = read_ablations(options.config)
    rows = selected_rows(ablations, options)
    plan = build_plan(ablations, options)
    selected = [plan.run(name, seed) for name in rows for seed in range(options.seeds)]
    runs = with_needs(selected)
    for run in runs:
        # settings that are refused stop all of it before any of it
        _ = run.settings
    scored = set() if options.train_only else {run for run in selected if run.has_pipeline}
    if options.print_commands:
        print_commands(runs, scored, plan)
        return 0
    if scored:
        check_evaluation(plan.evaluation)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {})
    remedy = "wait for that call of ablate.py and all that it has started, or name another --output_dir."
    with lock_folder(plan.root, remedy) as lock:
        conductor = Conductor(
            plan, options.jobs, launch or (lambda command, log: CommandProcess(command, log, environment, lock))
        )
        handlers = {number: signal.signal(number, conductor.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            conductor.work(runs, scored)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if not options.train_only:
            command = shlex.join(["python", "training/ablate.py", *(sys.argv[1:] if arguments is None else arguments)])
            for table in options.table:
                file = write_table(table, plan, options.seeds, conductor.problems, command)
                print(f"table {table}: {shown(file)}")
    return 1 if any(problem is not None for problem in conductor.problems.values()) else 0
