"""The evaluation of pipelines that `evaluate.py` starts (Section 6, App. D, E and I).

It writes to its output folder

* `results.json`: every score of every seed, mean and standard deviation over seeds, settings, versions, hardware;
* `results.md`: the table, with real text and its controls in rows of their own;
* `samples.md`: the first texts of each set, each with its own Gen. PPL and entropy;
* the figures that the caller draws;
* `parts/`: what is finished. A killed evaluation goes on from there when the same command is given again; parts that
  were made under other settings are not found, and made anew. All processes must see the folder; it may be deleted
  afterwards.

`results.json` is written last. One evaluation at a time works in a folder; a second one is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from typing import Any, TextIO

import evaluate
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm

from ..data import DataSettings
from ..metrics.judge import load_judge
from .folder_lock import lock_folder
from .machine import hardware, keep_freed_memory, versions
from .options import EvaluationOptions
from .part_cache import FinishedParts, remove_half_written
from .plan import Plan, common_device, load_subjects, make_missing, make_plan
from .real_text import load_real_text
from .results import collect_results, write_results
from .scorer import Scorer, build_scorer


def evaluate_pipelines(options: EvaluationOptions, data: DataSettings, draw: Callable[[dict[str, Any]], None]) -> None:
    """Samples and scores pipelines beside real text, and writes the results; every process calls this.

    `draw` draws the figures of results, before `results.json` is written.

    Raises:
        OSError: a pipeline cannot be loaded, or another evaluation works in the folder.
        ValueError: pipelines, judge or text that do not go together.
    """
    accelerator = start_accelerator()
    # what would stop the evaluation later comes first: judge, pipelines, text
    judge = None if options.judge_name is None else load_judge(options.judge_name, device=accelerator.device)
    subjects, tokenizer = load_subjects(options)
    with accelerator.main_process_first():
        real = load_real_text(
            data,
            tokenizer,
            subjects[0].sequence_length,
            options.num_samples,
            with_references=options.with_mauve,
        )
    all_versions = versions() | {name: version(name) for name in ("evaluate", "mauve-text")}
    parts = FinishedParts(options.output_dir / "parts", all_versions)
    with lock_parts(parts) if accelerator.is_main_process else contextlib.nullcontext():
        plan = make_plan(subjects, real, options, parts, common_device(accelerator))
        make_missing(plan, options, accelerator)
        scorer = build_scorer(real, judge, tokenizer, options, parts, accelerator)
        score_missing(plan, scorer, options, accelerator)
        if accelerator.is_main_process:
            results, shown = collect_results(plan, scorer, options, data, hardware(accelerator.device))
            write_results(options.output_dir, results, shown, draw)
    accelerator.end_training()


def start_accelerator() -> Accelerator:
    """The processes of this evaluation; they wait for the one with the most work."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if not accelerator.is_main_process:
        evaluate.disable_progress_bar()
    return accelerator


def lock_parts(parts: FinishedParts) -> TextIO:
    """Takes the folder for this evaluation, and clears it of what one that was killed has left half-written.

    The main process does it; the others write nothing before they have waited for it.
    """
    lock = lock_folder(parts.folder, "wait for that evaluation, or name another --output_dir.")
    remove_half_written(parts.folder.parent, parts.folder, *parts.folder.iterdir())
    return lock


def score_missing(plan: Plan, scorer: Scorer, options: EvaluationOptions, accelerator: Accelerator) -> None:
    """Scores all sets, shared out by process; what is scored already is only read."""
    work: list[Callable[[], object]] = [scorer.score_real_text]
    work += [partial(scorer.score_control, name) for name in options.control_names]
    work += [partial(scorer.score_samples, samples) for samples in plan.sets]
    work += [partial(scorer.score_lines, lines) for lines in plan.lines]
    mine = work[accelerator.process_index :: accelerator.num_processes]
    for score in tqdm(mine, desc="Sets scored", disable=not accelerator.is_main_process):
        score()
    accelerator.wait_for_everyone()
