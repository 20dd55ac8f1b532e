"""Scores of a set of texts, by the same code at the end of a training run and in `evaluate.py`: App. E's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..hub.run_files import Sample, TextScores
from ..metrics.judge import Judge
from ..metrics.mauve import MIN_MAUVE_TEXTS, text_features
from ..metrics.registry import SCORES, References, TextSet
from .provenance import source


@dataclass(frozen=True)
class ScoredSet:
    """What is measured of a set of texts, and of each of them.

    `mauve` is what MAUVE depends on beside the judge: `num_texts`, `num_buckets`, `max_length`, `seed`; None where it
    was not measured.
    """

    scores: TextScores
    samples: list[Sample]
    mauve: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self) | {"scores": self.scores.to_json()}

    @classmethod
    def from_json(cls, mapping: dict[str, Any]) -> ScoredSet:
        """What `to_json` gives."""
        samples = [Sample(**sample) for sample in mapping["samples"]]
        return cls(TextScores.from_json(mapping["scores"]), samples, mapping["mauve"])


def judge_conditions(judge: Judge) -> dict[str, Any]:
    """What perplexities depend on: the judge without its folder, the tokens that it reads, and that none is added."""
    return {"name": source(judge.name).name, "max_length": judge.context_length, "add_bos": False}


def score_set(
    sequences: Sequence[Sequence[int]],
    texts: list[str],
    judge: Judge | None,
    batch_size: int,
    references: References | None = None,
) -> ScoredSet:
    """Measures every score of a set; the arguments are those of [`TextSet`]."""
    measured = TextSet(sequences, texts, judge, batch_size, references)
    values = {name: score.measure(measured) for name, score in SCORES.items()}
    perplexities = measured.perplexity.get("perplexities", [None] * len(texts))
    mauve_conditions = {key: measured.mauve.get(key) for key in ("num_texts", "num_buckets", "max_length", "seed")}
    return ScoredSet(
        scores=TextScores(
            len(texts),
            values,
            num_blank_texts=measured.num_blank,
            num_unscored_texts=None if judge is None else measured.perplexity.get("num_unscored_texts", len(texts)),
        ),
        samples=[Sample(*one) for one in zip(texts, perplexities, measured.entropy["entropies"], strict=True)],
        mauve=mauve_conditions if measured.mauve else None,
    )


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
    real_sequences, real_texts = held_out[::stride][:count].tolist(), held_out_texts[::stride][:count]
    samples = score_set(sequences.tolist(), texts, judge, batch_size, references)
    real = score_set(real_sequences, real_texts, judge, batch_size, references)
    return {
        "samples": samples.samples,
        "judge": judge and judge_conditions(judge),
        "mauve": samples.mauve,
        "sample_scores": samples.scores,
        "real_scores": real.scores,
    }


def score_without_judge(sequences: torch.Tensor, texts: list[str]) -> dict[str, float]:
    """The scores of samples (n, L) that need no judge and could be measured: entropy (nats), n-gram diversity."""
    measured = TextSet(sequences.tolist(), texts, judge=None, batch_size=1)
    values = {name: score.measure(measured) for name, score in SCORES.items() if not score.needs_judge}
    return {name: value for name, value in values.items() if value is not None}
