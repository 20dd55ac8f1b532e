"""Ablations: what each row sets and trains, and that runs are shared, reused, resumed, and fail by themselves."""

from __future__ import annotations

import json
import math
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ablate import main
from ablations.definitions import JOINT, TOKEN_DECODER, EvaluationPlan, read_ablations
from ablations.execution import CommandRunner, execute, run_all, train, training_command
from ablations.runs import AblationRun, Plan, check_finished, dotted_values, read_scores, times
from ablations.tables import described
from ldlm_hf.evaluation.folder_lock import lock_folder
from ldlm_hf.loading.settings_reader import differences, load_settings, to_yaml
from ldlm_hf.training.components import (
    build_diffusion_objective,
    build_objective,
    build_token_encoder,
    build_tokenizer,
    save_components,
)
from ldlm_hf.training.launch import parse_arguments
from ldlm_hf.training.optimizers import build_optimizers
from ldlm_hf.training.recipes.token_decoder import TokenDecoderObjective, TokenDecoderSettings, load_components
from ldlm_hf.training.settings import RunSettings


SHIPPED = Path(__file__).parents[2] / "training/configs/ablations.yaml"
ABLATIONS = read_ablations(SHIPPED)
ROWS = list(ABLATIONS.rows)

DECODER_LAYERS = {"head": 0, "1_layer": 1, "2_layers": 2, "3_layers": 3, "6_layers": 6}
EVERYTHING = {"latent_encoder", "latent_decoder", "token_decoder", "transformer"}
WITHOUT_ENCODER = EVERYTHING - {"latent_encoder"}
# modules with gradient: of the whole loss, of its token loss, of its diffusion loss with an open gate
# the paper's recipe, and all rows that are not below: the token loss stays behind its stop-gradient
RECIPE = (EVERYTHING, {"token_decoder"}, {"latent_encoder", "transformer"})
GRADIENTS: dict[tuple[str, ...], tuple[set[str], set[str], set[str]]] = {
    # the token loss shapes the latents
    ("reconstruction_ce", "reconstruction_ce_mse", "encoder_embeddings"): (
        EVERYTHING,
        {"token_decoder", "latent_decoder", "latent_encoder"},
        {"latent_encoder", "transformer"},
    ),
    # and the embeddings that they are made from
    ("encoder_scratch",): (
        EVERYTHING | {"token_encoder"},
        {"token_decoder", "latent_decoder", "latent_encoder", "token_encoder"},
        {"latent_encoder", "token_encoder", "transformer"},
    ),
    # embeddings that are the latents
    ("scratch_embeddings",): (
        WITHOUT_ENCODER | {"token_encoder"},
        {"token_decoder", "latent_decoder", "token_encoder"},
        {"token_encoder", "transformer"},
    ),
    # frozen latents: the diffusion loss reaches the denoiser alone
    ("gpt2_embeddings", "tencdm", "tencdm_layer_last", "tencdm_layer_fifth_to_last"): (
        WITHOUT_ENCODER,
        {"token_decoder", "latent_decoder"},
        {"transformer"},
    ),
    ("cosmos_autoencoder", "cosmos_autoencoder_layer_last", "cosmos_autoencoder_layer_fifth_to_last"): (
        {"latent_encoder", "latent_decoder", "token_decoder"},
        {"latent_encoder", "latent_decoder", "token_decoder"},
        set(),
    ),
    ("cosmos", "cosmos_layer_last", "cosmos_layer_fifth_to_last"): ({"transformer"}, set(), {"transformer"}),
    tuple(f"token_decoder_{name}" for name in DECODER_LAYERS): ({"token_decoder"}, {"token_decoder"}, set()),
}
EXPECTED = dict.fromkeys(ROWS, RECIPE) | {row: gradients for rows, gradients in GRADIENTS.items() for row in rows}

