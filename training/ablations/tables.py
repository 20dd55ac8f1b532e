"""The paper's ablation tables from what the runs have left: Markdown for people, JSON for scripts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ablations.definitions import Table
from ablations.runs import AblationRun, Plan, check_finished, read_held_out, read_scores, scaled_values
from ldlm_hf.evaluation.markdown import cell, human_count, markdown_table
from ldlm_hf.evaluation.provenance import without_path
from ldlm_hf.evaluation.report import COLUMNS, COUNTS, conditions
from ldlm_hf.objective.warmup import warmup_gate
from ldlm_hf.training.settings import MACHINE_SETTINGS, RunSettings


# why a run that nobody has worked on now has no scores
NOT_RUN, NOT_EVALUATED = "not run", "not evaluated as asked"


@dataclass(frozen=True)
class RowResults:
    """A row of a table: the runs that were evaluated, with their `results.json`, and why the others were not."""

    group: str
    label: str
    run: AblationRun  # of the first training seed
    measured: dict[AblationRun, dict[str, Any]]
    problems: dict[AblationRun, str]

    def over_seeds(self, name: str) -> tuple[float | None, float | None]:
        """Mean and standard deviation (with n - 1) of a score.

        Over training seeds, each one's mean over its sampling seeds; over the sampling seeds of a single one.
        """
        sets = [scores["pipelines"][0]["sets"][0] for scores in self.measured.values()]
        means = [one["mean"].get(name) for one in sets]
        if len(sets) == 1:
            return means[0], sets[0]["std"].get(name)
        return mean_and_deviation([] if None in means else means)

    def held_out_accuracy(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation over training seeds of the held-out token accuracy from clean latents."""
        return mean_and_deviation([read_held_out(run)["reconstruction_accuracy"] for run in self.measured])


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (with n - 1); None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def write_table(number: str, plan: Plan, seeds: int, problems: Mapping[AblationRun, str | None], command: str) -> Path:
    """Writes a table as `table-N.md` and `table-N.json` beside the runs; the former.

    Of runs that were not worked on, so that they are not in `problems`, it shows what they have left.
    """
    definition = plan.ablations.tables[number]
    rows = [
        row_results(group.title, label, [plan.run(name, seed) for seed in range(seeds)], plan, problems)
        for group in definition.groups
        for name, label in group.rows.items()
    ]
    file = plan.root / f"table-{number}.md"
    file.write_text(table_text(number, definition, rows, plan, command), encoding="utf-8")
    values = {
        "table": number,
        "title": definition.title,
        "reference": definition.reference,
        "command": command,
        "base": plan.base_name,
        "scale": plan.scale,
        "overrides": described(plan.overrides),
        "evaluation": asdict(plan.evaluation),
        "real_text": real_texts(rows),
        "rows": [row_values(row) for row in rows],
    }
    content = json.dumps(values, indent=1, ensure_ascii=False)
    file.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    return file


def row_results(
    group: str, label: str, runs: list[AblationRun], plan: Plan, problems: Mapping[AblationRun, str | None]
) -> RowResults:
    """A row from the folders of its runs."""
    measured, missing = {}, {}
    for run in runs:
        scores, problem = None, problems.get(run)
        try:
            if problem is None:
                is_finished = check_finished(run)
                scores = read_scores(run, plan.evaluation) if is_finished else None
                problem = NOT_EVALUATED if is_finished else NOT_RUN
        except (OSError, ValueError) as error:
            problem = str(error)
        if scores is None:
            missing[run] = problem
        else:
            measured[run] = scores
    # a label may name any setting of its run, a folder too
    return RowResults(group, without_path(label.format(**vars(runs[0].settings))), runs[0], measured, missing)


