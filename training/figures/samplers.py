"""Which sampler is best for how many evaluations of the denoiser: tables and figures."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from matplotlib.figure import Figure

from figures.evaluation import draw_curve
from figures.style import legend_below, run_style
from ldlm_hf.evaluation.markdown import cell, markdown_table
from ldlm_hf.hub.training_curves import WIDTH
from ldlm_hf.metrics.registry import MAIN_COLUMNS
from ldlm_hf.schedulers.scheduling_tangent import TIME_GRIDS


# what a curve is called whose sampler names no grid: its scheduler's own
OWN_GRID = "own"
ALL_GRIDS = (*TIME_GRIDS, OWN_GRID)
# the figures, and the two scores that each one shows
FIGURES = {"samplers_perplexity": ("generative_perplexity", "entropy"), "samplers_mauve": ("mauve", "diversity")}


@dataclass(frozen=True)
class ScoredSampler:
    """A pipeline and how it is sampled, with the sets of a results file by their evaluations of the denoiser."""

    name: str
    sets: dict[int, dict[str, Any]]

    @property
    def label(self) -> str:
        """The name without what all schedulers' names share."""
        return self.name.replace("Tangent", "").replace("Scheduler", "")

    def within(self, budget: int) -> dict[str, Any] | None:
        """The set of most evaluations within a budget, and more than half of it: guidance takes odd numbers."""
        counts = [nfe for nfe in self.sets if budget / 2 < nfe <= budget]
        return self.sets[max(counts)] if counts else None


def scored_samplers(results: Sequence[dict[str, Any]]) -> list[ScoredSampler]:
    """All samplers of the files, in their order; sets of one name are joined; ValueError if one is there twice."""
    samplers: dict[str, ScoredSampler] = {}
    for entry in (entry for one in results for entry in one["pipelines"]):
        sampler = samplers.setdefault(entry["name"], ScoredSampler(entry["name"], {}))
        for one in entry["sets"]:
            if one["nfe"] in sampler.sets:
                raise ValueError(
                    f"{entry['name']!r} has been scored twice with {one['nfe']} evaluations: leave out a file."
                )
            sampler.sets[one["nfe"]] = one
    return list(samplers.values())


def budgets_of(samplers: Sequence[ScoredSampler]) -> list[int]:
    """Powers of two that cover all evaluations, without those that no set is of."""
    most = max(nfe for sampler in samplers for nfe in sampler.sets)
    powers = [2**power for power in range(math.ceil(math.log2(most)) + 1)]
    return [budget for budget in powers if any(sampler.within(budget) is not None for sampler in samplers)]


def best_rows(
    samplers: Sequence[ScoredSampler], budgets: Sequence[int], score: str, lowest_entropy: float = 0.0
) -> list[list[str]]:
    """A row a budget: the sampler of the best score among those of enough entropy, with all its scores."""
    best_of = min if MAIN_COLUMNS[score].better == "lower" else max
    rows = []
    for budget in budgets:
        candidates = [
            (one["mean"][score], sampler, one)
            for sampler in samplers
            if (one := sampler.within(budget)) is not None
            and one["mean"][score] is not None
            and one["mean"]["entropy"] >= lowest_entropy
        ]
        if candidates:
            _, sampler, one = best_of(candidates, key=itemgetter(0))
            rows.append(all_scores(str(budget), sampler, one))
        else:
            rows.append([str(budget), "none", "", *[""] * len(MAIN_COLUMNS)])
    return rows


def all_scores(title: str, sampler: ScoredSampler, one: dict[str, Any]) -> list[str]:
    """A row with one of a sampler's sets."""
    return [title, f"`{sampler.label}`", str(one["nfe"]), *[score_cell(one, name) for name in MAIN_COLUMNS]]


def score_cell(one: dict[str, Any] | None, score: str) -> str:
    """Mean and standard deviation over seeds."""
    return "" if one is None else cell(one["mean"].get(score), one["std"].get(score), MAIN_COLUMNS[score].digits)


