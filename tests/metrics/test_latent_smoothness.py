"""Smoothness along lines between latents: its curve is Gen. PPL's own, its one number is known where the curve is."""

from __future__ import annotations

import math

import pytest

from ldlm_hf.metrics import GenerativePerplexity, LatentSmoothness
from ldlm_hf.metrics.latent_smoothness import roughness


POSITIONS = [0.0, 0.25, 1.0]
LINES = [
    ["the cat sat on the mat", "the cat sat on the river", "a fish swam under the river"],
    ["a dog ran slowly", "bird dog the the", "a bird flew quickly over the tree"],
]
TEXTS = [text for line in LINES for text in line]


def test_each_position_has_the_perplexity_of_its_texts(judge):
    result = LatentSmoothness().compute(predictions=TEXTS, positions=POSITIONS * 2, judge=judge)
    assert result["positions"] == POSITIONS
    for place, perplexity in enumerate(result["perplexities"]):
        texts = [line[place] for line in LINES]
        alone = GenerativePerplexity().compute(predictions=texts, judge=judge)["perplexity"]
        assert perplexity == pytest.approx(alone, rel=1e-5)
    assert result["roughness"] == pytest.approx(roughness(POSITIONS, result["perplexities"]))
    assert (result["num_pairs"], result["num_unscored_texts"], result["judge"]) == (2, 0, "tiny")


def test_order_and_batches_do_not_matter(judge):
    expected = LatentSmoothness().compute(predictions=TEXTS, positions=POSITIONS * 2, judge=judge)
    order = [3, 0, 5, 1, 4, 2]
    found = LatentSmoothness().compute(
        predictions=[TEXTS[index] for index in order],
        positions=[POSITIONS[index % 3] for index in order],
        judge=judge,
        batch_size=1,
    )
    assert found["perplexities"] == pytest.approx(expected["perplexities"], rel=1e-5)


@pytest.mark.parametrize("height", [0.0, 0.7, -0.3])
def test_roughness_of_known_curves(height):
    # log perplexity on the straight line from 2 to 5, lifted by `height` between the ends
    positions = [0.0, 0.1, 0.5, 0.8, 1.0]
    lifts = [0.0, height, height, height, 0.0]
    perplexities = [math.exp(2 + 3 * position + lift) for position, lift in zip(positions, lifts, strict=True)]
    assert roughness(positions, perplexities) == pytest.approx(height, abs=1e-12)


def test_roughness_is_nothing_where_a_perplexity_is_missing():
    assert roughness([0.0, 0.5, 1.0], [2.0, None, 2.0]) is None


def test_texts_without_anything_to_score_are_counted(judge):
    texts = [TEXTS[0], "", TEXTS[2], TEXTS[3], "cat", TEXTS[5]]
    result = LatentSmoothness().compute(predictions=texts, positions=POSITIONS * 2, judge=judge)
    assert result["num_unscored_texts"] == 2
    assert result["perplexities"][1] is None
    assert result["roughness"] is None
    assert result["perplexities"][0] is not None


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0.0, 1.0] * 3, "at least one between"),
        ([0.0, 0.5, 1.5] * 2, "none outside"),
        ([0.1, 0.5, 1.0] * 2, "must hold 0, 1"),
        ([0.0, 0.5, 1.0, 0.0, 0.5, 0.5], "unequally often"),
    ],
)
def test_positions_that_make_no_lines_are_refused(judge, positions, expected):
    with pytest.raises(ValueError, match=expected):
        LatentSmoothness().compute(predictions=TEXTS, positions=positions, judge=judge)


def test_other_bad_inputs(judge):
    with pytest.raises(ValueError, match="batch_size"):
        LatentSmoothness().compute(predictions=TEXTS, positions=POSITIONS * 2, judge=judge, batch_size=0)
    with pytest.raises(ValueError, match="single string"):
        LatentSmoothness().compute(predictions="a cat sat", positions=POSITIONS, judge=judge)
