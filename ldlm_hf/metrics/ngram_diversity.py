"""N-gram diversity: how much a set of generated sequences varies as a whole (App. E)."""

from __future__ import annotations

import math
from typing import Any

import evaluate

from ldlm_hf.metrics.inputs import TokenMetric, check_token_sequences


NGRAM_ORDERS = (2, 3, 4)


def ngram_diversity(predictions: Any) -> dict[str, Any]:
    """Share of unique n-grams in a set of generated sequences, multiplied over n = 2, 3, 4.

    An n-gram lies within one sequence. The larger the set, the more n-grams it repeats: only sets of equal size
    compare, and the result says how large the set was. The paper does not say whether its n-grams are of tokens or of
    words. Here they are of the generator's tokens, which is our choice: it needs no further tokenizer, and reads what
    entropy reads.

    Args:
        predictions: the generator's token ids, a list of lists of `int` or a 2-D array or tensor.

    Returns:
        diversity (`float`): product over n = 2, 3, 4 of unique n-grams / all n-grams of the pooled set.
        unique_bigrams, unique_trigrams, unique_fourgrams (`float`): the three factors.
        num_sequences, num_tokens (`int`): the size of the set, on which diversity depends.

    Raises:
        ValueError: no token ids, or all sequences shorter than four tokens.
    """
    sequences = check_token_sequences(predictions)
    longest = max(len(sequence) for sequence in sequences)
    if longest < max(NGRAM_ORDERS):
        raise ValueError(
            f"The longest of the {len(sequences)} `predictions` has {longest} tokens, so there is no "
            f"{max(NGRAM_ORDERS)}-gram to count: pass longer sequences."
        )
    factors = [unique_ngram_share(sequences, order) for order in NGRAM_ORDERS]
    return {
        "diversity": math.prod(factors),
        "unique_bigrams": factors[0],
        "unique_trigrams": factors[1],
        "unique_fourgrams": factors[2],
        "num_sequences": len(sequences),
        "num_tokens": sum(len(sequence) for sequence in sequences),
    }


def unique_ngram_share(sequences: list[list[int]], order: int) -> float:
    """Unique n-grams of the pooled sequences over all of them, n = `order`; no n-gram crosses a sequence's border."""
    unique: set[tuple[int, ...]] = set()
    total = 0
    for sequence in sequences:
        ngrams = list(zip(*(sequence[start:] for start in range(order)), strict=False))
        unique.update(ngrams)
        total += len(ngrams)
    return len(unique) / total


class NGramDiversity(TokenMetric, evaluate.Metric):
    """[`ngram_diversity`] as a metric of `evaluate`."""

    citation_text = "Su et al., A Contrastive Framework for Neural Text Generation, 2022."
    _compute = staticmethod(ngram_diversity)
