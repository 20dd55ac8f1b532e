"""A tiny run: a random GPT-2, a corpus of number words, and the command line of the training scripts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest


TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture
def tiny_overrides(backbone_folders: dict[str, Path], tiny_tokenizer, tmp_path: Path) -> list[str]:
    """Settings of a run that takes a second: L = 8, four steps of eight sequences, `tmp_path/run`."""
    tiny_tokenizer.save_pretrained(backbone_folders["gpt2"])
    generator = random.Random(0)
    lines = [" ".join(f"w{generator.randint(2, 39)}" for _ in range(60)) for _ in range(40)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    layers = "hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48"
    return [
        f"model.backbone={backbone_folders['gpt2']}",
        "model.sequence_length=8",
        "model.statistics_sequences=32",
        f"model.latent_encoder={{{layers}}}",
        f"model.latent_decoder={{{layers}}}",
        f"model.token_decoder={{{layers}}}",
        "model.transformer={num_layers: 1, num_attention_heads: 2, attention_head_dim: 12}",
        f"data.source={tmp_path / 'corpus.txt'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.holdout_documents=8",
        "objective.decoder_noise=0.5",
        "timestep_sampler.update_every=2",
        "warmup.steps=2",
        "optimizer.lr_warmup_steps=2",
        f"loop.output_dir={tmp_path / 'run'}",
        "loop.max_steps=4",
        "loop.batch_size=8",
        "loop.logging_steps=1",
        "loop.mixed_precision=no",
        "loop.trackers=[]",
        # which is measured otherwise
        "loop.peak_tflops=1",
        "evaluation.every=0",
        "evaluation.num_sequences=16",
        "evaluation.num_samples=4",
        "evaluation.num_inference_steps=3",
        "evaluation.judge=null",
    ]
