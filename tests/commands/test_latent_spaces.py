"""The latent spaces of Table 2: each trains with the same scripts and ends with a pipeline that loads and samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldlm_hf import LDLMLatentEncoder, LDLMPipeline


Run = Callable[..., None]

IDENTITY = "model.latent_encoder={architecture: identity}"
AUGMENTATIONS = ["objective.token_masking=0.3", "objective.feature_noise=0.714", "objective.latent_dropout=0.4"]
ONE_STAGE = {
    "scratch embeddings": [
        "model.representation=scratch",
        "model.normalize_embeddings=true",
        "objective.reconstruction=token",
        "warmup.steps=0",
        IDENTITY,
    ],
    "frozen embeddings": ["model.representation=embedding", "objective.reconstruction=token", IDENTITY],
    "TEncDM": ["objective.reconstruction=token", IDENTITY],
}


def check_pipeline(folder: Path) -> LDLMPipeline:
    """Loads a pipeline, samples from it, and brings a text through its latents."""
    pipe = LDLMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    sampled = pipe(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert sampled.sequences.shape == (2, 8)
    latents = pipe.encode(["w2 w3 w4 w5 w6 w7 w8 w9"])
    assert latents.shape == (1, pipe.transformer.config.sample_size, pipe.transformer.config.in_channels)
    assert len(pipe.decode(latents)) == 1
    return pipe


@pytest.mark.parametrize("space", ONE_STAGE)
def test_hidden_states_or_embeddings_as_latents(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, space: str
) -> None:
    run_script("train_joint", *tiny_overrides, *ONE_STAGE[space])
    pipe = check_pipeline(tmp_path / "run" / "pipeline")
    input_ids = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9]])
    hidden_states = pipe.token_encoder(input_ids).hidden_states
    torch.testing.assert_close(pipe.encode(["w2 w3 w4 w5 w6 w7 w8 w9"]), hidden_states, rtol=0, atol=0)
    assert pipe.transformer.config.in_channels == pipe.token_encoder.config.hidden_size
    if space == "scratch embeddings":
        torch.testing.assert_close(hidden_states.square().mean(-1), torch.ones(1, 8))

    pipe.save_pretrained(tmp_path / "again")
    check_pipeline(tmp_path / "again")


def test_cosmos_trains_in_two_stages_and_its_latents_are_standardised(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "autoencoder", tmp_path / "diffusion"
    run_script(
        "train_joint",
        *tiny_overrides,
        *AUGMENTATIONS,
        "stage=autoencoder",
        "objective.reconstruction=hidden+token",
        f"loop.output_dir={first}",
    )
    assert f"stage=diffusion components={first}/pipeline" in capsys.readouterr().out
    assert not (first / "pipeline" / "transformer").exists()

    diffusion = [*tiny_overrides, "stage=diffusion", f"components={first}/pipeline", f"loop.output_dir={second}"]
    run_script("train_joint", "--dry_run", *diffusion)
    overview = [line for line in capsys.readouterr().out.splitlines() if "parameters (" in line]
    assert [line.partition(":")[0] for line in overview] == ["transformer"]
    run_script("train_joint", *diffusion, "loop.checkpointing_steps=2")
    pipe = check_pipeline(second / "pipeline")
    before = LDLMLatentEncoder.from_pretrained(first / "pipeline", subfolder="latent_encoder")
    assert not before.config.standardize_latents
    assert pipe.latent_encoder.config.standardize_latents
    assert pipe.latent_decoder.config.standardize_latents
    frozen, trained_on = before.state_dict(), pipe.latent_encoder.state_dict()
    assert all(torch.equal(frozen[name], trained_on[name]) for name in frozen)

    # the decoder takes back what the encoder has done
    hidden_states = pipe.token_encoder(torch.arange(2, 10)[None]).hidden_states
    with torch.no_grad():
        plain, standardised = before(hidden_states).latents, pipe.latent_encoder(hidden_states).latents
    latents_mean, latents_std = pipe.latent_decoder.latents_mean, pipe.latent_decoder.latents_std
    torch.testing.assert_close(standardised * latents_std + latents_mean, plain)
    assert not torch.allclose(standardised, plain)


def test_settings_that_contradict_the_stage_are_refused(run_script: Run, tiny_overrides: list[str]) -> None:
    with pytest.raises(ValueError, match=r"components='' with stage='diffusion'"):
        run_script("train_joint", *tiny_overrides, "stage=diffusion")
    with pytest.raises(ValueError, match=r"components='somewhere' with stage='autoencoder'"):
        run_script("train_joint", *tiny_overrides, "components=somewhere", "stage=autoencoder")
    with pytest.raises(ValueError, match="stage='second' is unknown"):
        run_script("train_joint", *tiny_overrides, "stage=second")
    with pytest.raises(ValueError, match=r"latent_dropout=0\.4 goes with stage='autoencoder' only"):
        run_script("train_joint", *tiny_overrides, "objective.latent_dropout=0.4")
    with pytest.raises(ValueError, match="normalize_embeddings=True with representation='hidden'"):
        run_script("train_joint", *tiny_overrides, "model.normalize_embeddings=true")
    with pytest.raises(ValueError, match="latent_size=16 with architecture='identity'"):
        run_script("train_joint", *tiny_overrides, IDENTITY, "model.latent_size=16")
