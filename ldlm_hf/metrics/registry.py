"""Every score of a set of texts: how it is measured, and how results, tables, figures and cards show it.

A new score is a function and one entry of `SCORES`, whose key is its name in `results.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ldlm_hf.metrics.generative_perplexity import generative_perplexity
from ldlm_hf.metrics.judge import Judge
from ldlm_hf.metrics.mauve import MAX_TEXT_LENGTH, MIN_MAUVE_TEXTS, mauve
from ldlm_hf.metrics.ngram_diversity import ngram_diversity
from ldlm_hf.metrics.repetition import repetition
from ldlm_hf.metrics.token_entropy import token_entropy


@dataclass(frozen=True)
class References:
    """The real texts that MAUVE compares sets with, and their features (n, D), made once for all sets."""

    texts: list[str]
    features: np.ndarray


@dataclass(frozen=True)
class TextSet:
    """Token ids of n texts, the texts that the tokenizer makes of them, and what they are measured with.

    The judge measures perplexity and MAUVE, `batch_size` texts a pass; None leaves them out. The references are for
    MAUVE, as many as there are texts. It is not measured without them, nor where fewer than `MIN_MAUVE_TEXTS` of the
    texts are not blank.
    """

    sequences: Sequence[Sequence[int]]
    texts: list[str]
    judge: Judge | None
    batch_size: int
    references: References | None = None

    @cached_property
    def num_blank(self) -> int:
        """Texts of white space only."""
        return sum(not text.strip() for text in self.texts)

    @cached_property
    def entropy(self) -> dict[str, Any]:
        """The result of `token_entropy`."""
        return token_entropy(self.sequences)

    @cached_property
    def perplexity(self) -> dict[str, Any]:
        """The result of `generative_perplexity`; empty without a judge, or where no text has two of its tokens."""
        if self.judge is None:
            return {}
        lengths = [len(tokens) for tokens in self.judge.encode(self.texts, MAX_TEXT_LENGTH + 1)]
        if max(lengths) < 2:
            return {}
        # one pass does for both metrics where they read the same tokens of the same texts
        in_one_pass = (
            self.compared_with is not None
            and not self.num_blank
            and all(2 <= length <= MAX_TEXT_LENGTH for length in lengths)
        )
        return generative_perplexity(self.texts, self.judge, self.batch_size, with_features=in_one_pass)

    @property
    def compared_with(self) -> References | None:
        """The references of MAUVE; None where it is not measured."""
        num_written = len(self.texts) - self.num_blank
        return self.references if self.judge is not None and num_written >= MIN_MAUVE_TEXTS else None

    @cached_property
    def mauve(self) -> dict[str, Any]:
        """The result of `mauve`; empty where it is not measured."""
        if self.judge is None or self.compared_with is None:
            return {}
        return mauve(
            self.texts,
            self.compared_with.texts,
            self.judge,
            self.batch_size,
            reference_features=self.compared_with.features,
            prediction_features=self.perplexity.get("features"),
        )


@dataclass(frozen=True)
class Score:
    """A score: title of columns and axes, digits behind the point, whether higher or lower is better, and its measure.

    `measure` gives the value for a set, None where it cannot be measured. The table of an evaluation shows all scores;
    figures, comparisons and cards those that are main.
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
    "diversity": Score("diversity", 3, "higher", lambda texts: ngram_diversity(texts.sequences)["diversity"]),
    "repetition": Score("seq-rep-4", 3, "lower", lambda texts: repetition(texts.sequences)["repetition"]),
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
