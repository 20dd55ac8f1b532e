from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertModel

from ldlm_hf.metrics import BertScore
from ldlm_hf.metrics.bert_score import best_match_f1, load_matcher


TEXTS, REFERENCES = ["w2 w3 w4", "w5"], ["w2 w9", "w5 w6 w7 w8"]


def test_hand_worked_matches():
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    reference = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    precision, recall = (1 + 0.8) / 2, (1 + 0.8 + 0.0) / 3
    assert best_match_f1(text, reference) == pytest.approx(2 * precision * recall / (precision + recall))
    assert best_match_f1(text[:0], reference) == 0
    assert best_match_f1(text[1:], reference[2:]) == 0


def test_states_are_those_of_the_layer(backbone_folders: dict[str, Path], tiny_tokenizer: Any) -> None:
    """Of each text alone, so that padding plays no part."""
    folder = backbone_folders["bert"]
    model = BertModel.from_pretrained(folder).eval()
    scores = []
    for text, reference in zip(TEXTS, REFERENCES, strict=True):
        states = []
        for words in (text, reference):
            ids = torch.tensor([tiny_tokenizer(words, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                states.append(F.normalize(model(ids, output_hidden_states=True).hidden_states[2][0], dim=-1))
        scores.append(best_match_f1(*states))
    result = BertScore().compute(predictions=TEXTS, references=REFERENCES, model=str(folder), layer=2)
    assert result["bert_score"] == pytest.approx(sum(scores) / 2, abs=1e-5)
    assert result["num_texts"] == 2


def test_the_same_text_has_one(backbone_folders: dict[str, Path]) -> None:
    matcher = load_matcher(str(backbone_folders["bert"]), layer=4)
    same = BertScore().compute(predictions=TEXTS, references=TEXTS, model=matcher)["bert_score"]
    other = BertScore().compute(predictions=TEXTS, references=REFERENCES, model=matcher, batch_size=1)["bert_score"]
    assert same == pytest.approx(1, abs=1e-5) and other < 0.999


def test_a_layer_that_is_not_there(backbone_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="`layer` is 5, but .* has 4 blocks"):
        BertScore().compute(predictions=TEXTS, references=TEXTS, model=str(backbone_folders["bert"]), layer=5)
