"""ROUGE-L: the longest common subsequence of words with a reference (Lin, 2004)."""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate

from ldlm_hf.metrics.inputs import TextMetric, check_references, check_texts


def rouge_l(predictions: list[str], references: list[str]) -> dict[str, Any]:
    """F1 of the longest common subsequence of words with a reference, averaged over texts; by the package rouge-score,
    which the metric `rouge` of `evaluate` calls, too.

    A continuation may be good and share no word with what was really written: ROUGE says how much of the truth is
    found again, not how good a text is. Words are lower-case letters and digits, without stemming; two blank texts
    have 1.

    Args:
        predictions (`list[str]`): generated texts.
        references (`list[str]`): what was to be written, one text each.

    Returns:
        rouge_l (`float`): mean F1, in [0, 1].
        num_texts (`int`): size of the set.

    Raises:
        ValueError: no texts, or references of another number.
        ModuleNotFoundError: rouge-score is not installed.
    """
    from rouge_score.rouge_scorer import RougeScorer

    check_texts("predictions", predictions)
    check_references(predictions, references)
    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score(real, text)["rougeL"].fmeasure if text.strip() or real.strip() else 1.0
        for text, real in zip(predictions, references, strict=True)
    ]
    return {"rouge_l": math.fsum(scores) / len(scores), "num_texts": len(scores)}


class RougeL(TextMetric, evaluate.Metric):
    """[`rouge_l`] as a metric of `evaluate`."""

    citation_text = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004."
    columns = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
    _compute = staticmethod(rouge_l)
