from __future__ import annotations

import pytest

from ldlm_hf.metrics import Repetition


def test_hand_worked_case():
    """1212 2121 1212 of the first: one of three came before. The second has four different ones."""
    result = Repetition().compute(predictions=[[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6, 7]])
    assert result["repetitions"] == [pytest.approx(1 / 3), 0]
    assert result["repetition"] == pytest.approx(1 / 6)
    assert result["num_sequences"] == 2


def test_one_token_over_and_over():
    assert Repetition().compute(predictions=[[7] * 23])["repetition"] == pytest.approx(19 / 20)


def test_what_other_sequences_say_is_no_repetition():
    assert Repetition().compute(predictions=[[1, 2, 3, 4, 5]] * 3)["repetition"] == 0


def test_sequences_too_short_for_a_fourgram_are_left_out():
    result = Repetition().compute(predictions=[[1, 1, 1], [], [5] * 5])
    assert result["repetitions"] == [None, None, 0.5]
    assert result["repetition"] == 0.5
    assert Repetition().compute(predictions=[[1, 2]])["repetition"] is None


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`predictions` is empty"):
        Repetition().compute(predictions=[])