# what each row changes in the paper's base; one whose key is None there has no such row
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "reconstruction_ce": {"objective.reconstruction": "token"},
    "reconstruction_ce_mse": {"objective.reconstruction": "hidden+token"},
    "encoder_embeddings": {"objective.reconstruction": "token", "model.representation": "embedding"},
    "encoder_scratch": {"objective.reconstruction": "token", "model.representation": "scratch"},
    "uniform": {"timestep_sampler.adaptive": False},
    "warmup_none": {"timestep_sampler.adaptive": False, "warmup.steps": 0},
    "warmup_half": {"timestep_sampler.adaptive": False, "warmup.steps": 5_000},
    "warmup_2.5_times": {"timestep_sampler.adaptive": False, "warmup.steps": 25_000},
    "warmup_5_times": {"timestep_sampler.adaptive": False, "warmup.steps": 50_000},
    "warmup_10_times": {"timestep_sampler.adaptive": False, "warmup.steps": 100_000},
    "decoder_noise_none": {"objective.decoder_noise": 0.0},
    "decoder_noise_third": {"objective.decoder_noise": 1.0},
    "decoder_noise_two_thirds": {"objective.decoder_noise": 2.0},
    "decoder_noise_four_thirds": {"objective.decoder_noise": 4.0},
    "decoder_noise_double": {"objective.decoder_noise": 6.0},
    "decoder_noise_quadruple": {"objective.decoder_noise": 12.0},
    "scratch_embeddings": {
        "model.representation": "scratch",
        "model.normalize_embeddings": True,
        "model.latent_encoder.architecture": "identity",
        "objective.reconstruction": "token",
        "objective.decoder_noise": 0.5,
        "warmup.steps": 0,
    },
    "gpt2_embeddings": {
        "model.representation": "embedding",
        "model.latent_encoder.architecture": "identity",
        "objective.reconstruction": "token",
        "objective.decoder_noise": 0.5,
    },
    "tencdm": {
        "model.latent_encoder.architecture": "identity",
        "objective.reconstruction": "token",
        "objective.decoder_noise": 0.5,
    },
    "cosmos_autoencoder": {
        "stage": "autoencoder",
        "objective.reconstruction": "hidden+token",
        "objective.token_masking": 0.3,
        "objective.feature_noise": 0.7141428,
        "objective.latent_dropout": 0.4,
        "objective.decoder_noise": 0.0,
    },
    "cosmos": {"stage": "diffusion", "components": "runs/openwebtext_128/cosmos_autoencoder/seed-0/pipeline"},
    "layer_last": {"model.layer": -1},
    "layer_fifth_to_last": {"model.layer": -5},
    "other_token_encoder": {"model.backbone": "google-bert/bert-base-uncased"},
    "no_prefix": {"model.prefix": False},
    "self_attention": {
        "model.latent_encoder.architecture": "self_attention",
        "model.latent_decoder.architecture": "self_attention",
    },
}
for layer, index in (("last", -1), ("fifth_to_last", -5)):
    for space in ("tencdm", "cosmos_autoencoder", "cosmos"):
        CHANGES[f"{space}_layer_{layer}"] = CHANGES[space] | {"model.layer": index}
    components = f"runs/openwebtext_128/cosmos_autoencoder_layer_{layer}/seed-0/pipeline"
    CHANGES[f"cosmos_layer_{layer}"]["components"] = components

Ablate = Callable[..., int]


def plan_of(base: str, scale: float = 1.0, *overrides: str, config: Path = SHIPPED, root: str = "runs") -> Plan:
    ablations = ABLATIONS if config == SHIPPED else read_ablations(config)
    return Plan(ablations, config.parent, base, scale, overrides, EvaluationPlan(), Path(root) / base)


PAPER = plan_of("openwebtext_128")
PAPER_DEFAULT = PAPER.run("default", 0)


@pytest.fixture
def tiny_config(tiny_overrides: list[str], backbone_folders: dict[str, Path], tiny_tokenizer, tmp_path: Path) -> Path:
    """The shipped rows and tables, with a base `tiny` whose runs take a second."""
    tiny_tokenizer.save_pretrained(backbone_folders["bert"])
    (tmp_path / "tiny.yaml").write_text(to_yaml(load_settings(RunSettings, None, tiny_overrides)), encoding="utf-8")
    loaded: Any = OmegaConf.to_container(OmegaConf.load(SHIPPED))
    for base in loaded["bases"].values():
        base.update({key: str(SHIPPED.parent / base[key]) for key in ("config", "accelerate")})
    loaded["bases"]["tiny"] = {
        "config": "tiny.yaml",
        "accelerate": str(SHIPPED.parents[1] / "accelerate/one_cpu.yaml"),
        "evaluation": {"num_samples": 4, "sampling_seeds": 2, "steps": 2, "judge": None},
        "token_decoder": {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48},
    }
    loaded["rows"]["other_token_encoder"]["bases"]["tiny"] = {"model.backbone": str(backbone_folders["bert"])}
    file = tmp_path / "ablations.yaml"
    OmegaConf.save(loaded, file)
    return file


@pytest.fixture
def tiny_plan(tiny_config: Path, tmp_path: Path) -> Plan:
    return plan_of("tiny", config=tiny_config, root=str(tmp_path / "ablations"))


@pytest.fixture
def launched(runner: Any) -> list[list[str]]:
    """Commands that `ablate` has run."""
    return runner.launched


@pytest.fixture
def ablate(tiny_config: Path, runner: Any, tmp_path: Path) -> Ablate:
    """`ablate.py` on the base `tiny`, its commands run in this process."""

    def run(*arguments: str) -> int:
        common = ["--base", "tiny", "--config", str(tiny_config), "--output_dir", str(tmp_path / "ablations")]
        return main([*common, *arguments], runner)

    return run


def trained(commands: list[list[str]]) -> list[str]:
    """Rows and seeds that commands train."""
    folders = [text.removeprefix("loop.output_dir=") for one in commands for text in one if "output_dir=" in text]
    return ["/".join(Path(folder).parts[-2:]) for folder in folders]


def table_of(tmp_path: Path, number: str, folder: str = "tiny") -> tuple[str, dict[str, Any]]:
    file = tmp_path / "ablations" / folder / f"table-{number}.md"
    return file.read_text(encoding="utf-8"), json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


# what each row trains


def modules_with_gradient(module: nn.Module) -> set[str]:
    """Names of the components that a backward pass has reached."""
    return {
        name
        for name, child in module.named_children()
        if any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in child.parameters())
    }


