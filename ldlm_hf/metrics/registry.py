"""Every score of a set of texts: how it is measured, and how results, tables, figures and cards show it.

A new score is a function and one entry of `SCORES`, whose key is its name in `results.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ldlm_hf.metrics.text_set import TextSet


@dataclass(frozen=True)
class Score:
    """A score.

    Attributes:
        title: of columns and axes, with the unit if it has one.
        digits: behind the point.
        better: whether higher or lower is better.
        measure: its value for a set; None where it cannot be measured.
        needs_judge: whether it is None without a judge.
        is_logarithmic: whether its axis is.
        is_main: whether figures, comparisons and cards show it; the table of an evaluation shows all scores.
    """

    title: str
    digits: int
    better: Literal["higher", "lower"]
    measure: Callable[[TextSet], float | None]
    needs_judge: bool = False
    is_logarithmic: bool = False
    is_main: bool = True

    @property
    def heading(self) -> str:
        """The title and an arrow to where it is better."""
        return f"{self.title} {'↑' if self.better == 'higher' else '↓'}"


# in the order of results.json
SCORES: dict[str, Score] = {
    "entropy": Score("entropy (nats)", 3, "higher", lambda texts: texts.entropy["entropy"]),
    "diversity": Score("diversity", 3, "higher", lambda texts: texts.diversity["diversity"]),
    "generative_perplexity": Score(
        "Gen. PPL",
        1,
        "lower",
        lambda texts: texts.perplexity.get("perplexity"),
        needs_judge=True,
        is_logarithmic=True,
    ),
    "mauve": Score("MAUVE", 3, "higher", lambda texts: texts.mauve.get("mauve"), needs_judge=True),
    "trimmed_mean_perplexity": Score(
        "trimmed mean PPL",
        1,
        "lower",
        lambda texts: texts.perplexity.get("trimmed_mean_perplexity"),
        needs_judge=True,
        is_logarithmic=True,
        is_main=False,
    ),
}


def column_order(name: str) -> tuple[bool, bool, str]:
    """Sorts names of scores: first those of a judge, of these first those that are better lower, then by title."""
    score = SCORES[name]
    return not score.needs_judge, score.better == "higher", score.title.lower()


# in the order of columns and panels
COLUMNS = {name: SCORES[name] for name in sorted(SCORES, key=column_order)}
MAIN_COLUMNS = {name: score for name, score in COLUMNS.items() if score.is_main}
