"""Repetition within a text: seq-rep-4 (Welleck et al., 2020)."""

from __future__ import annotations

import math
from typing import Any

import evaluate

from ldlm_hf.metrics.inputs import TokenMetric, check_token_sequences


ORDER = 4


def repetition(predictions: Any) -> dict[str, Any]:
    """Share of the 4-grams of a generated sequence that stood in it before (seq-rep-4), averaged over sequences.

    It sees what perplexity rewards and entropy hardly notices: phrases that come again within a text. Longer texts
    repeat more, so only sequences of the same length and tokenizer compare. A sequence shorter than four tokens has no
    4-gram: it is left out of the mean, `None` in `repetitions`.

    Args:
        predictions: the generator's token ids, a list of lists of `int` or a 2-D array or tensor.

    Returns:
        repetition (`float`): mean over sequences of 1 - unique 4-grams / all 4-grams; `None` if all are too short.
        repetitions (`list`): each sequence's own.
        num_sequences (`int`): size of the set.

    Raises:
        ValueError: no token ids.
    """
    sequences = check_token_sequences(predictions)
    repetitions = [repeated_share(sequence) for sequence in sequences]
    scored = [share for share in repetitions if share is not None]
    return {
        "repetition": math.fsum(scored) / len(scored) if scored else None,
        "repetitions": repetitions,
        "num_sequences": len(sequences),
    }


def repeated_share(sequence: list[int]) -> float | None:
    """1 - unique n-grams / all n-grams of a sequence, n = `ORDER`; None where it has none."""
    ngrams = list(zip(*(sequence[start:] for start in range(ORDER)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else None


class Repetition(TokenMetric, evaluate.Metric):
    """[`repetition`] as a metric of `evaluate`."""

    citation_text = "Welleck et al., Neural Text Generation with Unlikelihood Training, 2020."
    _compute = staticmethod(repetition)
