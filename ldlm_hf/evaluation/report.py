"""The results of an evaluation for people, as Markdown."""

from __future__ import annotations

from typing import Any

from ..hub.model_card import fenced, sample_scores
from ..hub.run_files import Sample
from ..metrics.registry import COLUMNS as SCORE_COLUMNS
from .markdown import cell, markdown_table
from .real_text import REPEATED_WORDS


# what a set is measured by → heading, digits
COLUMNS = {name: (score.heading, score.digits) for name, score in SCORE_COLUMNS.items()} | {
    "seconds": ("sampling (s)", 1)
}
COUNTS = {"num_blank_texts": "blank", "num_unscored_texts": "unscored", "num_nonfinite_texts": "not finite"}


def results_text(results: dict[str, Any]) -> str:
    """The table, with real text and controls in rows of their own, and what its numbers depend on."""

    def row(names: list[str], mean: dict[str, Any], std: dict[str, Any], sets: list[dict[str, Any]]) -> list[str]:
        scores = [cell(mean.get(key), std.get(key), digits) for key, (_, digits) in COLUMNS.items()]
        counts = [
            "–" if any(one[key] is None for one in sets) else f"{sum(one[key] for one in sets):,}" for key in COUNTS
        ]
        return [*names, *scores, *counts]

    rows = [row(["real text", "", ""], results["real_text"], {}, [results["real_text"]])]
    for name, scores in results["controls"].items():
        rows.append(row([f"real text, {name.replace('_', ' ')}", "", ""], scores, {}, [scores]))
    for entry in results["pipelines"]:
        for one in entry["sets"]:
            names = [entry["name"], f"{one['steps']:,}", f"{one['nfe']:,}"]
            rows.append(row(names, one["mean"], one["std"], one["seeds"]))
    header = ["texts", "steps", "NFE", *(heading for heading, _ in COLUMNS.values()), *COUNTS.values()]
    sections = [
        "# Evaluation",
        "\n".join(markdown_table(header, rows)),
        "\n".join(f"- {line}" for line in conditions(results)),
        *interpolation_sections([entry for entry in results["pipelines"] if "interpolation" in entry]),
    ]
    return "\n\n".join(sections) + "\n"


def interpolation_sections(entries: list[dict[str, Any]]) -> list[str]:
    """The table of the lines between real texts, if any pipeline has decoded some."""
    if not entries:
        return []
    first = entries[0]["interpolation"]
    columns = ["Gen. PPL at", *(f"{position:.2f}" for position in first["positions"]), "roughness"]
    rows = []
    for entry in entries:
        curve = entry["interpolation"]
        perplexities = curve["generative_perplexity"] or [None] * len(first["positions"])
        cells = [cell(value, None, 1) for value in perplexities]
        rows.append([entry["name"], *cells, cell(curve["roughness"], None, 3)])
    return [
        "## Between two real texts",
        "\n".join(markdown_table(columns, rows)),
        f"{first['num_pairs']:,} pairs of real texts; the positions 0 and 1 are their reconstructions. Roughness: "
        "mean over the positions between of log Gen. PPL minus its straight line from end to end, in nats a token.",
    ]


def conditions(results: dict[str, Any]) -> list[str]:
    """What the numbers depend on, a line each."""
    settings, judge, mauve, reference = (results[key] for key in ("settings", "judge", "mauve", "reference"))
    seeds = settings["seeds"]
    lines = [
        f"{settings['num_samples']:,} texts of {results['pipelines'][0]['sequence_length']:,} tokens a set; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
        + ("." if len(seeds) == 1 else ": mean ± standard deviation; counts are of all seeds together.")
    ]
    if judge is not None:
        lines.append(
            f"Judge: `{judge['name']}`, texts cut to {judge['max_length']} of its tokens, no BOS, first token not "
            "scored. Gen. PPL is MDLM's convention, over the corpus; the trimmed mean over texts is COSMOS's."
        )
    if mauve is not None:
        lines.append(
            f"MAUVE: in the features of the same judge, against {mauve['num_texts']:,} other held-out texts, "
            f"{mauve['num_buckets']} clusters, seed {mauve['seed']}."
        )
    elif judge is None or not settings["mauve"]:
        lines.append("Not measured: " + ("MAUVE." if judge is not None else "perplexity and MAUVE (no judge)."))
    lines.append(f"Real text: held-out part of `{reference['source']}`, {reference['num_held_out']:,} sequences.")
    if results["controls"]:
        lines.append(
            f"Controls: the words of each real text in random order; {REPEATED_WORDS} neighbouring words of it over "
            f"and over, as many as it has (seed {settings['control_seed']})."
        )
    sizes = {
        size
        for entry in results["pipelines"]
        for one in entry["sets"]
        for s in one["seeds"]
        for size in s["batch_sizes"]
    }
    lines.append(
        f"Sampling: device seconds a set, in batches of {', '.join(map(str, sorted(sizes)))}, {settings['dtype']}, on "
        f"{results['hardware']}."
    )
    lines.append("With " + ", ".join(f"{name} {number}" for name, number in results["versions"].items()) + ".")
    return lines


def scored_samples_text(shown: dict[str, list[Sample]], results: dict[str, Any]) -> str:
    """Texts, each with its own Gen. PPL and entropy (App. I)."""
    judge = f"Judge: `{results['judge']['name']}`. " if results["judge"] else ""
    sections = [f"# Samples\n\n{judge}The first texts of each set, in order; none was picked."]
    for title, samples in shown.items():
        texts = [
            f"**{number}.** {sample_scores(sample)}\n\n{fenced(sample.text)}"
            for number, sample in enumerate(samples, 1)
        ]
        sections.append(f"## {title}\n\n" + "\n\n".join(texts))
    return "\n\n".join(sections) + "\n"