def build(run: AblationRun, random_tokens: Callable, randomize: Callable) -> nn.Module:
    """A row's module; what the row needs is built and saved, not trained."""
    torch.manual_seed(0)
    if run.needs is not None:
        tokenizer = build_tokenizer(run.needs.settings)
        save_components(build(run.needs, random_tokens, randomize), tokenizer, run.needs.pipeline)
    if run.script == TOKEN_DECODER:
        module: nn.Module = TokenDecoderObjective(**load_components(run.settings), decoder_noise=0.5)
    elif run.settings.stage == "diffusion":
        module = build_diffusion_objective(run.settings)
    else:
        tokenizer = build_tokenizer(run.settings)
        token_encoder = build_token_encoder(run.settings.model, tokenizer)
        if not token_encoder.is_fitted:
            token_encoder.fit_statistics([random_tokens(8)])
        module = build_objective(run.settings, token_encoder, tokenizer)
    # adaLN-zero and zero heads would hide where a gradient goes
    for child in module.children():
        if any(weight.requires_grad for weight in child.parameters()):
            randomize(child)
    return module


@pytest.mark.parametrize("row", ROWS)
def test_every_row_takes_a_training_step_of_its_modules_alone(
    row: str, tiny_config: Path, random_tokens: Callable, randomize: Callable, tmp_path: Path
) -> None:
    run = plan_of("tiny", config=tiny_config, root=str(tmp_path / "runs")).run(row, 0)
    module = build(run, random_tokens, randomize)
    input_ids, generator = random_tokens(4), torch.Generator().manual_seed(0)
    whole, of_tokens, of_diffusion = EXPECTED[row]

    def reached_by(loss: Callable[[], torch.Tensor]) -> set[str]:
        module.zero_grad(set_to_none=True)
        value = loss()
        assert torch.isfinite(value)
        if value.requires_grad:
            value.backward()
        return modules_with_gradient(module)

    if run.script == TOKEN_DECODER:
        assert reached_by(lambda: module(input_ids, generator=generator)[0]) == whole
    else:
        timesteps = torch.linspace(0.1, 0.9, 4)

        def losses(gate: float) -> Any:
            return module(input_ids, timesteps, gate, generator)

        assert reached_by(lambda: losses(1.0).token) == of_tokens
        assert reached_by(lambda: losses(1.0).diffusion) == of_diffusion
        # a shut gate keeps the diffusion loss from what makes the latents
        assert reached_by(lambda: losses(0.0).diffusion) == of_diffusion & {"transformer"}
        assert reached_by(lambda: losses(0.5).total) == whole
    (optimizer,) = build_optimizers(module, run.settings.optimizer)
    optimizer.step()
    assert all(torch.isfinite(weight).all() for weight in module.parameters())


def test_the_expectations_cover_every_row() -> None:
    assert set(EXPECTED) == set(ROWS)
    assert set(CHANGES) | {f"token_decoder_{name}" for name in DECODER_LAYERS} == set(ROWS)


# what each row sets


@pytest.mark.parametrize("row", CHANGES)
def test_a_row_changes_what_it_is_named_after_and_nothing_else(row: str) -> None:
    settings = PAPER.run(row, 0).settings
    changed = set(differences(settings, to_yaml(PAPER_DEFAULT.settings))) - {"loop.output_dir"}
    # a section that is empty in one of them only
    changed -= {"model.latent_encoder", "model.latent_decoder"}
    values = dotted_values(settings)
    assert {key: values[key] for key in changed} == CHANGES[row]


@pytest.mark.parametrize(("base", "sizes"), [("openwebtext_128", (768, 12, 3072)), ("demo", (384, 6, 1536))])
@pytest.mark.parametrize("name", DECODER_LAYERS)
def test_token_decoders_are_trained_on_the_default_rows_noisy_latents(
    name: str, base: str, sizes: tuple[int, int, int]
) -> None:
    plan = plan_of(base)
    run, default = plan.run(f"token_decoder_{name}", 2), plan.run("default", 2)
    settings = run.settings
    assert run.needs == default
    assert settings.components == f"runs/{base}/default/seed-2/pipeline"
    assert (settings.reads, settings.decoder_noise) == ("latents", default.settings.objective.decoder_noise)
    assert settings.data == default.settings.data
    assert settings.optimizer == default.settings.optimizer
    # 200k steps at the paper's scale, where the joint runs take 500k
    assert settings.loop.max_steps == {"openwebtext_128": 200_000, "demo": 800}[base]
    assert settings.loop.seed == 2
    built = TokenDecoderSettings(token_decoder=settings.token_decoder).token_decoder
    assert built.pop("num_hidden_layers") == DECODER_LAYERS[name]
    widths = ("hidden_size", "num_attention_heads", "intermediate_size")
    assert built == {} or tuple(built[key] for key in widths) == sizes


