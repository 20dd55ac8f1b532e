"""A run that is scored after it was trained has the results and the card of one that was scored at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldlm_hf import LDLMPipeline


def read(run: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """Results and card, but the seconds of the training, and what the pipeline samples."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results.pop("seconds") > 0
    card = (run / "pipeline" / "README.md").read_text(encoding="utf-8").splitlines()
    pipeline = LDLMPipeline.from_pretrained(run / "pipeline")
    texts = pipeline(batch_size=4, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).texts
    return results, [line for line in card if "evaluations and checkpoints on the way count" not in line], texts


def test_a_run_that_is_scored_later(
    run_script: Callable[..., None], tiny_overrides: list[str], backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    sampler = "TangentDDIMScheduler:eta=1.0,self_condition_scale=2"
    evaluation = [f"evaluation.judge={backbone_folders['gpt2']}", f"evaluation.sampler={sampler}"]
    run_script("train_joint", *tiny_overrides, *evaluation)
    (tmp_path / "run").rename(tmp_path / "scored")

    run_script("train_joint", *tiny_overrides, "evaluation.num_samples=0")
    assert not (tmp_path / "run" / "samples.md").exists()
    run_script("score_run", str(tmp_path / "run"), *evaluation, "evaluation.num_samples=4")
    names = ("results.json", "samples.md", "settings.yaml", "metrics.jsonl", "pipeline", "checkpoint-4")
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(names)
    assert read(tmp_path / "run") == read(tmp_path / "scored")


def test_what_was_trained_cannot_change(
    run_script: Callable[..., None], tiny_overrides: list[str], tmp_path: Path
) -> None:
    run_script("train_joint", *tiny_overrides, "evaluation.num_samples=0")
    with pytest.raises(ValueError, match="loop.max_steps=8: the run is over"):
        run_script("score_run", str(tmp_path / "run"), "loop.max_steps=8")
    with pytest.raises(OSError, match="not the folder of a run"):
        run_script("score_run", str(tmp_path), "evaluation.num_samples=4")


def test_a_run_from_before_there_was_a_setting_has_its_default(
    run_script: Callable[..., None], tiny_overrides: list[str], tmp_path: Path
) -> None:
    run_script("train_joint", *tiny_overrides, "model.prefix=false", "evaluation.num_samples=0")
    file = tmp_path / "run" / "settings.yaml"
    saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    del saved["model"]["prefix"], saved["consistency"], saved["data"]["documents"], saved["data"]["source_column"]
    file.write_text(yaml.safe_dump(saved), encoding="utf-8")
    run_script("score_run", str(tmp_path / "run"), "evaluation.num_samples=4")
    saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    # of the prefix what there was before
    assert saved["model"]["prefix"] is False and saved["consistency"]["weight"] == 0
    assert saved["data"]["documents"] == "packed" and saved["data"]["source_column"] is None
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["changed_settings"]["model.prefix"] is False and results["sample_scores"]["num_texts"] == 4
