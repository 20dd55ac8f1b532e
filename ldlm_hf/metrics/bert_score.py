"""BERTScore: how well a text's tokens match a reference's in a language model's states (Zhang et al., 2020).

Ours, since the package of its authors is no longer kept up: no idf weights, no rescaling by a baseline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ldlm_hf.loading.pretrained_sources import resolve_pretrained_source
from ldlm_hf.metrics.inputs import TextMetric, check_positive_int, check_references, check_texts


@dataclass(frozen=True)
class TokenMatcher:
    """A language model whose states tokens are compared in: those after `layer` blocks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layer: int

    @torch.inference_mode()
    def states(self, texts: list[str]) -> list[torch.Tensor]:
        """Unit vectors (T, D) of the tokens of each text, without special tokens."""
        encoded = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, return_special_tokens_mask=True
        )
        is_word = encoded.pop("special_tokens_mask") == 0
        encoded = encoded.to(self.model.device)
        hidden_states = self.model(**encoded, output_hidden_states=True).hidden_states[self.layer]
        states = F.normalize(hidden_states.float(), dim=-1).cpu()
        return [row[words] for row, words in zip(states, is_word & (encoded["attention_mask"].cpu() > 0), strict=True)]


def load_matcher(name: str, layer: int, device: str | torch.device | None = None) -> TokenMatcher:
    """Loads a language model by its Hub id, folder or `package:NAME/FOLDER`; ValueError for a layer that it lacks."""
    source = resolve_pretrained_source(name)
    tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **source.kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModel.from_pretrained(source.name_or_path, dtype=torch.float32, **source.kwargs)
    if not 0 <= layer <= model.config.num_hidden_layers:
        raise ValueError(f"`layer` is {layer}, but {name!r} has {model.config.num_hidden_layers} blocks.")
    return TokenMatcher(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer, layer)


def bert_score(
    predictions: list[str],
    references: list[str],
    model: str | TokenMatcher = "FacebookAI/roberta-large",
    layer: int = 17,
    batch_size: int = 32,
) -> dict[str, Any]:
    """F1 of the best matches between a text's tokens and its reference's, by the cosine of their states, averaged over
    texts.

    Precision is the mean over the text's tokens of the best cosine with a token of the reference, recall the other way
    round. A text or reference without tokens has 0. Scores of two models or layers do not compare.

    Args:
        predictions (`list[str]`): generated texts.
        references (`list[str]`): what was to be written, one text each.
        model: language model whose states are compared: Hub id, folder, `package:NAME/FOLDER`, or a loaded one.
        layer (`int`): after how many of its blocks; the 17th is its authors' choice for RoBERTa-large.
        batch_size (`int`): texts a pass.

    Returns:
        bert_score (`float`): mean F1, at most 1.
        num_texts (`int`): size of the set.

    Raises:
        ValueError: no texts, references of another number, or a layer that the model lacks.
    """
    check_texts("predictions", predictions)
    check_references(predictions, references)
    batch_size = check_positive_int("batch_size", batch_size)
    matcher = load_matcher(model, layer) if isinstance(model, str) else model
    scores = []
    for first in range(0, len(predictions), batch_size):
        some = slice(first, first + batch_size)
        pairs = zip(matcher.states(predictions[some]), matcher.states(references[some]), strict=True)
        scores += [best_match_f1(text, reference) for text, reference in pairs]
    return {"bert_score": math.fsum(scores) / len(scores), "num_texts": len(scores)}


def best_match_f1(text: torch.Tensor, reference: torch.Tensor) -> float:
    """F1 of the best cosines between unit vectors (T, D) and (R, D)."""
    if not (len(text) and len(reference)):
        return 0.0
    cosines = text @ reference.T
    precision, recall = float(cosines.amax(1).mean()), float(cosines.amax(0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


class BertScore(TextMetric, evaluate.Metric):
    """[`bert_score`] as a metric of `evaluate`."""

    citation_text = "Zhang et al., BERTScore: Evaluating Text Generation with BERT, 2020."
    columns = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
    _compute = staticmethod(bert_score)
