"""Scores of a set of texts, by the same code at the end of a training run and in `evaluate.py`: App. E's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class SetScorer:
    """Scores sets of n texts beside n real ones; `references` are those of MAUVE, None where it is not measured."""

    judge: Judge | None
    batch_size: int
    tokenizer: PreTrainedTokenizerBase
    references: References | None

    def score(self, sequences: torch.Tensor) -> ScoredSet:
        """Every score of texts, as token ids (n, L)."""
        texts = self.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return score_set(sequences.tolist(), texts, self.judge, self.batch_size, self.references)


def real_part(held_out: torch.Tensor, count: int) -> torch.Tensor:
    """The rows that are real text, n = `count` at most, of those held out: every other one, or with fewer than 2n of
    them the first ones."""
    return held_out[:: 2 if len(held_out) >= 2 * count else 1][:count]


def beside_real_text(
    held_out: torch.Tensor, count: int, tokenizer: PreTrainedTokenizerBase, judge: Judge | None, batch_size: int
) -> tuple[torch.Tensor, SetScorer]:
    """Real text (n, L), n = `count` at most, and what scores sets beside it.

    Of the held-out sequences, every other one is real text; those between are the references of MAUVE. With fewer than
    2n of them, or with a blank reference, MAUVE is not measured.
    """
    references = None
    if judge is not None and count >= MIN_MAUVE_TEXTS and len(held_out) >= 2 * count:
        texts = tokenizer.batch_decode(held_out[1::2][:count], skip_special_tokens=True)
        if all(map(str.strip, texts)):
            references = References(texts, text_features(texts, judge, batch_size))
    return real_part(held_out, count), SetScorer(judge, batch_size, tokenizer, references)


def score_without_judge(sequences: torch.Tensor, texts: list[str]) -> dict[str, float]:
    """The scores of samples (n, L) that need no judge and could be measured: entropy (nats), n-gram diversity."""
    measured = TextSet(sequences.tolist(), texts, judge=None, batch_size=1)
    values = {name: score.measure(measured) for name, score in SCORES.items() if not score.needs_judge}
    return {name: value for name, value in values.items() if value is not None}