def table_text(number: str, definition: Table, rows: Sequence[RowResults], plan: Plan, command: str) -> str:
    """The table, real text in rows of its own, what is missing from it and why, and what its numbers depend on."""
    names = definition.columns
    header = ["", *(COLUMNS[name][0] for name in names), "held-out token accuracy ↑", "training seeds"]
    lines = [
        [label, *(cell(scores.get(name), None, COLUMNS[name][1]) for name in names), "", ""]
        for label, scores in real_texts(rows).items()
    ]
    previous = None
    for row in rows:
        if row.group != previous:
            lines.append([f"**{row.group}**", *[""] * (len(header) - 1)])
            previous = row.group
        if row.measured:
            cells = [cell(*row.over_seeds(name), COLUMNS[name][1]) for name in names]
            cells += [cell(*row.held_out_accuracy(), 3), ", ".join(str(run.seed) for run in row.measured)]
        else:
            # the worst of it: a seed that has failed
            missing = [one if one in (NOT_EVALUATED, NOT_RUN) else "failed" for one in row.problems.values()]
            cells = [min(missing), *[""] * (len(header) - 2)]
        lines.append([row.label, *cells])
    sections = [
        f"# Table {number}: {definition.title}",
        f"The rows of the paper's {definition.reference}, on the base `{plan.base_name}`. Written by\n\n    {command}",
        "\n".join(markdown_table(header, lines)),
        "\n".join(f"- {remark}" for remark in dict.fromkeys(note for row in rows for note in notes(row, plan))),
        "## What was run\n\n" + "\n".join(f"- {line}" for line in what_was_run(rows, plan)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def real_texts(rows: Sequence[RowResults]) -> dict[str, dict[str, Any]]:
    """Scores of real text, by label: of each tokenizer, since texts of as many tokens are others with another one."""
    found = {without_path(run.tokenizer): scores["real_text"] for row in rows for run, scores in row.measured.items()}
    if len(found) == 1:
        return {"Real text": next(iter(found.values()))}
    return {f"Real text, in tokens of {tokenizer}": scores for tokenizer, scores in found.items()}


def notes(row: RowResults, plan: Plan) -> list[str]:
    """What a reader of a row has to know: runs that have failed, texts that were not scored, values of ours."""
    found = [
        f"{run.name}: failed: {problem}"
        for run, problem in row.problems.items()
        if problem not in (NOT_EVALUATED, NOT_RUN)
    ]
    for run, scores in row.measured.items():
        for one in scores["pipelines"][0]["sets"][0]["seeds"]:
            counts = ", ".join(f"{one[key]} {what}" for key, what in COUNTS.items() if one[key])
            if counts:
                found.append(f"{run.name}, sampling seed {one['seed']}: {counts} of {one['num_texts']} texts.")
    gate = last_gate(row.run)
    if row.measured and gate is not None and gate < 1:
        found.append(f"{row.group}, {row.label}: the run ends before its warmup does; its last gate is {gate:.2g}.")
    note = plan.ablations.rows[row.run.row].note
    return found if note is None else [*found, note]


def last_gate(run: AblationRun) -> float | None:
    """gamma at a run's last step (Eq. 29–30); None where no latent encoder is trained beside a denoiser."""
    settings = run.settings
    if not isinstance(settings, RunSettings) or settings.stage != "joint":
        return None
    if settings.model.latent_encoder.get("architecture") == "identity":
        return None
    warmup = settings.warmup
    return warmup_gate(settings.loop.max_steps - 1, warmup.steps, warmup.midpoint, warmup.steepness)


def what_was_run(rows: Sequence[RowResults], plan: Plan) -> list[str]:
    """Base, scale, sizes, seeds, machines and judge, a line each."""
    values = plan.base_values | scaled_values(plan.base_values, plan.scale)
    lines = [
        f"Base `{plan.base_name}` ({plan.base.config}) at scale {plan.scale:g}: {values['loop.max_steps']:,} steps of "
        f"{values['loop.batch_size']} sequences of {values['model.sequence_length']} tokens, warmup "
        f"{values['warmup.steps']:,} steps, decoder noise {values['objective.decoder_noise']:g}, where a row does not "
        "say otherwise.",
        *(f"For all rows: `{override}`." for override in described(plan.overrides)),
    ]
    measured = {run: scores for row in rows for run, scores in row.measured.items()}
    if not measured:
        return lines
    trained = [json.loads((run.folder / "results.json").read_text(encoding="utf-8")) for run in measured]
    sizes = ", ".join(f"{name} {human_count(size)}" for name, size in trained[0]["parameters"].items())
    minutes = sorted({f"{one['seconds'] / 60:.1f}" for one in trained}, key=float)
    return [
        *lines,
        "±: with several training seeds the standard deviation over them, of each one's mean over its sampling seeds; "
        "with one, that over its sampling seeds.",
        f"Parameters of {next(iter(measured)).row}: {sizes}.",
        f"Trained on {' and '.join(dict.fromkeys(one['hardware'] for one in trained))}; "
        f"{' to '.join(dict.fromkeys([minutes[0], minutes[-1]]))} minutes a run.",
        # each once: rows may have been scored on several machines, with several versions, or with tokens of their own
        *dict.fromkeys(line for scores in measured.values() for line in conditions(scores)),
    ]


def described(overrides: Sequence[str]) -> list[str]:
    """Overrides without what says where the machine keeps files."""
    pairs = [override.split("=", 1) for override in overrides]
    return [f"{key}={without_path(value)}" for key, value in pairs if key not in MACHINE_SETTINGS]


def row_values(row: RowResults) -> dict[str, Any]:
    """A row with every number that went into it."""
    scores = {name: row.over_seeds(name) for name in (*COLUMNS, *COUNTS)}
    accuracy, deviation = row.held_out_accuracy()
    runs = []
    for run in sorted([*row.measured, *row.problems], key=lambda run: run.seed):
        values: dict[str, Any] = {"row": run.row, "seed": run.seed, "overrides": described(run.overrides)}
        if run in row.problems:
            values["problem"] = row.problems[run]
        else:
            measured = row.measured[run]
            sampled = measured["pipelines"][0]["sets"][0]["seeds"]
            values |= {"held_out": read_held_out(run), "hardware": measured["hardware"], "samples": sampled}
        runs.append(values)
    return {
        "group": row.group,
        "label": row.label,
        "mean": {name: mean for name, (mean, _) in scores.items()},
        "std": {name: std for name, (_, std) in scores.items()},
        "held_out_accuracy": accuracy,
        "held_out_accuracy_std": deviation,
        "runs": runs,
    }