def report(
    results: Sequence[dict[str, Any]],
    samplers: Sequence[ScoredSampler],
    reference: ScoredSampler,
    reference_nfe: int,
    tolerance: float,
) -> str:
    """What samplers.md says, from the files and the samplers in them."""
    budgets = budgets_of(samplers)
    anchor = reference.sets[reference_nfe]
    lowest_entropy = (1 - tolerance) * anchor["mean"]["entropy"]
    first = results[0]
    of_real_text = {
        name: cell(first["real_text"].get(name), None, score.digits) for name, score in MAIN_COLUMNS.items()
    }
    anchors = [all_scores("reference", reference, anchor), ["", "real text", "", *of_real_text.values()]]
    heading = ["at most", "sampler", "NFE", *[score.heading for score in MAIN_COLUMNS.values()]]
    by_perplexity = best_rows(samplers, budgets, "generative_perplexity", lowest_entropy)
    sections = [
        "# Samplers",
        "## The best for each number of evaluations",
        f"Lowest Gen. PPL among samplers whose entropy is at least {lowest_entropy:.3f} nats: {tolerance:.0%} less "
        f"than that of {reference_nfe} evaluations of `{reference.label}`.",
        "\n".join(markdown_table(heading, by_perplexity + anchors)),
        "Highest MAUVE, whatever the entropy:",
        "\n".join(markdown_table(heading, best_rows(samplers, budgets, "mauve") + anchors)),
    ]
    sections += score_tables(samplers, budgets, first["real_text"])
    seeds = sorted({len(one["seeds"]) for sampler in samplers for one in sampler.sets.values()})
    sections.append(
        f"- Mean ± standard deviation over {' or '.join(map(str, seeds))} sampling seeds of "
        f"{first['settings']['num_samples']} texts of {first['pipelines'][0]['sequence_length']} tokens, "
        f"{first['settings']['dtype']}, on {first['hardware']}.\n"
        f"- Judge: `{first['judge']['name']}`. Guidance takes two evaluations in each step but the first."
    )
    return "\n\n".join(sections)


def score_tables(samplers: Sequence[ScoredSampler], budgets: Sequence[int], real_text: dict[str, Any]) -> list[str]:
    """Sections with a table of each score over the evaluations."""
    sections = []
    for name, score in MAIN_COLUMNS.items():
        rows = [
            [f"`{sampler.label}`", *[score_cell(sampler.within(budget), name) for budget in budgets]]
            for sampler in samplers
        ]
        table = markdown_table(["evaluations, at most", *map(str, budgets)], rows)
        of_real_text = cell(real_text.get(name), None, score.digits)
        sections += [f"## {score.heading}", f"Real text: {of_real_text}.", "\n".join(table)]
    return sections


def plot_samplers(
    real_text: dict[str, Any], samplers: Sequence[ScoredSampler], reference: ScoredSampler, scores: tuple[str, str]
) -> Figure:
    """Two scores over evaluations, a row a solver and a curve a time grid, the reference in grey."""
    budgets = budgets_of(samplers)
    families: dict[str, list[ScoredSampler]] = {}
    for sampler in samplers:
        families.setdefault(family_and_grid(sampler)[0], []).append(sampler)
    figure = Figure(figsize=(WIDTH, 1 + 2.2 * len(families)), layout="constrained")
    rows = figure.subplots(len(families), 2, squeeze=False, sharex=True, sharey="col")
    for row, (family, members) in zip(rows, families.items(), strict=True):
        row[0].set_title(family, fontsize="small", loc="left")
        for axes, score in zip(row, scores, strict=True):
            draw_curve(axes, reference.sets.values(), score, color="0.7", linewidth=3)
            for sampler in members:
                style = run_style(ALL_GRIDS.index(family_and_grid(sampler)[1]))
                draw_curve(axes, sampler.sets.values(), score, linewidth=1.2, markersize=4, **style)
            if real_text.get(score) is not None:
                axes.axhline(real_text[score], color="black", linewidth=0.8, linestyle=":")
            axes.set(xscale="log", yscale="log" if MAIN_COLUMNS[score].is_logarithmic else "linear")
            axes.set_xticks(budgets, map(str, budgets), fontsize="x-small")
            axes.minorticks_off()
            axes.set_ylabel(MAIN_COLUMNS[score].heading, fontsize="small")
    legend_below(figure, {place: f"time grid: {grid}" for place, grid in enumerate(ALL_GRIDS)})
    figure.suptitle(f"Over NFE. Dotted: real text. Grey: {reference.label}.", fontsize="small", x=0.01, ha="left")
    return figure


def family_and_grid(sampler: ScoredSampler) -> tuple[str, str]:
    """`DDIM:eta=1.0,time_grid=learned` → `DDIM:eta=1.0` and `learned`; `own` where none is named."""
    grid = re.search(r"[:,]time_grid=(\w+)", sampler.label)
    return (sampler.label, OWN_GRID) if grid is None else (sampler.label.replace(grid[0], ""), grid[1])


def find_reference(samplers: Sequence[ScoredSampler], name: str | None, nfe: int) -> ScoredSampler:
    """The sampler of a name, by default the first of the paper's solver, otherwise of a pipeline's own."""
    if name is None:
        paper = [sampler for sampler in samplers if "EulerMaruyama" in sampler.name]
        # of an evaluation without --samplers, the name is the pipeline's alone
        named = paper or [sampler for sampler in samplers if ", " not in sampler.name or sampler.name.endswith("own")]
    else:
        named = [sampler for sampler in samplers if sampler.name == name]
    if not named or nfe not in named[0].sets:
        known = "; ".join(f"{sampler.name} ({', '.join(map(str, sorted(sampler.sets)))})" for sampler in samplers)
        sought = "the paper's solver or a pipeline's own" if name is None else repr(name)
        raise ValueError(
            f"No reference {sought} with --reference_nfe {nfe}: choose --reference and --reference_nfe. The results "
            f"have: {known}."
        )
    return named[0]
