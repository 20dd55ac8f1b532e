"""The scores of a set of texts are the metrics' own, and columns stand in one order everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldlm_hf.metrics import NGramDiversity, TokenEntropy
from ldlm_hf.metrics.generative_perplexity import generative_perplexity
from ldlm_hf.metrics.mauve import mauve, text_features
from ldlm_hf.metrics.ngram_diversity import ngram_diversity
from ldlm_hf.metrics.registry import COLUMNS, MAIN_COLUMNS, SCORES, References, TextSet
from ldlm_hf.metrics.repetition import repetition
from ldlm_hf.metrics.token_entropy import token_entropy


SEQUENCES = [[1, 2, 3, 4, 1], [5, 5, 5, 6, 7]]
TEXTS = [
    f"{first} {second} sat" for first in ("the", "a", "and", "on", "over") for second in ("cat", "dog", "bird", "fish")
]


def test_functions_give_what_the_classes_of_evaluate_give():
    assert token_entropy(SEQUENCES) == TokenEntropy().compute(predictions=SEQUENCES)
    assert ngram_diversity(np.array(SEQUENCES)) == NGramDiversity().compute(predictions=SEQUENCES)
    with pytest.raises(ValueError, match=r"`predictions\[1\]` holds -1"):
        token_entropy([[1], [-1]])
    with pytest.raises(ValueError, match="single string"):
        generative_perplexity("the cat sat")
    with pytest.raises(ValueError, match="20 `predictions` and 19 `references`"):
        mauve(TEXTS, TEXTS[1:])


def test_scores_of_a_set_are_the_metrics_own(judge):
    references = References(TEXTS[::-1], text_features(TEXTS[::-1], judge))
    measured = TextSet(SEQUENCES * 10, TEXTS, judge, batch_size=8, references=references)
    values = {name: score.measure(measured) for name, score in SCORES.items()}
    perplexity = generative_perplexity(TEXTS, judge)
    assert values["entropy"] == token_entropy(SEQUENCES * 10)["entropy"]
    assert values["diversity"] == ngram_diversity(SEQUENCES * 10)["diversity"]
    assert values["repetition"] == repetition(SEQUENCES * 10)["repetition"]
    assert values["generative_perplexity"] == pytest.approx(perplexity["perplexity"])
    assert values["trimmed_mean_perplexity"] == pytest.approx(perplexity["trimmed_mean_perplexity"])
    assert values["mauve"] == pytest.approx(mauve(TEXTS, TEXTS[::-1], judge)["mauve"], abs=1e-6)


def test_what_needs_a_judge_is_not_measured_without_one(judge):
    without_judge = TextSet(SEQUENCES * 10, TEXTS, judge=None, batch_size=8)
    unmeasured = {name for name, score in SCORES.items() if score.measure(without_judge) is None}
    assert unmeasured == {name for name, score in SCORES.items() if score.needs_judge}
    # without references, and with too few texts that are not blank
    references = References(TEXTS, text_features(TEXTS, judge))
    with_judge = replace(without_judge, judge=judge)
    few = replace(with_judge, texts=["", *TEXTS[1:]], references=references)
    assert SCORES["mauve"].measure(with_judge) is SCORES["mauve"].measure(few) is None
    # no text has two tokens
    short = replace(with_judge, texts=["cat"] * 20)
    assert SCORES["generative_perplexity"].measure(short) is SCORES["trimmed_mean_perplexity"].measure(short) is None


def test_order_of_columns():
    assert list(COLUMNS) == [
        "generative_perplexity",
        "trimmed_mean_perplexity",
        "mauve",
        "repetition",
        "diversity",
        "entropy",
    ]
    assert [score.heading for score in MAIN_COLUMNS.values()] == [
        "Gen. PPL ↓",
        "MAUVE ↑",
        "seq-rep-4 ↓",
        "diversity ↑",
        "entropy (nats) ↑",
    ]
