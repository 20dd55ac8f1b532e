"""Whole tiny runs of the training scripts: what they write, and that a resumed run is the run that was not stopped."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard
from torch import nn

from ldlm_hf import LDLMPipeline, TangentDDIMScheduler, TangentEulerMaruyamaScheduler
from ldlm_hf.data import load_corpora
from ldlm_hf.evaluation.real_text import held_out_part, training_rows
from ldlm_hf.evaluation.samples import sample, sample_rows
from ldlm_hf.loading.settings_reader import load_settings
from ldlm_hf.training import held_out
from ldlm_hf.training.devices import check_sharding
from ldlm_hf.training.loop import TrainingLoop, learning_rate_at, split_batch
from ldlm_hf.training.randomness import RowRandomness
from ldlm_hf.training.recipe import Evaluation, Recipe, StepLosses
from ldlm_hf.training.recipes.joint import JointRecipe
from ldlm_hf.training.run_folder import check_output_dir
from ldlm_hf.training.run_state import EMAWeights
from ldlm_hf.training.settings import LoopSettings, OptimizerSettings, RunSettings


Run = Callable[..., None]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path) -> dict[int, tuple[float, ...]]:
    names = ("loss", "hidden_loss", "token_loss", "diffusion_loss", "gradient_norm", "latent_std")
    return {row["step"]: tuple(row[name] for name in names) for row in records(run) if "loss" in row}


def test_a_run_ends_with_a_pipeline_that_loads_a_card_and_samples(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("train_joint", *tiny_overrides, "evaluation.every=2")
    run = tmp_path / "run"
    pipe = LDLMPipeline.from_pretrained(run / "pipeline")
    assert len(pipe(batch_size=2, num_inference_steps=2).texts) == 2
    assert pipe.decode(pipe.encode("w2 w3 w4"))

    card = ModelCard.load(run / "pipeline" / "README.md")
    assert card.data.library_name == "diffusers"
    assert "held-out real texts" in card.text
    assert "4 steps of 8 sequences of 8 tokens" in card.text
    assert (run / "samples.md").read_text(encoding="utf-8").count("**") == 2 * 4
    assert (run / "samples-2.md").is_file()

    rows = records(run)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    wanted = {"diffusion_loss", "hidden_loss", "token_accuracy", "latent_std", "gradient_norm", "gate"}
    assert all(wanted <= row.keys() for row in rows if "loss" in row)
    assert next(row["gate"] for row in rows if "loss" in row) == 0.0
    evaluations = [row for row in rows if "eval/diffusion_loss" in row]
    assert [row["step"] for row in evaluations] == [2, 4]
    assert 0 <= evaluations[-1]["eval/reconstruction_accuracy"] <= 1
    printed = capsys.readouterr().out
    assert "latent_encoder:" in printed
    assert "held-out text after 2 steps: reconstruction_mse" in printed
    assert "adaptive_timesteps" in printed


def test_the_pipeline_holds_the_times_that_training_has_learned(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    settings = ["timestep_sampler.num_bins=2", "timestep_sampler.update_every=2", "evaluation.num_samples=0"]
    run_script("train_joint", *tiny_overrides, *settings, "evaluation.grid_size=2")
    pipe = LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    logged = next(row for row in records(tmp_path / "run") if "eval/timestep_cdf/t=0.50" in row)
    cdf = pipe.scheduler.config.timestep_cdf
    assert cdf == pytest.approx([0, logged["eval/timestep_cdf/t=0.50"], 1], abs=1e-6)
    pipe.scheduler = TangentDDIMScheduler.from_config(pipe.scheduler.config, time_grid="learned")
    assert len(pipe(num_inference_steps=3).texts) == 1
    assert pipe.scheduler.timesteps[0] == 1

    run_script("train_joint", *tiny_overrides, "timestep_sampler.adaptive=false", f"loop.output_dir={tmp_path}/other")
    pipe = LDLMPipeline.from_pretrained(tmp_path / "other" / "pipeline")
    with pytest.raises(ValueError, match="needs timestep_cdf"):
        TangentDDIMScheduler.from_config(pipe.scheduler.config, time_grid="learned")


def test_the_finished_pipeline_has_the_sampler_of_its_settings(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    sampler = "evaluation.sampler=TangentDDIMScheduler:eta=1.0,time_grid=learned"
    settings = [*tiny_overrides, "timestep_sampler.num_bins=2", "loop.checkpointing_steps=4"]
    with pytest.raises(ValueError, match="this denoiser is trained without a self-condition"):
        unconditioned = "model.transformer.self_conditioning=false"
        run_script("train_joint", *settings, f"{sampler},self_condition_scale=2", unconditioned)
    run_script("train_joint", *settings)
    own = LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(own.scheduler) is TangentEulerMaruyamaScheduler
    # a finished run gets another one when it is resumed at its end
    sampler += ",self_condition_scale=2"
    run_script("train_joint", *settings, sampler, "--resume_from_checkpoint", "latest")
    pipe = LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.config.self_condition_scale == 2
    pipe(num_inference_steps=3)
    assert pipe.num_function_evaluations == 5
    assert type(pipe.scheduler) is TangentDDIMScheduler
    assert (pipe.scheduler.config.eta, pipe.scheduler.config.time_grid) == (1.0, "learned")
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["changed_settings"]["evaluation.sampler"] == sampler.partition("=")[2]


def test_dry_run_prints_and_leaves_nothing(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("train_joint", "--dry_run", *tiny_overrides)
    printed = capsys.readouterr().out
    assert "64 tokens a step" in printed
    assert "transformer:" in printed
    assert "decoder_noise: 0.5" in printed
    assert not (tmp_path / "run").exists()


# all that a run may do beside the paper's recipe
BEYOND_THE_PAPER = [
    "model.latent_encoder.standardize_latents=true",
    "model.transformer.guidance_embeds=true",
    "objective.noise_levels=3",
    "objective.guidance_range=[0.5, 5]",
    "consistency.weight=1",
    "consistency.warmup_steps=2",
    "conditioning.prefix_share=0.25",
    "conditioning.gaps_share=0.25",
    "conditioning.start_step=2",
    "optimizer.name=muon",
]


@pytest.mark.parametrize(
    ("workers", "overrides"), [(0, []), (0, BEYOND_THE_PAPER), pytest.param(1, [], marks=pytest.mark.slow)]
)
def test_resumed_run_has_the_losses_of_one_that_was_not_stopped(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, workers: int, overrides: list[str]
) -> None:
    common = [
        *tiny_overrides,
        *overrides,
        "loop.checkpointing_steps=3",
        "loop.device_batch_size=4",
        f"loop.dataloader_workers={workers}",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_script("train_joint", *common, "loop.max_steps=7", f"loop.output_dir={whole}")
    run_script("train_joint", *common, "loop.max_steps=3", f"loop.output_dir={stopped}")
    run_script(
        "train_joint",
        *common,
        "loop.max_steps=7",
        f"loop.output_dir={stopped}",
        "--resume_from_checkpoint",
        "latest",
    )
    assert list(losses(whole)) == list(range(1, 8))
    assert losses(whole) == losses(stopped)
    evaluations = [
        {k: v for k, v in row.items() if k.startswith("eval/")}
        for run in (whole, stopped)
        for row in records(run)[-1:]
    ]
    assert evaluations[0] == evaluations[1] != {}


def test_the_encoder_of_a_finished_run_holds_the_statistics_of_its_latents(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Of the EMA weights, over the training text; the live ones' are never used."""
    run_script("train_joint", *tiny_overrides, *BEYOND_THE_PAPER, "model.statistics_sequences=1000")
    pipe = LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.latent_encoder.config.standardize_latents and not pipe.latent_decoder.config.standardize_latents
    settings = load_settings(RunSettings, str(tmp_path / "run" / "settings.yaml"), [])
    corpora = load_corpora(settings.data, pipe.tokenizer, 8)
    latents = pipe.encode_sequences(training_rows(corpora.train, 1000)["input_ids"])
    torch.testing.assert_close(latents.mean((0, 1)), torch.zeros(24), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 1)), torch.ones(24), rtol=0, atol=1e-2)


