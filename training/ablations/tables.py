"""The paper's ablation tables from what the runs have left: Markdown for people, JSON for scripts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablations.runs import AblationRun, Plan, check_finished, read_held_out, read_scores, scaled_values
from ldlm_hf.evaluation.markdown import cell, markdown_table
from ldlm_hf.evaluation.provenance import without_path
from ldlm_hf.evaluation.report import COLUMNS, COUNTS, conditions
from ldlm_hf.training.settings import MACHINE_SETTINGS


# why a run that nobody has worked on now has no scores
NOT_RUN, NOT_EVALUATED = "not run", "not evaluated as asked"


def write_table(number: str, plan: Plan, seeds: int, problems: Mapping[AblationRun, str | None], command: str) -> Path:
    """Writes a table as `table-N.md` and `table-N.json` beside the runs; the former.

    Of runs that were not worked on, so that they are not in `problems`, it shows what they have left.
    """
    definition = plan.ablations.tables[number]
    runs = {name: [plan.run(name, seed) for seed in range(seeds)] for name in definition.rows}
    outcomes = {run: read_outcome(run, plan, problems.get(run)) for some in runs.values() for run in some}
    measured = {run: outcome for run, outcome in outcomes.items() if isinstance(outcome, dict)}
    values = {
        "table": number,
        "title": definition.title,
        "reference": definition.reference,
        "command": command,
        "base": plan.base_name,
        "scale": plan.scale,
        "overrides": described(plan.overrides),
        "evaluation": asdict(plan.evaluation),
        "real_text": real_texts(measured),
        "rows": [
            row_values(group.title, label, runs[name], outcomes)
            for group in definition.groups
            for name, label in group.rows.items()
        ],
    }
    file = plan.root / f"table-{number}.md"
    # each once: runs may have been scored on several machines, with several versions, or with tokens of their own
    of_scores = list(dict.fromkeys(line for scores in measured.values() for line in conditions(scores)))
    file.write_text(table_text(values, plan, of_scores), encoding="utf-8")
    content = json.dumps(values, indent=1, ensure_ascii=False)
    file.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    return file


def read_outcome(run: AblationRun, plan: Plan, problem: str | None) -> dict[str, Any] | str:
    """The `results.json` of a run's evaluation, or why there is none."""
    if problem is not None:
        return problem
    try:
        if not check_finished(run):
            return NOT_RUN
        return read_scores(run, plan.evaluation) or NOT_EVALUATED
    except (OSError, ValueError) as error:
        return str(error)


def row_values(
    group: str, label: str, runs: Sequence[AblationRun], outcomes: Mapping[AblationRun, dict[str, Any] | str]
) -> dict[str, Any]:
    """A row with every number that goes into it.

    Means and standard deviations are over training seeds, of each one's mean over its sampling seeds; of a single
    training seed over its sampling seeds.
    """
    values = [run_values(run, outcomes[run]) for run in runs]
    results = [outcome for outcome in (outcomes[run] for run in runs) if isinstance(outcome, dict)]
    sets = [one["pipelines"][0]["sets"][0] for one in results]
    scores = {}
    for name in (*COLUMNS, *COUNTS):
        means = [one["mean"].get(name) for one in sets]
        scores[name] = mean_and_deviation([] if None in means else means)
        if len(sets) == 1:
            scores[name] = means[0], sets[0]["std"].get(name)
    accuracy, deviation = mean_and_deviation(
        [one["held_out"]["reconstruction_accuracy"] for one in values if "held_out" in one]
    )
    return {
        "group": group,
        # a label may name any setting of its run, a folder too
        "label": without_path(label.format(**vars(runs[0].settings))),
        "mean": {name: mean for name, (mean, _) in scores.items()},
        "std": {name: std for name, (_, std) in scores.items()},
        "held_out_accuracy": accuracy,
        "held_out_accuracy_std": deviation,
        "runs": values,
    }


