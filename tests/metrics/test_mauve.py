from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from mauve import compute_mauve

from ldlm_hf.metrics import GenerativePerplexity, Judge, Mauve, text_features


def texts(words: str, seed: int, count: int = 40) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(words.split(), k=generator.randint(4, 12))) for _ in range(count)]


ANIMALS = "the cat dog sat ran on mat"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_features_are_the_last_hidden_state_of_the_last_token(judge, batch_size):
    batch = [*texts(ANIMALS, seed=0, count=6), "the", "the cat " * 20]
    features = text_features(batch, judge, batch_size)
    assert features.shape == (8, 32) and features.dtype == np.float32
    for text, feature in zip(batch, features, strict=True):
        input_ids = torch.tensor([judge.tokenizer(text)["input_ids"][:16]])
        with torch.no_grad():
            expected = judge.model(input_ids, output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(feature, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_equal_sets_score_one_and_disjoint_ones_near_zero(judge):
    animals, rivers = texts("the cat", seed=0), texts("fish river", seed=0)
    equal = Mauve().compute(predictions=animals, references=animals, judge=judge)
    disjoint = Mauve().compute(predictions=rivers, references=animals, judge=judge)
    assert equal["mauve"] == pytest.approx(1, abs=1e-6) and equal["frontier_integral"] == pytest.approx(0, abs=1e-6)
    assert disjoint["mauve"] < 0.2 < disjoint["frontier_integral"]
    assert {key: equal[key] for key in ("num_texts", "num_blank_predictions", "num_buckets", "seed", "judge")} == {
        "num_texts": 40,
        "num_blank_predictions": 0,
        "num_buckets": 4,
        "seed": 25,
        "judge": "tiny",
    }


def test_equals_mauve_text_with_its_own_features(judge, tmp_path):
    folder = tmp_path / "gpt2-tiny"  # mauve-text knows models by the word gpt2 or bert in their name
    judge.model.save_pretrained(folder)
    judge.tokenizer.save_pretrained(folder)
    predictions, references = texts(ANIMALS, seed=0), texts(ANIMALS + " tree house", seed=1)
    expected = compute_mauve(
        p_text=predictions, q_text=references, featurize_model_name=str(folder), max_text_length=10, batch_size=5
    )
    result = Mauve().compute(predictions=predictions, references=references, judge=judge, max_length=10)
    assert result["mauve"] == pytest.approx(expected.mauve, rel=1e-6)
    assert result["num_buckets"] == expected.num_buckets


def test_reference_features_replace_their_computation_and_seeds_repeat(judge):
    predictions, references = texts(ANIMALS, seed=0), texts(ANIMALS + " tree house", seed=1)
    features = text_features(references, judge)
    fresh = Mauve().compute(predictions=predictions, references=references, judge=judge)
    cached = Mauve().compute(predictions=predictions, references=references, judge=judge, reference_features=features)
    assert fresh == cached
    shifted = Mauve().compute(
        predictions=predictions, references=references, judge=judge, reference_features=features + 5
    )
    assert shifted["mauve"] < fresh["mauve"]


def test_features_of_the_perplexitys_pass_are_the_predictions_own(judge):
    predictions, references = texts(ANIMALS, seed=0), texts(ANIMALS + " tree house", seed=1)
    scored = GenerativePerplexity().compute(predictions=["cat", *predictions], judge=judge, with_features=True)
    features = scored["features"]
    assert features[0] is None
    np.testing.assert_allclose(np.stack(features[1:]), text_features(predictions, judge), rtol=1e-5, atol=1e-6)
    alone = GenerativePerplexity().compute(predictions=["cat", *predictions], judge=judge)
    assert "features" not in alone
    assert alone["perplexities"] == scored["perplexities"]
    arguments = {"predictions": predictions, "references": references, "judge": judge}
    given = Mauve().compute(**arguments, prediction_features=features[1:])
    assert given["mauve"] == pytest.approx(Mauve().compute(**arguments)["mauve"], abs=1e-6)
    shifted = Mauve().compute(**arguments, prediction_features=np.stack(features[1:]) + 5)
    assert shifted["mauve"] < given["mauve"]


def test_blank_predictions_are_left_out_and_counted(judge):
    predictions, references = texts(ANIMALS, seed=0), texts(ANIMALS, seed=1)
    result = Mauve().compute(predictions=["", " \n", *predictions[2:]], references=references, judge=judge)
    assert result["num_blank_predictions"] == 2 and result["num_texts"] == 40
    assert 0 < result["mauve"] <= 1


def test_bad_input_is_named(judge, make_model):
    animals = texts(ANIMALS, seed=0)
    cases = [
        ({"predictions": animals[:19], "references": animals[:19]}, "at least 20 `predictions`.*there are 19"),
        ({"predictions": ["", *animals[:19]], "references": animals[:20]}, "there are 19 .and 1 blank"),
        ({"predictions": animals, "references": animals[:39]}, "40 `predictions` and 39 `references`"),
        ({"predictions": animals}, "`references` is missing"),
        ({"predictions": animals, "references": ["", *animals[1:]]}, r"`references\[0\]` is ''"),
        ({"predictions": animals, "references": animals, "batch_size": -1}, "`batch_size` is -1"),
        ({"predictions": animals, "references": animals, "max_length": 0}, "`max_length` is 0"),
        ({"predictions": animals, "references": animals, "max_length": 2000}, "`max_length` is 2000"),
        ({"predictions": animals, "references": animals, "num_buckets": 1}, "`num_buckets` is 1"),
        ({"predictions": animals, "references": animals, "num_buckets": 41}, "at least 41"),
        (
            {"predictions": animals, "references": animals, "reference_features": np.zeros((39, 32))},
            r"shape \(39, 32\).*\(40, 32\)",
        ),
        (
            {"predictions": animals, "references": animals, "prediction_features": np.zeros((40, 31))},
            r"`prediction_features` has the shape \(40, 31\).*\(40, 32\)",
        ),
        ({"predictions": ["cat"] * 40, "references": ["cat"] * 40}, "same features"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            Mauve().compute(judge=judge, **arguments)

    broken = make_model(22)
    torch.nn.init.constant_(broken.transformer.ln_f.bias, math.nan)
    with pytest.raises(ValueError, match="not all finite"):
        Mauve().compute(predictions=animals, references=animals, judge=Judge(broken, judge.tokenizer, "broken"))


@pytest.mark.slow
def test_importing_the_metrics_does_not_import_mauve():
    code = "import sys, ldlm_hf.metrics; sys.exit('mauve' in sys.modules or 'faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
