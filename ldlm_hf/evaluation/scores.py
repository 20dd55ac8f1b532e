"""Scores of a set of texts, by the same code at the end of a training run and in `evaluate.py`: App. E's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..hub.model_card import Sample, TextScores
from ..metrics import GenerativePerplexity, Judge, Mauve, NGramDiversity, TokenEntropy, text_features
from ..metrics.mauve import MAX_TEXT_LENGTH
from .provenance import source


# with fewer texts MAUVE has no two clusters to compare
MIN_MAUVE_TEXTS = 20


@dataclass(frozen=True)
class References:
    """The real texts that MAUVE compares sets with, and their features (n, D), made once for all sets."""

    texts: list[str]
    features: np.ndarray


@dataclass(frozen=True)
class ScoredSet:
    """What is measured of a set of texts.

    Attributes:
        scores: of the set.
        samples: its texts, each with scores of its own.
        judge: what the perplexities depend on: `name`, `max_length`, `add_bos`; None without a judge.
        mauve: what MAUVE depends on beside it: `num_texts`, `num_buckets`, `max_length`, `seed`; None if unmeasured.
    """

    scores: TextScores
    samples: list[Sample]
    judge: dict[str, Any] | None = None
    mauve: dict[str, Any] | None = None


def judge_conditions(judge: Judge) -> dict[str, Any]:
    """What perplexities depend on: the judge without its folder, the tokens that it reads, and that none is added."""
    return {"name": source(judge.name).name, "max_length": judge.context_length, "add_bos": False}


def score_set(
    sequences: Sequence[Sequence[int]] | torch.Tensor,
    texts: list[str],
    judge: Judge | None,
    batch_size: int,
    references: References | None = None,
) -> ScoredSet:
    """Scores a set of token ids (n sequences) and what the tokenizer makes of them (n texts).

    Args:
        judge: measures the perplexities and MAUVE; None leaves them out.
        batch_size: texts of one pass of the judge.
        references: for MAUVE, as many as there are texts. MAUVE is not measured without them, nor where fewer than
            `MIN_MAUVE_TEXTS` of the texts are not blank.
    """
    rows = sequences.tolist() if isinstance(sequences, torch.Tensor) else [list(row) for row in sequences]
    # in memory: several processes may score at the same time
    entropy = TokenEntropy(keep_in_memory=True).compute(predictions=rows)
    num_blank = sum(not text.strip() for text in texts)
    scores = TextScores(
        num_texts=len(texts),
        entropy=entropy["entropy"],
        diversity=NGramDiversity(keep_in_memory=True).compute(predictions=rows)["diversity"],
        num_blank_texts=num_blank,
    )
    perplexities: list[float | None] = [None] * len(texts)
    conditions = mauve_conditions = None
    if judge is not None:
        conditions = judge_conditions(judge)
        scores = replace(scores, num_unscored_texts=len(texts))
        lengths = [len(tokens) for tokens in judge.encode(texts, MAX_TEXT_LENGTH + 1)]
        with_mauve = references is not None and len(texts) - num_blank >= MIN_MAUVE_TEXTS
        # one pass does for both metrics where they read the same tokens of the same texts
        in_one_pass = with_mauve and not num_blank and all(2 <= length <= MAX_TEXT_LENGTH for length in lengths)
        features = None
        if max(lengths) >= 2:
            perplexity = GenerativePerplexity(keep_in_memory=True).compute(
                predictions=texts, judge=judge, batch_size=batch_size, with_features=in_one_pass
            )
            features = perplexity.get("features")
            perplexities = perplexity["perplexities"]
            scores = replace(
                scores,
                generative_perplexity=perplexity["perplexity"],
                trimmed_mean_perplexity=perplexity["trimmed_mean_perplexity"],
                num_unscored_texts=perplexity["num_unscored_texts"],
            )
        if with_mauve:
            mauve = Mauve(keep_in_memory=True).compute(
                predictions=texts,
                references=references.texts,
                reference_features=references.features,
                prediction_features=features,
                judge=judge,
                batch_size=batch_size,
            )
            scores = replace(scores, mauve=mauve["mauve"])
            mauve_conditions = {key: mauve[key] for key in ("num_texts", "num_buckets", "max_length", "seed")}
    samples = [Sample(*values) for values in zip(texts, perplexities, entropy["entropies"], strict=True)]
    return ScoredSet(scores, samples, conditions, mauve_conditions)


def score_beside_real_text(
    sequences: torch.Tensor,
    texts: list[str],
    held_out: torch.Tensor,
    held_out_texts: list[str],
    judge: Judge | None,
    batch_size: int,
) -> dict[str, Any]:
    """Scores of samples (n, L) and of n held-out texts: the fields of [`RunResults`] that they fill.

    Of the held-out texts, every other one is scored; those between are the references of MAUVE for both. With fewer
    than 2n of them, or with a blank reference, MAUVE is not measured.
    """
    count = len(texts)
    stride = 2 if len(held_out_texts) >= 2 * count else 1
    reference_texts = held_out_texts[1::2][:count] if stride == 2 else []
    references = None
    if judge is not None and count >= MIN_MAUVE_TEXTS and reference_texts and all(map(str.strip, reference_texts)):
        references = References(reference_texts, text_features(reference_texts, judge, batch_size))
    samples = score_set(sequences, texts, judge, batch_size, references)
    real = score_set(held_out[::stride][:count], held_out_texts[::stride][:count], judge, batch_size, references)
    return {
        "samples": samples.samples,
        "judge": samples.judge,
        "mauve": samples.mauve,
        "sample_scores": samples.scores,
        "real_scores": real.scores,
    }


def score(sequences: torch.Tensor) -> dict[str, float]:
    """Entropy (nats) and n-gram diversity of a set of samples (n, L): what needs no judge."""
    rows = sequences.tolist()
    return {
        "entropy": TokenEntropy().compute(predictions=rows)["entropy"],
        "diversity": NGramDiversity().compute(predictions=rows)["diversity"],
    }
