"""`evaluate.py` of the methods that LDLM is compared with: their schedulers by name, and models without steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ldlm_hf import (
    AutoregressivePipeline,
    CANDIScheduler,
    DuoScheduler,
    FLMScheduler,
    MDLMScheduler,
    ReMDMScheduler,
    TokenDiffusionPipeline,
    TokenEntropy,
)
from ldlm_hf.evaluation.samples import sample_generator


K, L = 40, 8
Evaluate = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def evaluate(
    run_script: Callable[..., None], tiny_overrides: list[str], backbone_folders: dict[str, Path], tmp_path: Path
) -> Evaluate:
    """Evaluates a pipeline with samplers, 20 texts of one seed; what was measured of each."""

    def run(pipeline: Any, *samplers: str) -> list[dict[str, Any]]:
        pipeline.save_pretrained(tmp_path / "pipeline")
        options = {"num_samples": "20", "seeds": "1", "judge": str(backbone_folders["gpt2"]), "batch_size": "8"}
        command = [text for name, value in options.items() for text in (f"--{name}", value)]
        command += ["--pipeline", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "out")]
        data = [item for item in tiny_overrides if item.startswith("data.")]
        run_script("evaluate", *command, *data, "--steps", "2", "4", "--samplers", *samplers)
        results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
        assert all(one["mean"]["mauve"] is not None for entry in results["pipelines"] for one in entry["sets"])
        return results["pipelines"]

    return run


def test_schedulers_of_token_level_pipelines(
    evaluate: Evaluate, make_token_pipeline: Callable[[Any], TokenDiffusionPipeline]
) -> None:
    pipeline = make_token_pipeline(MDLMScheduler())
    own, other = evaluate(pipeline, "own", "ReMDMScheduler:eta=0.5,temperature=0.7,strategy=rescale")
    # one evaluation more than steps
    assert [one["nfe"] for one in own["sets"]] == [one["nfe"] for one in other["sets"]] == [3, 5]
    assert own["sets"][1]["mean"]["entropy"] != other["sets"][1]["mean"]["entropy"]
    pipeline.scheduler = ReMDMScheduler(eta=0.5, temperature=0.7, strategy="rescale")
    generators = [sample_generator(0, index, pipeline.device) for index in range(20)]
    sequences = pipeline(batch_size=20, num_inference_steps=4, generator=generators).sequences
    expected = TokenEntropy().compute(predictions=sequences.tolist())["entropy"]
    assert other["sets"][1]["mean"]["entropy"] == pytest.approx(expected, abs=1e-6)


def test_an_autoregressive_pipeline_has_a_temperature_and_no_steps(
    evaluate: Evaluate, tiny_tokenizer: Any, randomize: Callable[..., Any]
) -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=K, n_positions=L, n_embd=24, n_layer=1, n_head=2, bos_token_id=1)
    pipeline = AutoregressivePipeline(randomize(GPT2LMHeadModel(config)).eval(), tiny_tokenizer)
    own, other = evaluate(pipeline, "own", "own:temperature=0.1")
    assert [one["nfe"] for one in own["sets"]] == [one["nfe"] for one in other["sets"]] == [L]
    assert other["sets"][0]["mean"]["entropy"] < own["sets"][0]["mean"]["entropy"]


@pytest.mark.parametrize(
    ("scheduler", "sampler", "message"),
    [
        (
            MDLMScheduler(),
            "DuoScheduler",
            "takes off uniform noise, .* a MDLMScheduler, was trained with masked",
        ),
        (DuoScheduler(), "TangentDDIMScheduler", "takes off latent noise, .* was trained with uniform noise"),
        (FLMScheduler(vocab_size=K), "CANDIScheduler", "takes off candi noise, .* was trained with flow noise"),
        (CANDIScheduler(vocab_size=K), "CANDIScheduler:top_p=0", "top_p"),
        (
            MDLMScheduler(),
            "own:self_condition_scale=2",
            "a TokenDiffusionPipeline has no self_condition_scale",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sampled(
    evaluate: Evaluate,
    make_token_pipeline: Callable[[Any], TokenDiffusionPipeline],
    tmp_path: Path,
    scheduler: Any,
    sampler: str,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(make_token_pipeline(scheduler), sampler)
    assert not (tmp_path / "out").exists()
