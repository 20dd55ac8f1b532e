"""`training/likelihood.py` on a real tiny run: its terms, its files, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldlm_hf import LDLMPipeline, LikelihoodBound, LikelihoodSettings
from ldlm_hf.evaluation.likelihood import calibrate


Run = Callable[..., None]


@pytest.fixture
def trained(run_script: Run, tiny_overrides: list[str], tmp_path: Path) -> Path:
    """A tiny run with a checkpoint, whose adaptive sampler has so few bins that it has learned something of each."""
    run_script("train_joint", *tiny_overrides, "loop.checkpointing_steps=4", "timestep_sampler.num_bins=2")
    return tmp_path / "run"


@pytest.fixture
def bound(run_script: Run, trained: Path) -> Callable[..., dict[str, Any]]:
    """Runs the script on it; its likelihood.json."""

    def run(*arguments: str) -> dict[str, Any]:
        sizes = ("--num_sequences", "8", "--times_per_sequence", "4")
        run_script("likelihood", "--pipeline", str(trained / "pipeline"), *sizes, *arguments)
        return json.loads((trained / "likelihood" / "likelihood.json").read_text(encoding="utf-8"))

    return run


def test_terms_add_up_and_settings_come_from_the_run(bound: Callable[..., dict[str, Any]], trained: Path) -> None:
    results = bound()
    nats = {name: values["nats_per_token"] for name, values in results["terms"].items()}
    prior = nats["diffusion"] + nats["last_step"] + nats["terminal_kl"] + nats["encoder_entropy"]
    assert nats["prior_cross_entropy"] == pytest.approx(prior)
    assert nats["rate"] == pytest.approx(nats["prior_cross_entropy"] - nats["encoder_entropy"])
    assert nats["tokens_only"] == pytest.approx(nats["token_reconstruction"] + nats["rate"])
    assert nats["total"] == pytest.approx(nats["hidden_reconstruction"] + nats["tokens_only"])
    assert nats["terminal_kl"] == 0
    assert results["settings"]["decoder_noise"] == 0.5
    assert results["settings"]["encoder_noise"] == pytest.approx(0.05)
    bits = results["terms"]["total"]["bits_per_token"]
    assert bits * 0.6931471805599453 == pytest.approx(nats["total"])
    text = (trained / "likelihood" / "likelihood.md").read_text(encoding="utf-8")
    assert f"| {nats['total']:,.4f} | {bits:,.4f} |" in text
    assert str(trained.parent) not in text
    assert bound()["terms"] == results["terms"]
    tokens_only = bound("--tokens_only")["terms"]
    assert {"hidden_reconstruction", "total"} == results["terms"].keys() - tokens_only.keys()
    assert tokens_only["tokens_only"] == results["terms"]["tokens_only"]


def test_calibration_measures_what_its_names_say(make_components: Callable, random_tokens: Callable) -> None:
    settings = LikelihoodSettings(encoder_noise=1e-6, decoder_noise=0.0, hidden_noise=1.0)
    bound = LikelihoodBound(**make_components(), settings=settings)
    sequences, times = random_tokens(7), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    measured = calibrate(bound, sequences, times, 7, seed=3)
    hidden_states, latents = bound.encode(sequences)
    dealt = times[[0, 1, 2, 0, 1, 2, 0]]
    errors = bound.squared_errors(latents, dealt, torch.Generator().manual_seed(3)) / latents[0].numel()
    expected = torch.stack([errors[place::3].mean() for place in range(3)])
    torch.testing.assert_close(measured.latent_errors, expected)
    with torch.no_grad():
        predicted = bound.latent_decoder(latents).hidden_states
    in_batches = calibrate(bound, sequences, times, 2, seed=3)
    for one in (measured, in_batches):
        assert one.hidden_error == pytest.approx(float((predicted - hidden_states).square().mean().sqrt()), rel=1e-4)
        assert one.latent_std == pytest.approx(float(latents.var(0, correction=0).mean().sqrt()), rel=1e-5)


def test_times_from_the_runs_own_sampler(
    bound: Callable[..., dict[str, Any]], run_script: Run, tiny_overrides: list[str], trained: Path, tmp_path: Path
) -> None:
    """They are other times with the same mean."""
    many = ("--times_per_sequence", "64")
    log_snr, adaptive = bound(*many), bound(*many, "--proposal", "adaptive")
    assert [one["settings"]["proposal"] for one in (log_snr, adaptive)] == ["log_snr", "adaptive"]
    ours, theirs = (one["terms"]["diffusion"] for one in (log_snr, adaptive))
    assert ours["nats_per_token"] != theirs["nats_per_token"]
    error = ours["monte_carlo_error"] + theirs["monte_carlo_error"]
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], abs=4 * error)
    uniform = ["timestep_sampler.adaptive=false", "loop.checkpointing_steps=4", f"loop.output_dir={tmp_path / 'two'}"]
    run_script("train_joint", *tiny_overrides, *uniform)
    with pytest.raises(ValueError, match="sampled its times uniformly"):
        bound("--proposal", "adaptive", "--timestep_sampler", str(tmp_path / "two"))


def test_a_denoiser_trained_alone_does_not_know_its_decoders_noise(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    token_loss = "objective.reconstruction=hidden+token"
    run_script("train_joint", *tiny_overrides, "stage=autoencoder", token_loss, f"loop.output_dir={first}")
    stage = ["stage=diffusion", f"components={first}/pipeline", f"loop.output_dir={second}"]
    run_script("train_joint", *tiny_overrides, *stage)
    command = ("--pipeline", str(second / "pipeline"), "--num_sequences", "4", "--times_per_sequence", "2")
    with pytest.raises(ValueError, match="second trained a denoiser alone.*units of the standardised latents"):
        run_script("likelihood", *command)
    run_script("likelihood", *command, "--decoder_noise", "0", "--encoder_noise", "0.1")
    results = json.loads((second / "likelihood" / "likelihood.json").read_text(encoding="utf-8"))
    assert (results["settings"]["decoder_noise"], results["settings"]["encoder_noise"]) == (0, 0.1)


def test_what_the_bound_cannot_be_had_of_is_refused(
    run_script: Run, bound: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"a tenth of --decoder_noise 0"):
        bound("--decoder_noise", "0")
    with pytest.raises(ValueError, match="no text is held out|hold none out"):
        bound("data.holdout_documents=0")
    with pytest.raises(OSError, match="holds no checkpoint"):
        bound("--proposal", "adaptive", "--timestep_sampler", str(tmp_path))
    pipe = LDLMPipeline.from_pretrained(trained / "pipeline")
    pipe.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="--decoder_noise is not given"):
        run_script("likelihood", "--pipeline", str(tmp_path / "copy"))
    LDLMPipeline(**pipe.components | {"latent_encoder": None}).save_pretrained(tmp_path / "without")
    with pytest.raises(ValueError, match="lacks latent_encoder"):
        run_script("likelihood", "--pipeline", str(tmp_path / "without"))


@pytest.mark.parametrize(
    ("option", "value"), [("num_sequences", 1), ("times_per_sequence", 1), ("batch_size", 0), ("hidden_noise", 1.0)]
)
def test_options_that_leave_nothing_to_measure_are_refused(
    run_script: Run, capsys: pytest.CaptureFixture[str], option: str, value: float
) -> None:
    with pytest.raises(SystemExit):
        run_script("likelihood", "--pipeline", "none", "--tokens_only", f"--{option}", str(value))
    assert f"error: --{option} " in capsys.readouterr().err
