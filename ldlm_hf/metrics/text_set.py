"""A set of texts as the scores see it: what several of them are read from is measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ldlm_hf.metrics.generative_perplexity import generative_perplexity
from ldlm_hf.metrics.judge import Judge
from ldlm_hf.metrics.mauve import MAX_TEXT_LENGTH, mauve
from ldlm_hf.metrics.ngram_diversity import ngram_diversity
from ldlm_hf.metrics.token_entropy import token_entropy


# with fewer texts MAUVE has no two clusters to compare
MIN_MAUVE_TEXTS = 20


@dataclass(frozen=True)
class References:
    """The real texts that MAUVE compares sets with, and their features (n, D), made once for all sets."""

    texts: list[str]
    features: np.ndarray


@dataclass(frozen=True)
class TextSet:
    """Token ids, the texts that the tokenizer makes of them, and what they are measured with.

    Attributes:
        sequences: token ids of n texts.
        texts: the n texts.
        judge: measures perplexity and MAUVE; None leaves them out.
        batch_size: texts of one pass of the judge.
        references: for MAUVE, as many as there are texts. MAUVE is not measured without them, nor where fewer than
            `MIN_MAUVE_TEXTS` of the texts are not blank.
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
    def diversity(self) -> dict[str, Any]:
        """The result of `ngram_diversity`."""
        return ngram_diversity(self.sequences)

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