def test_the_demos_default_row_at_half_scale_is_this_command() -> None:
    by_hand = [
        "model.latent_size=null",
        "objective.decoder_noise=0.3",
        "objective.token_share=0.25",
        "conditioning.prefix_share=0",
        "conditioning.gaps_share=0",
        "conditioning.start_step=1000",
        "evaluation.sampler=own",
        "optimizer.lr_decay_steps=0",
        "loop.batch_size=16",
        "loop.device_batch_size=16",
        "loop.shift_chunks=false",
        "loop.mixed_precision=no",
        "loop.logging_steps=50",
        "evaluation.num_inference_steps=128",
        "evaluation.sampler=own",
        "loop.max_steps=1000",
        "loop.checkpointing_steps=250",
        "loop.trackers=[]",
        "loop.checkpoints_total_limit=1",
        "warmup.steps=400",
        "optimizer.lr_warmup_steps=50",
        "optimizer.ema_decay=0.990025",
        "timestep_sampler.num_bins=20",
        "timestep_sampler.uniform_share=0.2",
        "timestep_sampler.update_every=50",
        "timestep_sampler.ema_decay=0.994009",
        "evaluation.every=250",
        "evaluation.num_samples=0",
        "evaluation.judge=null",
    ]
    plan = plan_of("demo", 0.5)
    for row, more in (("default", []), ("uniform", ["timestep_sampler.adaptive=false"])):
        overrides = [*by_hand, *more, f"loop.output_dir=runs/demo/{row}/seed-0"]
        expected = load_settings(RunSettings, str(SHIPPED.parent / "demo.yaml"), overrides)
        assert plan.run(row, 0).settings == expected


def test_rows_are_sampled_as_the_paper_does_whatever_their_base_says(tiny_config: Path) -> None:
    base = OmegaConf.load(tiny_config.parent / "tiny.yaml")
    base.evaluation.sampler = "TangentDDIMScheduler:eta=1.0,time_grid=learned"
    OmegaConf.save(base, tiny_config.parent / "tiny.yaml")
    plan = plan_of("tiny", config=tiny_config)
    for row in ("default", "uniform", "token_decoder_1_layer"):
        assert plan.run(row, 0).settings.evaluation.sampler == "own"
    given = plan_of("tiny", 1.0, "evaluation.sampler=TangentChurnScheduler", config=tiny_config)
    assert given.run("default", 0).settings.evaluation.sampler == "TangentChurnScheduler"


@pytest.mark.parametrize(
    ("base", "scale", "row"),
    [
        ("openwebtext_128", 0.1, "default"),
        ("openwebtext_128", 0.002, "warmup_half"),
        ("openwebtext_128", 0.1, "scratch_embeddings"),
        ("demo", 0.25, "cosmos"),
        ("demo", 0.25, "token_decoder_2_layers"),
    ],
)
def test_scale_shrinks_steps_and_time_constants_together(base: str, scale: float, row: str) -> None:
    whole, part = plan_of(base), plan_of(base, scale)
    steps = ["loop.max_steps", "loop.checkpointing_steps", "optimizer.lr_warmup_steps", "evaluation.every"]
    before, after = dotted_values(whole.run(row, 0).settings), dotted_values(part.run(row, 0).settings)
    steps += [
        key for key in ("warmup.steps", "timestep_sampler.update_every", "conditioning.start_step") if key in before
    ]
    decays = [key for key in ("optimizer.ema_decay", "timestep_sampler.ema_decay") if key in before]
    for key in steps:
        assert after[key] == pytest.approx(before[key] * scale, abs=0.5), key
    for key in decays:
        time_constants = [-1 / math.log(one[key]) for one in (before, after)]
        assert time_constants[1] / time_constants[0] == pytest.approx(scale, rel=0.01), key
    assert {key for key in before if before[key] != after[key]} <= {*steps, *decays, "loop.output_dir", "components"}


def test_scale_leaves_at_least_one_step_where_there_was_one() -> None:
    settings = plan_of("demo", 1e-4).run("warmup_none", 0).settings
    assert (settings.loop.max_steps, settings.optimizer.lr_warmup_steps) == (1, 1)
    assert settings.warmup.steps == 0


@pytest.mark.parametrize(
    ("value", "factor", "product"),
    [(3.0, "1/3", 1.0), (0.3, "1/3", 0.1), (0.3, "4/3", 0.4), (0.3, 0, 0.0), (10_000, 2.5, 25_000), (3, "1/2", 2)],
)
def test_factors_are_exact_and_keep_whole_numbers_whole(value: float, factor: float | str, product: float) -> None:
    result = times(value, factor)
    assert result == product
    assert type(result) is type(value)


def test_texts_of_overrides_are_as_they_were_typed(tmp_path: Path) -> None:
    file = tmp_path / "ablations.yaml"
    file.write_text(
        f"""
        bases:
          tiny: {{config: {SHIPPED.parent / "demo.yaml"}, overrides: {{data.config_name: no, data.revision: 0012345}}}}
        rows:
          default: {{overrides: {{data.text_column: 2018_05, loop.max_steps: 4_000, model.tokenizer: null}}}}
        """,
        encoding="utf-8",
    )
    settings = plan_of("tiny", config=file).run("default", 0).settings
    data = settings.data
    assert (data.config_name, data.revision, data.text_column) == ("no", "0012345", "2018_05")
    assert (settings.loop.max_steps, settings.model.tokenizer) == (4000, None)


