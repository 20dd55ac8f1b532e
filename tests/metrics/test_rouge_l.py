from __future__ import annotations

import pytest

from ldlm_hf.metrics import RougeL


def test_hand_worked_case():
    """ "the cat sat" of "the cat ran and sat": precision 3/4, recall 3/5; the second shares nothing."""
    predictions, references = ["The cat sat down.", "dogs"], ["the cat ran and sat", "birds fly"]
    result = RougeL().compute(predictions=predictions, references=references)
    assert result == {"rouge_l": pytest.approx((2 * 3 / 4 * 3 / 5 / (3 / 4 + 3 / 5)) / 2), "num_texts": 2}


def test_nothing_where_nothing_was_to_be_written():
    assert RougeL().compute(predictions=["", "a", " "], references=[" ", "", "b"])["rouge_l"] == pytest.approx(1 / 3)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="2 `predictions` and 1 `references`"):
        RougeL().compute(predictions=["a", "b"], references=["a"])
    with pytest.raises(ValueError, match="single string"):
        RougeL().compute(predictions="a text", references=["a"])
