"""Trains LDLM and the methods that it is compared with, and evaluates all alike: Tables 3, 8 and 9, and Figure 1.

    python training/compare_methods.py --base demo|openwebtext_1024|lm1b_128 [--methods NAME ...] [key=value ...]

By default all methods are trained for the same FLOPs, by the counter of `training/flops.py`; with `--equal steps` for
the same number of steps, the paper's way. Runs and evaluations that are finished are reused, a run that was stopped
goes on from its last checkpoint, and one that fails takes only those with it that need it. Overrides are settings of
all runs. With `--print_commands` the commands are printed for a cluster; the same call without it then writes the
tables. One call at a time works in a base's folder; a second one is refused.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ablations.definitions import check_known
from ablations.execution import CommandRunner, check_evaluation, execute, run_all, train, training_command
from ablations.runs import AblationRun, with_needs
from ldlm_hf.evaluation.folder_lock import lock_folder
from ldlm_hf.loading.settings_reader import positive
from ldlm_hf.training.flops import human_flops
from methods.definitions import read_methods
from methods.report import write_report
from methods.runs import Evaluation, MethodPlan, MethodRun, evaluations


CONFIG = Path(__file__).resolve().parent / "configs/methods.yaml"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="openwebtext_1024", help="text and size: openwebtext_1024 (default), lm1b_128 or demo")
    add("--methods", nargs="+", metavar="NAME", help="these methods only; tables show all that there are")
    add("--seeds", type=positive, default=1, metavar="N", help="training seeds of each: 0 to N - 1")
    add("--equal", choices=("flops", "steps"), default="flops", help="what all methods are trained for")
    add("--base_steps", type=positive, metavar="N", help="steps of the reference; by default those of the base")
    add("--output_dir", type=Path, default=Path("runs/methods"), help="folder of all comparisons")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at once on this machine, with one thread each")
    add("--print_commands", action="store_true", help="print the commands and do nothing")
    add("--num_samples", type=positive, help="texts of one sampling seed; by default, as of the next ones, the base's")
    add("--sampling_seeds", type=positive, help="sampling seeds of each run")
    add("--nfe", type=positive, nargs="+", help="evaluations of the network for a sample, at most")
    add("--frontier_nfe", type=positive, help="the same for the frontier over temperatures and noise")
    add("--judge", help="causal language model (Hub id, folder, package:NAME/FILE.gguf), or none")
    add("--config", type=Path, default=CONFIG, help="file of the methods")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of all runs")
    options = parser.parse_intermixed_args(arguments)
    if options.methods is not None:
        # what follows the names of methods is taken for further ones
        options.overrides += [text for text in options.methods if "=" in text]
        options.methods = [text for text in options.methods if "=" not in text]
    return options


def build_plan(options: argparse.Namespace) -> MethodPlan:
    """The methods on the base that is asked for, and the folder of their runs."""
    methods = read_methods(options.config)
    check_known("base", options.base, methods.bases)
    base = methods.bases[options.base]
    if options.base_steps is not None:
        base = methods.bases[options.base] = replace(base, steps=options.base_steps)
    names = ("num_samples", "sampling_seeds", "nfe", "frontier_nfe", "judge")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    changes: dict[str, Any] = {name: None if one == "none" else one for name, one in given.items()}
    evaluation = replace(base.evaluation, **changes)
    root = options.output_dir / f"{options.base}-equal-{options.equal}"
    return MethodPlan(
        methods, options.config.parent, options.base, options.equal, tuple(options.overrides), evaluation, root
    )


def work_on(plan: MethodPlan, runner: CommandRunner, run: AblationRun) -> None:
    """Trains a run; ValueError where it was distilled from other weights than there are."""
    assert isinstance(run, MethodRun)
    run.check_teacher()
    train(run, plan.accelerate, runner)


def evaluate(one: Evaluation, runner: CommandRunner) -> None:
    """Runs an evaluation that has not been done, of weights that are there."""
    if one.results() is None and (one.run.pipeline / "README.md").is_file() and not runner.is_stopped:
        ending = execute("evaluation", one.command(), one.run, runner)
        if one.results() is None:
            print(f"{one.title}: FAILED: {ending}", flush=True)


def main(arguments: Sequence[str], runner: CommandRunner | None = None) -> int:
    """Runs the command line; the exit status. The runner, if not the usual one, is what runs the commands."""
    options = parse_arguments(arguments)
    plan = build_plan(options)
    on_base = plan.methods.on_base(plan.base_name)
    names = options.methods or on_base
    for name in names:
        check_known(f"on base {plan.base_name!r}, method", name, on_base)
    wanted = evaluations(plan, names, range(options.seeds))
    runs = with_needs(one.run for one in wanted)
    for run in runs:
        # settings that are refused stop all of it before any of it
        _ = run.settings
    for name, flops in plan.counted.items():
        print(f"{name}: {plan.steps(name):,} steps of {human_flops(flops)}", file=sys.stderr)
    if options.print_commands:
        for run in runs:
            print(shlex.join(training_command(run, plan.accelerate)))
        for one in wanted:
            print(shlex.join(one.command()))
        return 0
    check_evaluation(plan.evaluation.judge, plan.evaluation.num_samples)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {})
    remedy = "wait for that call of compare_methods.py and all that it has started, or name another --output_dir."
    with lock_folder(plan.root, remedy) as lock:
        runner = runner or CommandRunner(environment, lock)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, runner.stop)
        problems = run_all(runs, partial(work_on, plan, runner), options.jobs, runner)
        with ThreadPoolExecutor(max_workers=options.jobs) as threads:
            list(threads.map(lambda one: evaluate(one, runner), wanted))
        # all that there is, of earlier calls too
        shown = evaluations(plan, on_base, range(options.seeds))
        command = shlex.join(["python", "training/compare_methods.py", *arguments])
        print(f"tables: {write_report(shown, plan, command)}")
    return int(any(problems.values()) or any(one.results() is None for one in wanted))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