def test_overrides_change_the_base_and_rows_win_over_them() -> None:
    plan = plan_of("demo", 1.0, "objective.decoder_noise=0.6", "warmup.steps=100", "data.seed=7")
    assert plan.run("decoder_noise_double", 0).settings.objective.decoder_noise == 1.2
    assert plan.run("tencdm", 0).settings.objective.decoder_noise == 0.5
    assert plan.run("warmup_half", 0).settings.warmup.steps == 50
    assert plan.run("scratch_embeddings", 0).settings.warmup.steps == 0
    head = plan.run("token_decoder_head", 0).settings
    assert (head.decoder_noise, head.data.seed) == (0.6, 7)
    with pytest.raises(ValueError, match=r"unknown setting 'warmup\.step'"):
        plan_of("demo", 1.0, "warmup.step=3").run("default", 0)
    # what all runs have for want of an override
    loops = [
        plan_of("demo", 1.0, "loop.trackers=[wandb]").run(row, 0).settings.loop
        for row in ("default", "token_decoder_head")
    ]
    assert [loop.trackers for loop in loops] == [["wandb"], ["wandb"]]
    assert [loop.checkpoints_total_limit for loop in loops] == [1, 1]
    for override, option in (("loop.seed=3", "--seeds"), ("loop.output_dir=x", "--output_dir")):
        with pytest.raises(ValueError, match=f"differs from run to run: use {option} instead"):
            plan_of("demo", 1.0, override)


# runs


