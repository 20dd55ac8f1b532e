"""The paper's Tables 3, 8 and 9 and Figure 1 from what runs and evaluations have left: Markdown, pictures, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablations.runs import check_finished
from ablations.tables import described
from figures.evaluation import plot_pareto
from figures.frontier import plot_frontier
from figures.result_files import read_results
from figures.samplers import budgets_of, score_tables, scored_samplers
from figures.style import save_figure
from ldlm_hf.evaluation.markdown import human_count, markdown_table
from ldlm_hf.hub.run_files import RunResults
from ldlm_hf.training.flops import human_duration, human_flops
from methods.runs import Evaluation, MethodPlan, MethodRun


def write_report(wanted: Sequence[Evaluation], plan: MethodPlan, command: str) -> Path:
    """Writes methods.md, methods.json and the pictures into the comparison's folder; the first.

    Of what has not been trained or evaluated as asked nothing is shown but that.
    """
    done = [(one, results) for one in wanted if (results := one.results()) is not None]
    of_steps = [named(one, results) for one, results in done if one.kind == "steps"]
    frontiers = {one.title: results for one, results in done if one.kind == "frontier"}
    costs = [cost_of(run, plan) for run in dict.fromkeys(one.run for one, _ in done)]
    values = {
        "command": command,
        "base": plan.base_name,
        "equal": plan.equal,
        "reference": plan.base.reference,
        "reference_steps": plan.base.steps,
        "overrides": described(plan.overrides),
        "runs": costs,
        "evaluations": of_steps,
        "frontiers": frontiers,
    }
    plan.root.mkdir(parents=True, exist_ok=True)
    content = json.dumps(values, indent=1, ensure_ascii=False)
    (plan.root / "methods.json").write_text(content + "\n", encoding="utf-8")
    sections = [
        f"# Methods on {plan.base_name}",
        f"Written by\n\n    {command}",
        "## Training\n\n" + "\n".join(cost_table(costs)) + "\n\n" + equality(plan),
    ]
    if of_steps and plan.evaluation.judge is not None:
        read_results([one.folder / "results.json" for one, _ in done])  # refuses results that do not compare
        save_figure(plot_pareto(of_steps), plan.root / "methods")
        samplers = scored_samplers(of_steps)
        sections += score_tables(samplers, budgets_of(samplers), of_steps[0]["real_text"])
        sections.append("## Seconds of sampling a text\n\n" + "\n".join(time_table(of_steps)))
        sections.append("![Gen. PPL against entropy](methods.png)")
    if frontiers and plan.evaluation.judge is not None:
        save_figure(plot_frontier(frontiers), plan.root / "frontier")
        sections.append(
            f"## Temperature and noise\n\nOther samplers in {plan.evaluation.frontier_nfe} evaluations.\n\n"
            "![Gen. PPL against entropy by sampler](frontier.png)"
        )
    sections.append("## What was measured\n\n" + "\n".join(f"- {line}" for line in notes(wanted, done)))
    file = plan.root / "methods.md"
    file.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return file


def named(one: Evaluation, results: dict[str, Any]) -> dict[str, Any]:
    """Results whose only entry has the method's title."""
    (entry,) = results["pipelines"]
    return results | {"pipelines": [entry | {"name": one.title}]}


def cost_of(run: MethodRun, plan: MethodPlan) -> dict[str, Any]:
    """What a finished run has cost; of a distilled method what it started from has cost is stated apart."""
    assert check_finished(run), "only weights that are there are evaluated"
    results = RunResults.load(run.folder / "results.json")
    steps = run.settings.loop.max_steps
    return {
        "name": run.row,
        "title": plan.methods.methods[run.row].title,
        "seed": run.seed,
        "parameters": sum(results.parameters.values()),
        "flops_of_step": run.flops_of_step,
        "steps": steps,
        "flops": run.flops_of_step * steps,
        "seconds": results.seconds,
        "hardware": results.hardware,
        "started_from": None if run.needs is None else run.needs.row,
    }


def cost_table(costs: Sequence[dict[str, Any]]) -> list[str]:
    """Table 3, left: what training has cost."""
    rows = [
        [
            one["title"] + (f", beyond {one['started_from']}" if one["started_from"] else ""),
            str(one["seed"]),
            human_count(one["parameters"]),
            human_flops(one["flops_of_step"]),
            f"{one['steps']:,}",
            human_flops(one["flops"]),
            human_duration(one["seconds"]),
            one["hardware"],
        ]
        for one in costs
    ]
    header = ["method", "seed", "parameters", "a step", "steps", "all steps", "time", "on"]
    return markdown_table(header, rows)


def time_table(of_steps: Sequence[dict[str, Any]]) -> list[str]:
    """Table 3, right: what sampling has cost, in batches as the evaluation had them."""
    samplers = scored_samplers(of_steps)
    budgets = budgets_of(samplers)
    count = of_steps[0]["settings"]["num_samples"]
    rows = []
    for sampler in samplers:
        sets = [sampler.within(budget) for budget in budgets]
        rows.append([sampler.label, *("" if one is None else f"{one['mean']['seconds'] / count:.3g}" for one in sets)])
    return markdown_table(["evaluations, at most", *map(str, budgets)], rows)


def equality(plan: MethodPlan) -> str:
    """What the runs have in common."""
    reference = plan.methods.methods[plan.base.reference].title
    if plan.equal == "steps":
        return f"As many steps for all, {plan.base.steps:,}; distilled methods have their share more."
    return (
        f"As many model FLOPs (matrix products, forward and backward) as {reference} has in {plan.base.steps:,} "
        "steps; distilled methods have theirs beyond what they start from."
    )


def notes(wanted: Sequence[Evaluation], done: Sequence[tuple[Evaluation, dict[str, Any]]]) -> list[str]:
    """What is missing, and what the numbers depend on."""
    found = dict.fromkeys(one.title for one, _ in done)
    missing = dict.fromkeys(one.title for one in wanted if one.title not in found)
    lines = [f"Not trained, or not evaluated as asked: {', '.join(missing)}."] if missing else []
    for _, results in done[:1]:
        settings = results["settings"]
        lines.append(
            f"{settings['num_samples']:,} texts of {results['pipelines'][0]['sequence_length']} tokens a set, "
            f"sampling seeds {', '.join(map(str, settings['seeds']))}, {settings['dtype']}; judge "
            f"{'none' if results['judge'] is None else results['judge']['name']}."
        )
    lines += [f"{one.title}: sampled by `{one.samplers[0]}`." for one, _ in done if one.kind == "steps"]
    return [*lines, *(f"Sampling on {one}." for one in sorted({results["hardware"] for _, results in done}))]
