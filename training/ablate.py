"""Trains, evaluates and tabulates the paper's ablations: Tables 1, 2, 4, 5, 6 and 7 (configs/ablations.yaml).

    python training/ablate.py --table 1 --base openwebtext_128|demo [--rows ROW ...] [section.key=value ...]

Runs that are finished are reused, one that was stopped goes on from its last checkpoint, and one that fails takes only
those with it that need it. Overrides change the base; what a row sets wins over them. With `--print_commands` the
commands are printed for a cluster, each after those that it needs; the same call without it then writes the tables.
One call at a time works in a base's folder; a second one is refused.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ablations.definitions import Ablations, check_known, read_ablations, selected_rows
from ablations.execution import (
    CommandRunner,
    check_evaluation,
    evaluate,
    evaluation_command,
    run_all,
    train,
    training_command,
)
from ablations.runs import AblationRun, Plan, with_needs
from ablations.tables import write_table
from ldlm_hf.evaluation.folder_lock import lock_folder
from ldlm_hf.loading.settings_reader import positive


CONFIG = Path(__file__).resolve().parent / "configs/ablations.yaml"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", action="append", default=[], metavar="N", help="a table of the paper; may be given several times")
    add("--base", default="openwebtext_128", help="what is ablated: openwebtext_128 (default) or demo")
    add("--rows", nargs="+", metavar="ROW", help="train and evaluate these rows only")
    add("--seeds", type=positive, default=1, metavar="N", help="training seeds of each row: 0 to N - 1")
    add("--scale", type=float, default=1.0, help="factor on all steps, warmups included")
    add("--output_dir", type=Path, default=Path("runs/ablations"), help="folder of all ablations")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at once on this machine, with one thread each")
    add("--train_only", action="store_true", help="neither evaluate nor tabulate")
    add("--print_commands", action="store_true", help="print the commands and do nothing")
    add("--num_samples", type=positive, help="texts of one sampling seed; by default, as of the next ones, the base's")
    add("--sampling_seeds", type=positive, help="sampling seeds of each run")
    add("--steps", type=positive, help="sampling steps")
    add("--judge", help="causal language model (Hub id, folder, package:NAME/FILE.gguf), or none")
    add("--config", type=Path, default=CONFIG, help="file of the ablations")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of all rows")
    options = parser.parse_intermixed_args(arguments)
    if options.rows is not None:
        # what follows the names of rows is taken for further ones
        options.overrides += [text for text in options.rows if "=" in text]
        options.rows = [text for text in options.rows if "=" not in text]
    return options


def build_plan(ablations: Ablations, options: argparse.Namespace) -> Plan:
    """The base at the scale asked for, and the folder of its runs."""
    check_known("base", options.base, ablations.bases)
    given = {name: getattr(options, name) for name in ("num_samples", "sampling_seeds", "steps", "judge")}
    given = {name: None if value == "none" else value for name, value in given.items() if value is not None}
    evaluation = replace(ablations.bases[options.base].evaluation, **given)
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


def work_on(scored: set[AblationRun], plan: Plan, runner: CommandRunner, run: AblationRun) -> None:
    """Trains a run, and evaluates it if it is to be scored."""
    train(run, plan.accelerate, runner)
    if run in scored:
        evaluate(run, plan, runner)


def main(arguments: Sequence[str], runner: CommandRunner | None = None) -> int:
    """Runs the command line; the exit status. The runner, if not the usual one, is what runs the commands."""
    options = parse_arguments(arguments)
    ablations = read_ablations(options.config)
    rows = selected_rows(ablations, options.table, options.rows)
    plan = build_plan(ablations, options)
    selected = [plan.run(name, seed) for name in rows for seed in range(options.seeds)]
    runs = with_needs(selected)
    for run in runs:
        # settings that are refused stop all of it before any of it
        _ = run.settings
    scored = set() if options.train_only else {run for run in selected if run.has_pipeline}
    if options.print_commands:
        for run in runs:
            print(shlex.join(training_command(run, plan.accelerate)))
            if run in scored:
                print(shlex.join(evaluation_command(run, plan)))
        return 0
    if scored:
        check_evaluation(plan.evaluation.judge, plan.evaluation.num_samples)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {})
    remedy = "wait for that call of ablate.py and all that it has started, or name another --output_dir."
    with lock_folder(plan.root, remedy) as lock:
        runner = runner or CommandRunner(environment, lock)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, runner.stop)
        problems = run_all(runs, partial(work_on, scored, plan, runner), options.jobs, runner)
        for table in [] if options.train_only else options.table:
            command = shlex.join(["python", "training/ablate.py", *arguments])
            print(f"table {table}: {write_table(table, plan, options.seeds, problems, command)}")
    return int(any(problem is not None for problem in problems.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