@pytest.mark.slow
def test_a_configuration_in_several_places_is_one_run_and_is_reused(
    ablate: Ablate,
    launched: list[list[str]],
    tiny_plan: Plan,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = ["--table", "1", "--table", "7", "--rows", "default"]
    assert ablate(*rows, "--seeds", "2") == 0
    assert trained(launched) == ["default/seed-0", "default/seed-1"]
    assert [Path(one[4]).name for one in launched] == ["train_joint.py", "evaluate.py"] * 2

    text, values = table_of(tmp_path, "1")
    by_label = {(row["group"], row["label"]): row for row in values["rows"]}
    default = by_label["Timestep sampling", "Adaptive"]
    assert by_label["Reconstruction loss", "MSE"]["mean"] == default["mean"]
    assert by_label["Decoder input noise", "0.5, the default"]["mean"] == default["mean"]
    without_adaptive = "Diffusion-to-encoder warmup (without adaptive timestep sampling)"
    assert by_label[without_adaptive, "2 steps, the default"]["runs"][0]["row"] == "uniform"
    assert by_label["Timestep sampling", "Uniform"]["runs"][0]["row"] == "uniform"
    # mean and deviation over training seeds, of means over sampling seeds
    of_seeds = [[sample["entropy"] for sample in run["samples"]] for run in default["runs"]]
    assert [len(some) for some in of_seeds] == [2, 2]
    means = [sum(some) / 2 for some in of_seeds]
    assert default["mean"]["entropy"] == pytest.approx(sum(means) / 2)
    assert default["std"]["entropy"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    lines = text.splitlines()
    assert sum(line.startswith("| CE |") and "not run" in line for line in lines) == 1
    assert sum(line.startswith("| Real text |") for line in lines) == 1
    assert next(line for line in lines if line.startswith("| Adaptive |")).endswith("| 0, 1 |")
    assert "4 steps of 8 sequences of 8 tokens" in text
    assert str(tmp_path) not in text.replace(str(tmp_path / "ablations"), "")

    launched.clear()
    capsys.readouterr()
    assert ablate("--table", "7", "--rows", "default", "--seeds", "2") == 0
    assert launched == []
    assert capsys.readouterr().out.count("is trained already") == 2
    rows_of_7 = table_of(tmp_path, "7")[1]["rows"]
    assert rows_of_7[0]["mean"] == default["mean"]
    assert [run["problem"] for run in rows_of_7[1]["runs"]] == ["not run", "not run"]

    # more samples are scored without training again, and other settings are not mixed with these
    assert ablate("--table", "7", "--rows", "default", "--num_samples", "6") == 0
    assert [Path(one[4]).name for one in launched] == ["evaluate.py"]
    launched.clear()
    # nor are those of another precision, which only a call of evaluate.py by hand can have asked for
    run = tiny_plan.run("default", 0)
    planned = EvaluationPlan(num_samples=6, sampling_seeds=2, steps=2, judge=None)
    assert read_scores(run, planned) is not None
    results = run.evaluation / "results.json"
    results.write_text(results.read_text(encoding="utf-8").replace('"float32"', '"bfloat16"'), encoding="utf-8")
    assert read_scores(run, planned) is None
    launched.clear()
    assert ablate("--table", "7", "--rows", "default", "objective.decoder_noise=0.25") == 1
    assert launched == []
    assert "settings differ in objective.decoder_noise; delete that folder or name another --output_dir" in (
        capsys.readouterr().out
    )


def test_a_failed_row_takes_those_that_need_it_and_no_others(
    ablate: Ablate, launched: list[list[str]], tiny_config: Path, tmp_path: Path
) -> None:
    whole = tiny_config.read_text(encoding="utf-8")
    broken = OmegaConf.create(whole)
    OmegaConf.update(broken, "rows.cosmos_autoencoder.bases", {"tiny": {"model.layer": 9}})
    OmegaConf.save(broken, tiny_config)
    assert ablate("--table", "2", "--rows", "cosmos", "tencdm", "--num_samples", "3") == 1
    assert trained(launched) == ["cosmos_autoencoder/seed-0", "tencdm/seed-0"]
    text, values = table_of(tmp_path, "2")
    problems = {row["label"]: row["runs"][0].get("problem") for row in values["rows"]}
    assert problems["TEncDM"] is None
    assert problems["COSMOS"] == "needs cosmos_autoencoder (seed 0), which failed"
    assert problems["LDLM"] == "not run"
    assert "| COSMOS | failed |" in text
    assert "cosmos (seed 0): failed: needs cosmos_autoencoder (seed 0), which failed" in text
    log = tmp_path / "ablations/tiny/cosmos_autoencoder/seed-0.log"
    assert "layer=9 does not exist" in log.read_text(encoding="utf-8")

    # once the reason is gone, the same call does what is left
    tiny_config.write_text(whole, encoding="utf-8")
    launched.clear()
    assert ablate("--table", "2", "--rows", "cosmos", "tencdm", "--num_samples", "3") == 0
    assert trained(launched) == ["cosmos_autoencoder/seed-0", "cosmos/seed-0"]
    assert [Path(one[4]).name for one in launched] == ["train_joint.py", "train_joint.py", "evaluate.py"]
    text, values = table_of(tmp_path, "2")
    assert "| failed |" not in text
    assert ": failed:" not in text
    assert [row["label"] for row in values["rows"] if "samples" in row["runs"][0]] == ["TEncDM", "COSMOS"]
    launched.clear()
    assert ablate("--table", "2", "--rows", "cosmos", "tencdm", "--num_samples", "3") == 0
    assert launched == []


def test_an_evaluation_that_fails_keeps_the_training(
    ablate: Ablate, launched: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # more texts than are held out
    assert ablate("--table", "7", "--rows", "default", "--num_samples", "100000") == 1
    assert "FAILED: evaluation ended with status 1: ValueError" in capsys.readouterr().out
    assert "holds" in table_of(tmp_path, "7")[0]
    launched.clear()
    assert ablate("--table", "7", "--rows", "default") == 0
    assert [Path(one[4]).name for one in launched] == ["evaluate.py"]


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_feeds_a_token_decoder(
    ablate: Ablate, launched: list[list[str]], run_script: Callable, tiny_config: Path, tmp_path: Path
) -> None:
    plan = plan_of("tiny", 1.0, "loop.checkpointing_steps=2", config=tiny_config, root=str(tmp_path / "ablations"))
    run = plan.run("default", 0)
    # as if killed between step 2 and the end: the checkpoint of step 2 is all that there is
    run_script("train_joint", *training_command(run, plan.accelerate)[5:], "loop.max_steps=2")
    (run.folder / "settings.yaml").write_text(to_yaml(run.settings), encoding="utf-8")
    for name in ("pipeline", "results.json"):
        path = run.folder / name
        path.rename(tmp_path / name)
    arguments = ["--table", "5", "--rows", "token_decoder_1_layer", "loop.checkpointing_steps=2"]
    assert ablate(*arguments) == 0
    assert trained(launched) == ["default/seed-0", "token_decoder_1_layer/seed-0"]
    assert "resumed from" in run.log.read_text(encoding="utf-8")
    # the default row was needed, and not asked for
    assert "--pipeline" in launched[-1]
    assert len(launched) == 3
    # finished runs may be moved, also those that name the components that they started from
    (tmp_path / "ablations").rename(tmp_path / "moved")
    launched.clear()
    assert ablate(*arguments, "--output_dir", str(tmp_path / "moved")) == 0
    assert launched == []
    (tmp_path / "moved").rename(tmp_path / "ablations")
    text, values = table_of(tmp_path, "5")
    assert "| Reference, trained jointly | not evaluated as asked |" in text
    assert values["rows"][2]["runs"][0]["held_out"]["reconstruction_accuracy"] >= 0


@pytest.mark.parametrize(("row", "part"), [("token_decoder_head", "transformer"), ("cosmos", "token_decoder")])
def test_a_run_does_not_outlive_what_it_started_from(row: str, part: str, tiny_plan: Plan) -> None:
    run = tiny_plan.run(row, 0)
    assert run.needs is not None
    mine, theirs = (one.pipeline / part / "model.safetensors" for one in (run, run.needs))
    for file in (mine, theirs):
        file.parent.mkdir(parents=True)
        save_file({"weight": torch.ones(2)}, file)
    (run.folder / "settings.yaml").write_text(to_yaml(run.settings), encoding="utf-8")
    assert not check_finished(run)
    (run.pipeline / "README.md").write_text("card", encoding="utf-8")
    assert check_finished(run)
    save_file({"weight": torch.zeros(2)}, theirs)
    with pytest.raises(ValueError, match="started from other components than those of"):
        check_finished(run)
    shutil.rmtree(run.needs.folder)
    assert check_finished(run)


def test_tokens_of_another_encoder_have_real_text_of_their_own(ablate: Ablate, tmp_path: Path) -> None:
    assert ablate("--table", "6", "loop.max_steps=1") == 0
    text, values = table_of(tmp_path, "6")
    assert text.count("| Real text, in tokens of") == len(values["real_text"]) == 2
    # here both tokenizers cut the held-out text alike; what differs between rows is said of each
    assert text.count("- Real text: held-out part of `corpus.txt`") == 1
    file = tmp_path / "ablations/tiny/other_token_encoder/seed-0/evaluation/results.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    results["reference"]["num_held_out"] += 1
    file.write_text(json.dumps(results), encoding="utf-8")
    assert ablate("--table", "6", "loop.max_steps=1") == 0
    text, values = table_of(tmp_path, "6")
    assert text.count("- Real text: held-out part of `corpus.txt`") == 2
    for content in (text, json.dumps(values)):
        assert str(tmp_path) not in content.replace(values["command"], "").replace(json.dumps(values["command"]), "")


def test_tables_name_overrides_without_folders(tmp_path: Path) -> None:
    long = "model.transformer={" + 300 * "a" + ": 1}"
    overrides = [long, f"data.source={tmp_path}/corpus.txt", "data.cache_dir=cache", "loop.trackers=[]", "a=b=c"]
    assert described(overrides) == [long, "data.source=corpus.txt", "loop.trackers=[]", "a=b=c"]


def train_with(plan: Plan, runner: CommandRunner) -> Callable[[AblationRun], None]:
    """What [`run_all`] has done with each run."""
    return lambda run: train(run, plan.accelerate, runner)


class Sleeper(CommandRunner):
    """Trains nothing, so that its runs count as failed; one of them cannot be started."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = 0

    def run(self, command: list[str], log: Path) -> int:
        if log.parent.name == "uniform":
            raise OSError("no space left")
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.1)
        log.write_text("nothing was trained", encoding="utf-8")
        with self.lock:
            self.now -= 1
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_runs_at_a_time_as_asked_for(tiny_plan: Plan, jobs: int) -> None:
    runner = Sleeper()
    names = ["cosmos_autoencoder", "cosmos", "default", "token_decoder_head", "uniform"]
    runs = [tiny_plan.run(name, 0) for name in names]
    problems = {
        run.row: problem for run, problem in run_all(runs, train_with(tiny_plan, runner), jobs, runner).items()
    }
    assert runner.most == jobs
    assert set(problems) == set(names)
    for name, needed in (("cosmos", "cosmos_autoencoder"), ("token_decoder_head", "default")):
        assert problems[name] == f"needs {needed} (seed 0), which failed"
    assert problems["uniform"] == "could not be started: no space left"
    assert all("nothing was trained" in problems[name] for name in ("cosmos_autoencoder", "default"))


@pytest.mark.slow
def test_a_process_that_is_stopped_leaves_a_checkpoint(tiny_config: Path, repository: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "ablations"
    command = [
        *(sys.executable, str(repository / "training/ablate.py"), "--base", "tiny", "--config", str(tiny_config)),
        *("--output_dir", str(output_dir), "--rows", "default", "uniform", "--train_only"),
        *("loop.max_steps=1000000", "loop.checkpointing_steps=20"),
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        folder = output_dir / "tiny/default/seed-0"
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline and not list(folder.glob("checkpoint-*")):
            time.sleep(0.05)
        # another call, of the same rows or of others
        with pytest.raises(OSError, match="tiny is in use by another process.*name another --output_dir"):
            main([*command[2:8], "--rows", "self_attention", "--train_only"])
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
    printed = (tmp_path / "log").read_text(encoding="utf-8")
    assert status == 1, printed
    assert "default (seed 0): FAILED: stopped before its end; the same call goes on with it" in printed
    assert "stopped by SIGTERM after step" in folder.with_name("seed-0.log").read_text(encoding="utf-8")
    # nobody writes any more, and nothing else was started
    (checkpoint,) = folder.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").is_file()
    assert not (folder / "pipeline").exists()
    assert not (output_dir / "tiny/uniform").exists()


@pytest.mark.slow
def test_what_an_ablation_that_was_killed_leaves_running_keeps_its_folder(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    accelerate = str(SHIPPED.parents[1] / "accelerate/one_cpu.yaml")
    command = ["accelerate", "launch", "--config_file", accelerate, str(tmp_path / "script.py")]
    with lock_folder(tmp_path, "wait") as lock:
        runner = CommandRunner(os.environ, lock)
        thread = threading.Thread(target=runner.run, args=(command, tmp_path / "log"))
        thread.start()
        deadline = time.monotonic() + 60
        while not runner.running and time.monotonic() < deadline:
            time.sleep(0.05)
    with pytest.raises(OSError, match="in use"):
        lock_folder(tmp_path, "wait")
    runner.stop()
    thread.join(timeout=60)
    lock_folder(tmp_path, "wait").close()
    # nobody is left to be stopped
    runner.stop()


@pytest.mark.slow
def test_a_request_to_stop_reaches_what_is_just_being_started(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tiny_plan.run("default", 0), tiny_plan.run("uniform", 0)]
    started = []

    def start_and_stop(*arguments: Any, start: Callable = subprocess.Popen, **options: Any) -> subprocess.Popen:
        started.append(start(*arguments, **options))
        runner.stop()
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_stop)
    with lock_folder(tmp_path) as lock:
        runner = CommandRunner(os.environ, lock)
        problems = run_all(runs, train_with(tiny_plan, runner), 1, runner)
    assert problems[runs[0]] == "stopped before its end; the same call goes on with it"
    assert problems[runs[1]] == "stopped before it began"
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_a_failure_is_told_in_the_words_of_the_process_that_failed(tmp_path: Path) -> None:
    run = plan_of("demo", root=str(tmp_path)).run("default", 0)
    run.log.parent.mkdir(parents=True)
    run.log.write_text("ValueError: of yesterday\n", encoding="utf-8")

    class Printing(CommandRunner):
        def __init__(self, text: str):
            self.text = text

        def run(self, command: list[str], log: Path) -> int:
            with log.open("a") as output:
                output.write(self.text)
            return -9

    complaint = "subprocess.CalledProcessError: non-zero exit status\n"
    for text, said in (("", "no output"), ("step 3\n\n", "step 3"), ("OSError: full\n" + complaint, "OSError: full")):
        ending = execute("training", [], run, Printing(text))
        assert ending.startswith(f"training ended with status -9: {said} (log: ")


# commands


@pytest.mark.parametrize("base", ["openwebtext_128", "demo"])
def test_printed_commands_are_read_by_the_scripts_in_the_order_of_their_needs(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    parse_evaluation = runpy.run_path(str(repository / "training/evaluate.py"))["parse_arguments"]
    monkeypatch.chdir(repository)
    tables = [text for number in ABLATIONS.tables for text in ("--table", number)]
    assert main(["--base", base, *tables, "--print_commands", "--judge", "none"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len({tuple(line) for line in lines}) == len(lines)
    finished: set[str] = set()
    evaluated = set()
    for line in lines:
        assert line[:3] == ["accelerate", "launch", "--config_file"]
        assert Path(line[3]).is_file()
        assert Path(line[4]).is_file()
        monkeypatch.setattr(sys, "argv", line[4:])
        if line[4] == "training/evaluate.py":
            options = parse_evaluation()
            assert set(options.pipeline) <= finished
            assert (options.judge, len(options.steps)) == ("none", 1)
            assert Path(options.config).is_file()
            evaluated.update(options.pipeline)
            continue
        arguments = parse_arguments("")
        assert arguments.resume_from_checkpoint == "latest"
        settings_class = {JOINT: RunSettings, TOKEN_DECODER: TokenDecoderSettings}[Path(line[4]).name]
        settings = load_settings(settings_class, arguments.config, arguments.overrides)
        assert settings.components in {"", *finished}
        # scored afterwards, all by the same code
        assert (settings.evaluation.num_samples, settings.evaluation.judge) == (0, None)
        assert (settings.loop.trackers, settings.loop.checkpoints_total_limit) == ([], 1)
        finished.add(f"{settings.loop.output_dir}/pipeline")
    assert {Path(folder).parts[-3] for folder in finished} == set(ROWS)
    assert {Path(folder).parts[-3] for folder in finished - evaluated} == {
        "cosmos_autoencoder",
        "cosmos_autoencoder_layer_last",
        "cosmos_autoencoder_layer_fifth_to_last",
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--table", "3"], "table '3' is unknown; known: 1, 2, 4, 5, 6, 7"),
        (["--table", "1", "--base", "imagenet"], "base 'imagenet' is unknown; known: openwebtext_128, demo"),
        (["--table", "7", "--rows", "cosmos"], "row of table 7 'cosmos' is unknown; known: default, self_attention"),
        (["--rows", "defualt"], "row 'defualt' is unknown; known: default, reconstruction_ce"),
        ([], "--table N"),
        (["--table", "7", "--scale", "0"], "--scale 0"),
        (["--table", "7", "--num_samples", "3"], "MAUVE needs at least 20"),
        (["--table", "7", "--judge", "./no-such-judge"], "--judge JUDGE"),
        (["--table", "7", "--config", "none.yaml"], "no such file"),
    ],
)
def test_bad_command_lines_name_what_is_known_and_start_nothing(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=expected):
        main(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("rows: {a: {override: {}}}", "override"),
        ("rows: {a: {needs: b}, b: {}}", "row 'a': needs 'b' is unknown"),
        ("rows: {a: {script: train.py}}", "script 'train.py' is unknown"),
        ("rows: {a: {script: train_token_decoder.py}}", "name it as `needs`"),
        ("rows: {a: {bases: {b: {}}}}", "row 'a': base 'b' is unknown"),
        ("tables: {'1': {groups: [{rows: {a: A}}]}}", "table 1: row 'a' is unknown"),
        ("tables: {'1': {columns: [perplexity]}}", "table 1: column 'perplexity' is unknown; known: generative_perp"),
    ],
)
def test_a_file_of_ablations_that_contradicts_itself_is_refused(broken: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text(broken, encoding="utf-8")
    with pytest.raises(ValueError, match=expected):
        read_ablations(tmp_path / "broken.yaml")


def test_a_factor_of_what_is_no_setting_is_refused(tiny_config: Path) -> None:
    ablations = OmegaConf.load(tiny_config)
    OmegaConf.update(ablations, "rows.uniform.factors", {"warmup.step": 2})
    OmegaConf.save(ablations, tiny_config)
    with pytest.raises(ValueError, match=r"row 'uniform': factor of setting 'warmup\.step' is unknown"):
        plan_of("tiny", config=tiny_config).run("uniform", 0)