def run_values(run: AblationRun, outcome: dict[str, Any] | str) -> dict[str, Any]:
    """What is known of a run."""
    values = {"row": run.row, "seed": run.seed, "overrides": described(run.overrides)}
    if isinstance(outcome, str):
        return values | {"problem": outcome}
    samples = outcome["pipelines"][0]["sets"][0]["seeds"]
    return values | {"held_out": read_held_out(run), "hardware": outcome["hardware"], "samples": samples}


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (with n - 1); None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def real_texts(measured: Mapping[AblationRun, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores of real text, by label: of each tokenizer, since texts of as many tokens are others with another one."""
    found = {without_path(run.tokenizer): scores["real_text"] for run, scores in measured.items()}
    if len(found) == 1:
        return {"Real text": next(iter(found.values()))}
    return {f"Real text, in tokens of {tokenizer}": scores for tokenizer, scores in found.items()}


def described(overrides: Sequence[str]) -> list[str]:
    """Overrides without what says where the machine keeps files."""
    pairs = [override.split("=", 1) for override in overrides]
    return [f"{key}={without_path(value)}" for key, value in pairs if key not in MACHINE_SETTINGS]


def table_text(values: Mapping[str, Any], plan: Plan, of_scores: Sequence[str]) -> str:
    """The table, real text in rows of its own, what is missing from it and why, and what its numbers depend on."""
    names = plan.ablations.tables[values["table"]].columns
    header = ["", *(COLUMNS[name][0] for name in names), "held-out token accuracy ↑", "training seeds"]
    lines = [
        [label, *(cell(scores.get(name), None, COLUMNS[name][1]) for name in names), "", ""]
        for label, scores in values["real_text"].items()
    ]
    previous = None
    for row in values["rows"]:
        if row["group"] != previous:
            lines.append([f"**{row['group']}**", *[""] * (len(header) - 1)])
            previous = row["group"]
        seeds = [str(run["seed"]) for run in row["runs"] if "samples" in run]
        if seeds:
            cells = [cell(row["mean"][name], row["std"][name], COLUMNS[name][1]) for name in names]
            cells += [cell(row["held_out_accuracy"], row["held_out_accuracy_std"], 3), ", ".join(seeds)]
        else:
            # the worst of it: a seed that has failed
            missing = ["failed" if has_failed(run) else run["problem"] for run in row["runs"]]
            cells = [min(missing), *[""] * (len(header) - 2)]
        lines.append([row["label"], *cells])
    base = plan.base_values | scaled_values(plan.base_values, plan.scale)
    what_was_run = [
        f"Base `{plan.base_name}` ({plan.base.config}) at scale {plan.scale:g}: {base['loop.max_steps']:,} steps of "
        f"{base['loop.batch_size']} sequences of {base['model.sequence_length']} tokens, where a row does not say "
        "otherwise.",
        *(f"For all rows: `{override}`." for override in values["overrides"]),
        "±: with several training seeds the standard deviation over them, of each one's mean over its sampling seeds; "
        "with one, that over its sampling seeds.",
        *of_scores,
    ]
    sections = [
        f"# Table {values['table']}: {values['title']}",
        f"The rows of the paper's {values['reference']}, on the base `{plan.base_name}`. Written by\n\n"
        f"    {values['command']}",
        "\n".join(markdown_table(header, lines)),
        "\n".join(f"- {note}" for note in notes(values["rows"], plan)),
        "## What was run\n\n" + "\n".join(f"- {line}" for line in what_was_run),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def has_failed(run: Mapping[str, Any]) -> bool:
    """Whether a run has been worked on in vain."""
    return run.get("problem", NOT_RUN) not in (NOT_RUN, NOT_EVALUATED)


def notes(rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[str]:
    """What a reader of the rows has to know, each once: runs that have failed, texts not scored, values of ours."""
    found = []
    for run in (run for row in rows for run in row["runs"]):
        name = f"{run['row']} (seed {run['seed']})"
        if has_failed(run):
            found.append(f"{name}: failed: {run['problem']}")
        for one in run.get("samples", []):
            counts = ", ".join(f"{one[key]} {what}" for key, what in COUNTS.items() if one[key])
            if counts:
                found.append(f"{name}, sampling seed {one['seed']}: {counts} of {one['num_texts']} texts.")
    of_rows = [plan.ablations.rows[run["row"]].note for row in rows for run in row["runs"]]
    return list(dict.fromkeys([*found, *filter(None, of_rows)]))