def test_the_consistency_loss_asks_the_ema_weights(tiny_overrides: list[str], tmp_path: Path) -> None:
    settings = load_settings(RunSettings, None, [*tiny_overrides, *BEYOND_THE_PAPER])
    recipe = JointRecipe(settings, Accelerator(cpu=True))
    recipe.load()
    corpora = load_corpora(settings.data, recipe.tokenizer, 8)
    recipe.build(corpora.train, held_out_part(corpora))
    loop = TrainingLoop(recipe, corpora.train, recipe.accelerator, settings)
    for loop.state.step in range(3):
        loop.train_step()
    averaged = dict(recipe.module.averaged_transformer.named_parameters())
    trained = [name for name, parameter in recipe.module.named_parameters() if parameter.requires_grad]
    of_transformer = 0
    for name, weight in zip(trained, loop.state.ema.shadow_params, strict=True):
        part, _, name = name.partition(".")
        if part == "transformer":
            of_transformer += 1
            assert torch.equal(averaged[name], weight)
    assert not torch.equal(recipe.module.averaged_transformer.proj_in.weight, recipe.module.transformer.proj_in.weight)
    assert of_transformer == len(averaged)


def test_texts_are_given_in_part_from_the_start_step_on(tiny_overrides: list[str]) -> None:
    """And the denoiser is told of nothing before, so that DDP finds its embedding of what is given in each pass."""
    settings = load_settings(RunSettings, None, [*tiny_overrides, *BEYOND_THE_PAPER])
    recipe = JointRecipe(settings, Accelerator(cpu=True))
    of_steps = [recipe.conditions(8, RowRandomness(0, step, range(8), 8), torch.device("cpu")) for step in range(4)]
    assert [int(conditions.given.any(1).sum()) for conditions in of_steps[:2]] == [0, 0]
    assert all(conditions.given.any(1).sum() >= 3 for conditions in of_steps[2:])
    assert all(conditions.attention_mask().all() for conditions in of_steps[:2])


