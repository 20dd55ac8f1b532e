"""Scores the sets of an evaluation, each once: what was scored before is read from the finished parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..metrics.judge import Judge
from ..metrics.latent_smoothness import latent_smoothness
from ..metrics.mauve import text_features
from ..metrics.registry import SCORES, References
from ..metrics.token_entropy import token_entropy
from .folder_lock import lock_folder
from .options import EvaluationOptions
from .part_cache import FinishedParts, digest, module_digest, remove_half_written
from .real_text import RealText, control_set
from .samples import Lines, SampleSet
from .scores import ScoredSet, score_set


@dataclass(frozen=True)
class Scorer:
    """What all sets are scored with: `references` are those of MAUVE, `parts` keeps the scores."""

    judge: Judge | None
    judge_digest: str | None
    batch_size: int
    references: References | None
    real: RealText
    tokenizer: PreTrainedTokenizerBase
    parts: FinishedParts

    def score(self, sequences: Sequence[Sequence[int]], texts: list[str]) -> ScoredSet:
        """Scores of a set of token ids and their texts."""
        values = self.parts.value(
            "scores",
            lambda: score_set(sequences, texts, self.judge, self.batch_size, self.references).to_json(),
            names=list(SCORES),
            sequences=digest(sequences),
            texts=digest(texts),
            judge=self.judge_digest,
            references=self.references and digest(self.references.texts),
        )
        return ScoredSet.from_json(values)

    def score_real_text(self) -> ScoredSet:
        """As `score`, of the real text."""
        return self.score(self.real.sequences.tolist(), self.real.texts)

    def score_control(self, name: str) -> ScoredSet:
        """Scores of a control made of the real text."""
        return self.score(*control_set(name, self.real, self.tokenizer))

    def score_samples(self, samples: SampleSet) -> tuple[ScoredSet, dict[str, Any]]:
        """Scores of a set of samples, and how long it took to make, in which batches."""
        rows = samples.rows.load(samples.count)
        scored = self.score(rows["sequences"].tolist(), self.texts(rows["sequences"]))
        scores = replace(scored.scores, num_nonfinite_texts=int((~rows["is_finite"]).sum()))
        made = {"seconds": float(rows["seconds"].sum()), "batch_sizes": sorted(set(rows["batch_size"].tolist()))}
        return replace(scored, scores=scores), made | {"nfe": int(rows["nfe"][0])}

    def score_lines(self, lines: Lines) -> dict[str, Any]:
        """Generative perplexity and entropy over the position on the lines."""
        sequences = lines.rows.load(len(lines.ends))["sequences"]  # (pairs, K, L)
        positions = lines.positions.tolist()

        def measure() -> dict[str, Any]:
            result: dict[str, Any] = {"positions": positions, "generative_perplexity": None, "roughness": None}
            if self.judge is not None:
                texts = self.texts(sequences.flatten(0, 1))
                smoothness = latent_smoothness(texts, positions * len(sequences), self.judge, self.batch_size)
                result["generative_perplexity"] = smoothness["perplexities"]
                result |= {name: smoothness[name] for name in ("roughness", "num_unscored_texts")}
            entropy = [token_entropy(some)["entropy"] for some in sequences.unbind(1)]
            return result | {"entropy": entropy, "num_pairs": len(sequences)}

        return self.parts.value(
            "smoothness", measure, sequences=digest(sequences.tolist()), positions=positions, judge=self.judge_digest
        )

    def texts(self, sequences: torch.Tensor) -> list[str]:
        """Token ids (n, L) → texts."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)


def build_scorer(
    real: RealText,
    judge: Judge | None,
    tokenizer: PreTrainedTokenizerBase,
    options: EvaluationOptions,
    parts: FinishedParts,
    accelerator: Accelerator,
) -> Scorer:
    """The scorer of an evaluation; every process calls it."""
    judge_digest = references = None
    if judge is not None:
        judge_digest = digest([module_digest(judge.model), judge.tokenizer.get_vocab()])
        if real.reference_texts:
            shared = FinishedParts(options.cache_dir or parts.folder, parts.versions)
            rows = shared.rows("features", texts=digest(real.reference_texts), judge=judge_digest)
            count = len(real.reference_texts)
            if accelerator.is_main_process and rows.missing(count):
                # evaluations that share the folder wait for the one that makes them
                with lock_folder(rows.folder):
                    remove_half_written(rows.folder)
                    if rows.missing(count):
                        features = text_features(real.reference_texts, judge, options.judge_batch_size)
                        rows.save(list(range(count)), {"features": torch.from_numpy(features)})
            accelerator.wait_for_everyone()
            references = References(real.reference_texts, rows.load(count)["features"].numpy())
    return Scorer(judge, judge_digest, options.judge_batch_size, references, real, tokenizer, parts)
