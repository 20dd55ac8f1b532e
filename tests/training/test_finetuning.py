"""Joint training that goes on from a pipeline: `components=PIPELINE` with `stage=joint`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ldlm_hf import LDLMPipeline


Run = Callable[..., None]
TRAINED = ("latent_encoder", "latent_decoder", "token_decoder", "transformer")


@pytest.fixture
def finetuning(run_script: Run, tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """Settings of a run that goes on from a trained pipeline, in half precision, at `tmp_path/trained`."""
    settings = [*tiny_overrides, "model.transformer={num_layers: 2}", "evaluation.num_samples=0"]
    run_script("train_joint", *settings)
    pipeline = LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline", dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "trained")
    return [
        *settings,
        f"components={tmp_path / 'trained'}",
        f"loop.output_dir={tmp_path / 'finetuned'}",
        "warmup.steps=0",
    ]


def load(folder: Path) -> LDLMPipeline:
    pipeline = LDLMPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_starts_from_the_pipelines_weights(run_script: Run, finetuning: list[str], tmp_path: Path) -> None:
    run_script("train_joint", *finetuning, "optimizer.learning_rate=1e-30")
    before, after = load(tmp_path / "trained"), load(tmp_path / "finetuned" / "pipeline")
    for name in ("token_encoder", *TRAINED):
        weights = getattr(after, name).state_dict()
        for key, value in getattr(before, name).state_dict().items():
            torch.testing.assert_close(weights[key], value)
    card = (tmp_path / "finetuned" / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "* Trained further: `trained` (not on the Hub)." in card


def test_all_parts_learn_further_and_the_language_model_does_not(
    run_script: Run, finetuning: list[str], tmp_path: Path
) -> None:
    run_script("train_joint", *finetuning, "optimizer.learning_rate=1e-2", "loop.max_steps=40")
    log = (tmp_path / "finetuned" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for record in map(json.loads, log) if "loss" in record]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    before, after = load(tmp_path / "trained"), load(tmp_path / "finetuned" / "pipeline")
    for name in TRAINED:
        weights = getattr(after, name).state_dict()
        assert any(not torch.equal(weights[key], value) for key, value in getattr(before, name).state_dict().items())
    weights = after.token_encoder.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in before.token_encoder.state_dict().items())


def test_what_the_denoiser_lacked_changes_nothing_at_first(
    run_script: Run, finetuning: list[str], tmp_path: Path
) -> None:
    changes = [
        "model.transformer={guidance_embeds: true}",
        "objective.guidance_range=[0.5,5]",
        "consistency.weight=1",
        "conditioning.prefix_share=0.5",
    ]
    run_script("train_joint", *finetuning, *changes, "optimizer.learning_rate=1e-30")
    before, after = load(tmp_path / "trained"), load(tmp_path / "finetuned" / "pipeline")
    for part in ("guidance_embeds", "role_embeds"):
        assert after.transformer.config[part] and not before.transformer.config[part]
    latents = [
        pipe(
            batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).latents
        for pipe in (before, after)
    ]
    torch.testing.assert_close(*latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.transformer={num_attention_heads: 3}", "does not fit components"),
        ("model.transformer={num_layers: 1}", "has no place for"),
        ("model.sequence_length=16", "model.sequence_length=16 is not that of components"),
    ],
)
def test_another_model_is_refused(run_script: Run, finetuning: list[str], change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_script("train_joint", *finetuning, change)


@pytest.mark.parametrize("stage", ["joint", "diffusion"])
def test_it_goes_on_from_a_pipeline_without_its_token_encoder(
    run_script: Run, finetuning: list[str], tmp_path: Path, stage: str
) -> None:
    """`model.backbone` names the language model; its statistics are those of the text."""
    LDLMPipeline.from_pretrained(tmp_path / "trained", token_encoder=None).save_pretrained(tmp_path / "without")
    run_script("train_joint", *finetuning, f"components={tmp_path / 'without'}", f"stage={stage}")
    before, after = load(tmp_path / "trained").token_encoder, load(tmp_path / "finetuned" / "pipeline").token_encoder
    weights = after.state_dict()
    for key, value in before.state_dict().items():
        # half precision lies between
        torch.testing.assert_close(weights[key], value, rtol=1e-2, atol=1e-3)
    assert after.config.num_statistics_tokens == before.config.num_statistics_tokens


def test_a_backbone_that_is_not_the_pipelines_is_refused(
    run_script: Run, finetuning: list[str], tmp_path: Path
) -> None:
    LDLMPipeline.from_pretrained(tmp_path / "trained", token_encoder=None).save_pretrained(tmp_path / "without")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="token encoder hidden_size"):
        run_script(
            "train_joint",
            *finetuning,
            f"components={tmp_path / 'without'}",
            f"model.backbone={tmp_path / 'narrow'}",
            "model.layer=-1",
        )