def test_conditions_that_begin_behind_the_last_step_are_refused() -> None:
    shares = ["conditioning.prefix_share=0.25", "loop.max_steps=10"]
    assert load_settings(RunSettings, None, [*shares, "conditioning.start_step=9"]).gives_texts
    with pytest.raises(ValueError, match=r"conditioning.start_step=10 with loop.max_steps=10"):
        load_settings(RunSettings, None, [*shares, "conditioning.start_step=10"])


def test_the_consistency_loss_is_refused_where_ema_weights_are_sharded(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(RunSettings, None, [*tiny_overrides, *BEYOND_THE_PAPER])
    recipe = JointRecipe(settings, Accelerator(cpu=True))
    monkeypatch.setattr(recipe.accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"consistency.weight=1.* with FSDP"):
        recipe.load()


def test_ema_weights_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    ours, theirs = (kind(parameters, decay=0.9, foreach=True) for kind in (EMAWeights, EMAModel))
    for _ in range(20):
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter))
        ours.step(parameters)
        theirs.step(parameters)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for found, expected in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(found, expected)


def test_folder_of_another_run_is_refused(run_script: Run, tiny_overrides: list[str], tmp_path: Path) -> None:
    run_script("train_joint", *tiny_overrides, "loop.max_steps=1")
    with pytest.raises(ValueError, match=r"holds another run. Name another folder"):
        run_script("train_joint", *tiny_overrides, "objective.decoder_noise=0.7")
    with pytest.raises(ValueError, match=r"settings differ in optimizer\.learning_rate"):
        run_script("train_joint", *tiny_overrides, "optimizer.learning_rate=1.0", "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        run_script("train_joint", *tiny_overrides, "loop.max_steps=1")
    run_script("train_joint", *tiny_overrides, "objective.decoder_noise=0.7", "--overwrite_output_dir")
    assert len(losses(tmp_path / "run")) == 4


@pytest.fixture
def stopped(run_script: Run, tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """Settings of a run that was stopped after two steps of four."""
    settings = [*tiny_overrides, "evaluation.num_samples=0", "loop.checkpointing_steps=2"]
    run_script("train_joint", *settings, "loop.max_steps=2")
    return [*settings, "--resume_from_checkpoint", "latest"]


def test_a_run_goes_on_with_what_changes_no_token(run_script: Run, stopped: list[str], tmp_path: Path) -> None:
    shutil.copy(tmp_path / "corpus.txt", tmp_path / "moved.txt")
    changes = [f"data.source={tmp_path / 'moved.txt'}", "data.num_proc=2", f"data.cache_dir={tmp_path / 'other'}"]
    changes += ["loop.gradient_checkpointing=true", "data.max_validation_documents=5", "loop.logging_steps=1"]
    run_script("train_joint", *stopped, *changes)
    run_script("train_joint", *stopped[:-2], f"loop.output_dir={tmp_path / 'whole'}")
    for found, expected in zip(losses(tmp_path / "run").values(), losses(tmp_path / "whole").values(), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_compiled_blocks_are_no_other_run(stopped: list[str], tmp_path: Path) -> None:
    settings = load_settings(RunSettings, None, [*stopped[:-2], "loop.compile=true"])
    assert check_output_dir(settings, "latest", overwrite=False) == tmp_path / "run/checkpoint-2"


def test_another_text_is_refused_and_the_folder_left_as_it_was(
    run_script: Run, stopped: list[str], tmp_path: Path
) -> None:
    saved = (tmp_path / "run/settings.yaml").read_text(encoding="utf-8")
    # as many tokens
    lines = (tmp_path / "corpus.txt").read_text(encoding="utf-8").split("\n")
    words = lines[0].split()
    lines[0] = " ".join([*words[1:], words[0]])
    (tmp_path / "other.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"another order of sequences: text_digest=.*Resume with the same text"):
        run_script("train_joint", *stopped, f"data.source={tmp_path / 'other.txt'}")
    assert (tmp_path / "run/settings.yaml").read_text(encoding="utf-8") == saved


def test_a_new_run_goes_on_with_other_settings(run_script: Run, stopped: list[str], tmp_path: Path) -> None:
    changes = ["optimizer.learning_rate=0.01", "optimizer.weight_decay=0.5", "optimizer.beta1=0.5"]
    with pytest.raises(ValueError, match=r"differ in .*--resume_from_checkpoint .*checkpoint-2 loop.output_dir=ANOTH"):
        run_script("train_joint", *stopped, *changes)
    other = [f"loop.output_dir={tmp_path / 'other'}", "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-2")]
    run_script("train_joint", *stopped, *changes, *other)
    assert list(losses(tmp_path / "other")) == [3, 4]
    state = torch.load(tmp_path / "other/checkpoint-4/optimizer.bin", weights_only=True)["param_groups"][0]
    assert (state["weight_decay"], state["betas"]) == (0.5, (0.5, 0.98))


def test_a_run_from_before_there_was_a_prefix_goes_on_without_one(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    without = [*tiny_overrides, "model.prefix=false", "loop.checkpointing_steps=2", "evaluation.num_samples=0"]
    run_script("train_joint", *without)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    saved = tmp_path / "run/settings.yaml"
    saved.write_text(saved.read_text(encoding="utf-8").replace("  prefix: false\n", ""), encoding="utf-8")
    before = losses(tmp_path / "run")
    resumed = ["--resume_from_checkpoint", str(tmp_path / "run/checkpoint-2")]
    default = [setting for setting in without if setting != "model.prefix=false"]
    # statistics that a checkpoint holds are of hidden states without a prefix, in this folder and in another
    for folder in ([], [f"loop.output_dir={tmp_path / 'other'}"]):
        with pytest.raises(ValueError, match=r"model\.prefix=True differs .*Set model\.prefix=False"):
            run_script("train_joint", *default, *folder, *resumed)
    run_script("train_joint", *without, *resumed)
    assert losses(tmp_path / "run") == before


def test_latest_starts_a_run_and_refuses_one_that_lost_its_checkpoints(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    latest = [*tiny_overrides, "loop.max_steps=1", "evaluation.num_samples=0", "--resume_from_checkpoint", "latest"]
    run_script("train_joint", *latest)
    shutil.rmtree(tmp_path / "run/checkpoint-1")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(
        OSError, match=r"run holds a run that has taken steps, and no checkpoint.*--overwrite_output_d"
    ):
        run_script("train_joint", *latest)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    # killed before its first step
    (tmp_path / "run/metrics.jsonl").unlink()
    run_script("train_joint", *latest)
    shutil.rmtree(tmp_path / "run/checkpoint-1")
    run_script("train_joint", *latest, "--overwrite_output_dir")
    assert (tmp_path / "run/checkpoint-1").is_dir()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.sequence_length=64", "sequence_length=64 is longer than .*max_position_embeddings=16"),
        ("model.latent_encoder.num_latents=4", "set model.sequence_length, model.num_latents"),
        ("model.layer=9", "layer=9 does not exist"),
        ("model.representation=scratch", "collapses"),
        ("data.holdout_documents=0", "held-out text"),
        ("data.source=nowhere.txt", "nowhere.txt"),
        ("loop.batch_size=1000", "1000"),
        ("evaluation.judge=./no-such-judge", "evaluation.judge='./no-such-judge' cannot be loaded"),
        ("evaluation.judge=package:no_such_package/judge.gguf", "not installed"),
        ("loop.device_batch_size=3", "does not divide"),
        (
            "evaluation.sampler=TangentDDIMScheduler:eta=2.0",
            "evaluation.sampler='TangentDDIMScheduler:eta=2.0'.*eta=2",
        ),
        ("evaluation.sampler=TangentDDIMScheduler:time_grid=no", "time_grid='no' must be one of"),
    ],
)
def test_bad_runs_stop_before_any_work(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, override: str, expected: str
) -> None:
    with pytest.raises((ValueError, OSError), match=expected):
        run_script("train_joint", *tiny_overrides, override)
    assert not list((tmp_path).glob("run/checkpoint-*"))


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "_STEPS=8.*unset it.*loop.device_batch_size"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "_BACKEND=EAGER.*leave that out.*loop.compile=true"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision=bf16.*set the precision in loop.mixed_precision"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision=fp8.*set the precision in loop.mixed_precision"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config.*leave that out"),
    ],
)
def test_launchers_that_change_a_run_behind_its_settings_are_refused(
    run_script: Run,
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    remedy: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=remedy):
        run_script("train_joint", *tiny_overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"fsdp_version": 1}, "fsdp_version=1: set 2"),
        ({"activation_checkpointing": True}, "loop.gradient_checkpointing=true"),
    ],
)
def test_kinds_of_fsdp_that_change_the_weights_are_refused(changes: dict[str, Any], remedy: str) -> None:
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | changes)
    with pytest.raises(ValueError, match=remedy):
        check_sharding(plugin)
    check_sharding(FullyShardedDataParallelPlugin(fsdp_version=2))


