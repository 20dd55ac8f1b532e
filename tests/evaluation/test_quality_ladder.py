from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldlm_hf import LDLMPipeline, LDLMTransformer1DModel
from ldlm_hf.evaluation.quality_ladder import denoise_once, ladder_table, quality_ladder
from ldlm_hf.evaluation.scores import SetScorer, beside_real_text


@pytest.fixture
def pipeline(make_components: Callable, tiny_tokenizer) -> LDLMPipeline:
    return LDLMPipeline(tokenizer=tiny_tokenizer, **make_components())


def scorer(pipeline: LDLMPipeline) -> SetScorer:
    return SetScorer(judge=None, batch_size=4, tokenizer=pipeline.tokenizer, references=None)


def test_rungs_are_the_parts_of_the_pipeline(pipeline: LDLMPipeline, random_tokens: Callable) -> None:
    real = random_tokens(12)
    ladder = {rung["title"]: rung for rung in quality_ladder(pipeline, real, scorer(pipeline), batch_size=5)}
    assert list(ladder)[:2] == ["decoded", "decoded, noise 0.25"]
    assert "one step from t = 0.4" in ladder
    decoded = pipeline.decode_to_sequences(pipeline.encode_sequences(real))
    expected = scorer(pipeline).score(decoded).scores
    assert ladder["decoded"]["token_accuracy"] == pytest.approx((decoded == real).float().mean().item())
    assert ladder["decoded"]["scores"]["entropy"] == expected.values["entropy"]
    assert ladder["decoded"]["scores"]["num_texts"] == 12


def test_rungs_are_the_same_in_any_batches(pipeline: LDLMPipeline, random_tokens: Callable) -> None:
    real = random_tokens(12)
    assert quality_ladder(pipeline, real, scorer(pipeline), 12) == quality_ladder(pipeline, real, scorer(pipeline), 5)


def test_one_step_is_the_denoiser_on_truly_noisy_latents(pipeline: LDLMPipeline, random_tokens: Callable) -> None:
    latents = pipeline.encode_sequences(random_tokens())
    noise, time = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.3)
    with torch.no_grad():
        predicted = denoise_once(pipeline, 0.3, latents, noise)
        expected = pipeline.transformer(pipeline.scheduler.add_noise(latents, noise, time), time).sample
    torch.testing.assert_close(predicted, expected)


def test_a_flow_map_takes_its_step_to_clean_latents(pipeline: LDLMPipeline, random_tokens: Callable) -> None:
    settings = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    pipeline.transformer = LDLMTransformer1DModel(**settings | {"next_timestep_conditioning": True})
    latents = pipeline.encode_sequences(random_tokens())
    noise, time = torch.zeros_like(latents), torch.full((3,), 0.3)
    with torch.no_grad():
        predicted = denoise_once(pipeline, 0.3, latents, noise)
        noisy = pipeline.scheduler.add_noise(latents, noise, time)
        expected = pipeline.transformer(noisy, time, next_timestep=torch.zeros(3)).sample
    torch.testing.assert_close(predicted, expected)


def test_the_table_shows_what_was_measured(pipeline: LDLMPipeline, random_tokens: Callable) -> None:
    real, of_sets = beside_real_text(random_tokens(24), 12, pipeline.tokenizer, judge=None, batch_size=4)
    assert len(real) == 12 and of_sets.references is None
    ladder = quality_ladder(pipeline, real, of_sets, batch_size=12)
    ends = [of_sets.score(sequences).scores.to_json() for sequences in (real, random_tokens(12, seed=1))]
    lines = ladder_table(ends[0], ladder, ends[1])
    assert lines[0] == "| texts | number | tokens kept | seq-rep-4 ↓ | diversity ↑ | entropy (nats) ↑ |"
    assert [line.split(" | ")[0] for line in (lines[2], lines[-1])] == ["| real text", "| sampled"]
    assert len(lines) == 2 + len(ladder) + 2


def test_command(pipeline: LDLMPipeline, run_script: Callable[..., None], tmp_path: Path, capsys) -> None:
    pipeline.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "corpus.txt").write_text("w2 w3 w4 w5 w6 w7 w8 w9\n" * 40, encoding="utf-8")
    arguments = ["--pipeline", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "out"), "--judge", "none"]
    arguments += ["--num_samples", "6", "--steps", "2", f"data.source={tmp_path / 'corpus.txt'}"]
    run_script("quality_ladder", *arguments, f"data.cache_dir={tmp_path / 'cache'}", "data.holdout_fraction=0.5")
    results = json.loads((tmp_path / "out" / "quality_ladder.json").read_text(encoding="utf-8"))
    assert results["sampled"]["num_texts"] == 6
    text = (tmp_path / "out" / "quality_ladder.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "6 held-out texts, 6 samples in 2 steps" in text

    pipeline.register_modules(token_encoder=None)
    pipeline.save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="lacks token_encoder"):
        run_script("quality_ladder", "--pipeline", str(tmp_path / "without"), *arguments[2:])
