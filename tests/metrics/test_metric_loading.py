"""Each metric is also a script that `evaluate.load` takes by its path, without a hub."""

from __future__ import annotations

import sys
from pathlib import Path

import evaluate
import pytest

import ldlm_hf.metrics
from ldlm_hf.metrics import (
    GenerativePerplexity,
    LatentSmoothness,
    Mauve,
    NGramDiversity,
    Repetition,
    RougeL,
    TokenEntropy,
)


FOLDER = Path(ldlm_hf.metrics.__file__).parent
SEQUENCES = [[1, 2, 3, 4, 1], [5, 5, 5, 6, 7]]
TEXTS = ["the cat sat on the mat", "a dog ran"]
MANY_TEXTS = [
    f"{first} {second} sat" for first in ("the", "a", "and", "on", "over") for second in ("cat", "dog", "bird", "fish")
]


@pytest.fixture(autouse=True)
def copied_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `evaluate` copy scripts to a folder of this test's, from which alone they are then imported."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("script", "metric_class", "inputs"),
    [
        ("token_entropy", TokenEntropy, {"predictions": SEQUENCES}),
        ("ngram_diversity", NGramDiversity, {"predictions": SEQUENCES}),
        ("repetition", Repetition, {"predictions": SEQUENCES}),
        ("rouge_l", RougeL, {"predictions": TEXTS, "references": TEXTS[::-1]}),
        ("generative_perplexity", GenerativePerplexity, {"predictions": TEXTS}),
        ("mauve", Mauve, {"predictions": MANY_TEXTS, "references": MANY_TEXTS}),
        ("latent_smoothness", LatentSmoothness, {"predictions": MANY_TEXTS[:3], "positions": [0.0, 0.5, 1.0]}),
    ],
)
def test_evaluate_load(script, metric_class, inputs, judge):
    metric = evaluate.load(str(FOLDER / f"{script}.py"))
    assert type(metric).__name__ == metric_class.__name__ and isinstance(metric, evaluate.Metric)
    reads_words = script in ("token_entropy", "ngram_diversity", "repetition", "rouge_l")
    arguments = {} if reads_words else {"judge": judge}
    assert metric.compute(**inputs, **arguments) == metric_class().compute(**inputs, **arguments)
    assert "Returns:" in metric.compute.__doc__


def test_metrics_combine():
    combined = evaluate.combine([TokenEntropy(), NGramDiversity()])
    result = combined.compute(predictions=SEQUENCES)
    assert result["entropy"] == TokenEntropy().compute(predictions=SEQUENCES)["entropy"]
    assert result["diversity"] == NGramDiversity().compute(predictions=SEQUENCES)["diversity"]