def test_a_launch_file_leaves_the_precision_to_the_settings(repository: Path) -> None:
    for file in (repository / "training/accelerate").glob("*.yaml"):
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["mixed_precision"] == "no"


def test_a_sampler_that_takes_more_steps_is_refused_before_any_work(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    settings = ["evaluation.sampler=TangentDPMSolverMultistepScheduler", "evaluation.num_inference_steps=1"]
    with pytest.raises(ValueError, match="evaluation.num_inference_steps=1: .*solver_order=2"):
        run_script("train_joint", *tiny_overrides, *settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("learned", ["adaptive=false", "update_every=5"])
def test_a_time_grid_that_the_run_does_not_learn_is_refused_before_any_work(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, learned: str
) -> None:
    settings = ["evaluation.sampler=TangentDDIMScheduler:time_grid=learned", f"timestep_sampler.{learned}"]
    with pytest.raises(ValueError, match=r"evaluation\.sampler=.*timestep_sampler\.adaptive=true learns every"):
        run_script("train_joint", *tiny_overrides, *settings)
    assert not (tmp_path / "run").exists()


def test_the_pipeline_is_saved_before_what_may_fail(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    # more edges than times are seen in so short a run, so that none are learned
    settings = ["timestep_sampler.num_bins=1000", "evaluation.sampler=TangentDDIMScheduler:time_grid=learned"]
    with pytest.raises(ValueError, match="needs timestep_cdf"):
        run_script("train_joint", *tiny_overrides, *settings)
    pipe = LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipe.scheduler) is TangentEulerMaruyamaScheduler
    # nothing can be written where the final samples should go
    blocked = tmp_path / "blocked"
    (blocked / "samples.md").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        run_script("train_joint", *tiny_overrides, f"loop.output_dir={blocked}")
    assert LDLMPipeline.from_pretrained(blocked / "pipeline")(num_inference_steps=2).texts


def test_samples_of_a_run_are_those_of_an_evaluation_in_any_batches(make_pipeline: Callable) -> None:
    pipe = make_pipeline()
    whole, texts = sample(pipe, 5, 3, seed=3, batch_size=5)
    split = sample(pipe, 5, 3, seed=3, batch_size=2)
    assert torch.equal(whole, split[0]) and texts == split[1]
    assert len({tuple(row) for row in whole.tolist()}) == 5
    # as evaluate.py makes sample 4 of seed 3
    assert torch.equal(sample_rows(pipe, 3, 3, [4]).sequences, whole[4:])


def test_held_out_numbers_are_the_same_in_any_batches(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    results = []
    for size in (16, 3):
        folder = tmp_path / f"batches-of-{size}"
        run_script("train_joint", *tiny_overrides, f"evaluation.batch_size={size}", f"loop.output_dir={folder}")
        results.append(json.loads((folder / "results.json").read_text(encoding="utf-8"))["held_out"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_previews_come_from_the_sampler_of_the_settings(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = []

    def record(pipeline: LDLMPipeline, *args: Any, **kwargs: Any) -> Any:
        sampled.append((pipeline.scheduler, pipeline.config.self_condition_scale))
        return sample(pipeline, *args, **kwargs)

    monkeypatch.setattr(held_out, "sample", record)
    sampler = "evaluation.sampler=TangentDDIMScheduler:eta=1.0,time_grid=learned,self_condition_scale=3"
    learned = ["timestep_sampler.num_bins=2", "timestep_sampler.update_every=3"]
    run_script("train_joint", *tiny_overrides, *learned, "evaluation.every=1", sampler)
    assert len(sampled) == 3
    for scheduler, scale in sampled:
        assert type(scheduler) is TangentDDIMScheduler and scale == 3
        assert (scheduler.config.eta, scheduler.config.time_grid) == (1.0, "learned")
    # until every time was seen, the grid is an even one
    assert sampled[0][0].config.timestep_cdf == [0.0, 1.0]
    assert len(sampled[-1][0].config.timestep_cdf) > 2


def test_no_previews_are_sampled_where_none_are_asked_for(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    run_script("train_joint", *tiny_overrides, "evaluation.every=2", "evaluation.num_preview_samples=0")
    assert not (tmp_path / "run" / "samples-2.md").exists()


def test_components_without_a_denoiser_are_refused_before_a_token_decoder_is_trained(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    run_script("train_joint", *tiny_overrides, "stage=autoencoder", "loop.max_steps=1")
    after = [item for item in tiny_overrides if item.split(".")[0] in ("data", "optimizer", "loop", "evaluation")]
    layers = "num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48"
    with pytest.raises(OSError, match="transformer"):
        run_script(
            "train_token_decoder",
            *after,
            f"components={tmp_path / 'run' / 'pipeline'}",
            f"token_decoder={{hidden_size: 24, {layers}}}",
            f"loop.output_dir={tmp_path / 'decoder'}",
        )
    assert not (tmp_path / "decoder").exists()


@pytest.mark.parametrize(
    "variant",
    [
        ["objective.reconstruction=token"],
        ["objective.reconstruction=hidden+token"],
        ["model.representation=embedding"],
        ["model.representation=scratch", "objective.reconstruction=token"],
        ["model.latent_encoder.architecture=self_attention", "model.latent_decoder.architecture=self_attention"],
        ["model.num_latents=4", "model.latent_size=12"],
        ["timestep_sampler.adaptive=false", "warmup.steps=0"],
        ["loop.gradient_checkpointing=true"],
        ["loop.mixed_precision=bf16"],
        ["data.streaming=true", "data.holdout_documents=0", "data.holdout_fraction=0.3",
         "data.holdout_selection=random", "data.max_validation_documents=8"],
    ],
    ids=lambda variant: variant[0],
)  # fmt: skip
def test_variants_are_settings(run_script: Run, tiny_overrides: list[str], tmp_path: Path, variant: list[str]) -> None:
    run_script("train_joint", *tiny_overrides, *variant, "loop.max_steps=2", "evaluation.num_samples=0")
    assert len(losses(tmp_path / "run")) == 2
    assert LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline")(num_inference_steps=2).texts


@pytest.mark.parametrize("reads", [pytest.param("hidden_states", marks=pytest.mark.slow), "latents"])
def test_token_decoder_can_be_trained_afterwards(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path, reads: str
) -> None:
    # long enough that the latent decoder's output depends on its input
    joint = ["train_token_decoder=false", "loop.max_steps=150", "optimizer.learning_rate=0.01"]
    run_script("train_joint", *tiny_overrides, *joint)
    assert "token_accuracy" not in records(tmp_path / "run")[0]
    after = [item for item in tiny_overrides if item.split(".")[0] in ("data", "optimizer", "loop", "evaluation")]
    layers = (
        "num_hidden_layers: 0"
        if reads == "latents"
        else "num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48"
    )
    common = [
        *after,
        f"components={tmp_path / 'run' / 'pipeline'}",
        f"reads={reads}",
        "decoder_noise=0.0",
        "optimizer.learning_rate=0.01",
        f"token_decoder={{hidden_size: 24, {layers}}}",
    ]
    run_script("train_token_decoder", *common, f"loop.output_dir={tmp_path / 'decoder'}", "loop.max_steps=80")
    rows = [row for row in records(tmp_path / "decoder") if "token_loss" in row]
    assert rows[-1]["token_loss"] < rows[0]["token_loss"] - 0.05
    pipe = LDLMPipeline.from_pretrained(tmp_path / "decoder" / "pipeline")
    assert (pipe.latent_decoder is None) == (reads == "latents")
    assert pipe(num_inference_steps=2).sequences.shape == (1, 8)

    # on what the denoiser makes of noisy latents the same weights have another loss
    denoised = ["denoised_from=0.5", f"loop.output_dir={tmp_path / 'denoised'}", "loop.max_steps=1"]
    run_script("train_token_decoder", *common, *denoised)
    assert records(tmp_path / "denoised")[0]["token_loss"] != rows[0]["token_loss"]


def test_steps_that_are_not_finite_never_reach_the_weights(
    run_script: Run, tiny_overrides: list[str], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=r"3 steps in a row were not finite.*learning_rate"):
        run_script(
            "train_joint",
            *tiny_overrides,
            "objective.hidden_weight=1e39",
            "loop.max_nonfinite_steps=3",
            "loop.max_steps=9",
        )
    skipped = [row for row in records(tmp_path / "run") if row.get("skipped")]
    assert [row["step"] for row in skipped] == [1, 2, 3]


class SometimesInfinite(Recipe):
    """A loss that is infinite at step 1 and fine at the others."""

    def __init__(self) -> None:
        self.module = nn.Linear(4, 3)

    def losses(self, module: nn.Module, input_ids: torch.Tensor, step: int, randomness: RowRandomness) -> StepLosses:
        scale = torch.inf if step == 1 else 1.0
        return StepLosses(total=(module(torch.ones(4)) * scale).sum(), values={})

    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        return Evaluation({"weight": float(snapshot.weight.mean())})


OF_ADAMW = {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(("name", "kept"), [("adamw", [OF_ADAMW]), ("muon", [OF_ADAMW, {"momentum_buffer"}])])
def test_a_skipped_step_leaves_weights_and_optimiser_as_they_were(
    tiny_overrides: list[str], tmp_path: Path, run_script: Run, name: str, kept: list[set[str]]
) -> None:
    settings: RunSettings = load_settings(RunSettings, None, [*tiny_overrides, f"optimizer.name={name}"])
    dataset = [{"input_ids": torch.arange(8)}] * 16
    loop = TrainingLoop(SometimesInfinite(), dataset, Accelerator(cpu=True), settings)
    weights, states = [], []
    for _ in range(3):
        loop.train_step()
        loop.state.step += 1
        weights.append(copy.deepcopy(loop.state.parameters))
        states.append([copy.deepcopy(one.state_dict()["state"]) for one in loop.state.optimizers])
    assert [set(state[0]) for state in states[0]] == kept
    for before, after, later in zip(*weights, strict=True):
        assert torch.equal(before, after)
        assert not torch.equal(after, later)
        assert torch.isfinite(later).all()
    for before, after, later in zip(*states, strict=True):
        for index, state in before.items():
            assert all(torch.equal(value, after[index][key]) for key, value in state.items())
            assert not all(torch.equal(value, later[index][key]) for key, value in state.items())
    loop.read_back()
    assert (loop.state.nonfinite_steps, loop.nonfinite_in_a_row) == (1, 0)
    assert [row["step"] for row in records(tmp_path / "run")] == [2]


@pytest.mark.slow
def test_two_processes_share_one_timestep_sampler(tiny_overrides: list[str], tmp_path: Path, repository: Path) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(repository / "training/train_joint.py"), *tiny_overrides, "evaluation.num_samples=0"]
    finished = subprocess.run(launch + script, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "4 sequences a device, 2 devices" in finished.stdout
    first, second = (
        torch.load(tmp_path / f"run/checkpoint-4/rank_{rank}.pt", weights_only=True)["task"] for rank in range(2)
    )
    assert first["num_updates"] == 4
    for name in ("weights", "weighted_losses", "probabilities"):
        assert torch.equal(first[name], second[name])
    assert first["weights"].count_nonzero() > 8


def test_learning_rate_rises_from_its_start_and_stays() -> None:
    settings, end = OptimizerSettings(), 10**6
    assert learning_rate_at(0, settings, end) == 1e-8
    assert learning_rate_at(2_500, settings, end) == pytest.approx(1e-4, rel=1e-3)
    assert learning_rate_at(5_000, settings, end) == learning_rate_at(end - 1, settings, end) == 2e-4


def test_learning_rate_falls_over_the_last_steps_only_where_that_is_asked_for() -> None:
    settings = OptimizerSettings(learning_rate=1.0, lr_warmup_steps=0, lr_decay_steps=4)
    assert [learning_rate_at(step, settings, 7) for step in range(7)] == [1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_resumed_run_may_end_with_a_decay(run_script: Run, tiny_overrides: list[str], tmp_path: Path) -> None:
    run_script("train_joint", *tiny_overrides, "loop.max_steps=2", "optimizer.learning_rate=1.0e-3")
    further = ["loop.max_steps=4", "optimizer.lr_decay_steps=2", "--resume_from_checkpoint", "latest"]
    run_script("train_joint", *tiny_overrides, "optimizer.learning_rate=1.0e-3", *further)
    rates = [row["learning_rate"] for row in records(tmp_path / "run") if "learning_rate" in row]
    assert rates[2:] == pytest.approx([1e-3, 5e-4])


def test_batch_is_kept_whatever_the_number_of_devices() -> None:
    settings = LoopSettings(batch_size=512, device_batch_size=8)
    assert split_batch(settings, 64) == (8, 1)
    assert split_batch(settings, 4) == (8, 16)
    assert split_batch(settings, 128) == (4, 1)
    with pytest.raises(ValueError, match="does not split evenly over 3 devices"):
        split_batch(settings, 3)
