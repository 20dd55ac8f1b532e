"""Unigram entropy: how much a generated sequence varies within itself (App. E)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import evaluate

from ldlm_hf.metrics.inputs import TokenMetric, check_token_sequences


def token_entropy(predictions: Any) -> dict[str, Any]:
    """Entropy of the token frequencies within each generated sequence, averaged over sequences.

    It falls when a text repeats itself and does not see repetition across texts; n-gram diversity does. It cannot
    exceed the logarithm of the sequence length, so only sequences of the same length and tokenizer compare. An empty
    sequence has no distribution: it is left out of the mean, `None` in `entropies`, and counted in
    `num_unscored_sequences`.

    Args:
        predictions: the generator's token ids, a list of lists of `int` or a 2-D array or tensor.

    Returns:
        entropy (`float`): mean over sequences of the entropy of their token frequencies, in nats.
        entropies (`list`): each sequence's own, `None` for an empty one.
        num_sequences, num_unscored_sequences, num_tokens (`int`): sequences, the empty ones among them, tokens.

    Raises:
        ValueError: no token ids, or empty sequences only.
    """
    sequences = check_token_sequences(predictions)
    entropies = [sequence_entropy(sequence) if sequence else None for sequence in sequences]
    scored = [entropy for entropy in entropies if entropy is not None]
    if not scored:
        raise ValueError(f"All {len(sequences)} `predictions` are empty: look at what the generator writes.")
    return {
        "entropy": math.fsum(scored) / len(scored),
        "entropies": entropies,
        "num_sequences": len(sequences),
        "num_unscored_sequences": len(sequences) - len(scored),
        "num_tokens": sum(len(sequence) for sequence in sequences),
    }


def sequence_entropy(sequence: list[int]) -> float:
    """-sum over tokens v of f(v) log f(v), with f(v) the share of v in the sequence; in nats."""
    shares = [count / len(sequence) for count in Counter(sequence).values()]
    return math.fsum(share * math.log(1 / share) for share in shares)


class TokenEntropy(TokenMetric, evaluate.Metric):
    """[`token_entropy`] as a metric of `evaluate`."""

    citation_text = "Dieleman et al., Continuous diffusion for categorical data, 2022."
    _compute = staticmethod(token_entropy)
