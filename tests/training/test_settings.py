"""Settings: defaults ← YAML ← overrides, and errors that name the setting, the value and the remedy."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from ldlm_hf import (
    DataSettings,
    JointObjectiveSettings,
    LDLMLatentDecoderConfig,
    LDLMLatentEncoderConfig,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
    LikelihoodSettings,
    TangentEulerMaruyamaScheduler,
    TimestepSamplerSettings,
)
from ldlm_hf.evaluation.real_text import load_data_settings
from ldlm_hf.evaluation.samplers import Sampler
from ldlm_hf.loading.settings_reader import differences, load_settings, to_yaml
from ldlm_hf.training.recipes.distillation import DistillationSettings
from ldlm_hf.training.recipes.lora import LoraSettings
from ldlm_hf.training.recipes.token_decoder import TokenDecoderSettings
from ldlm_hf.training.settings import (
    EvaluationSettings,
    LoopSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    WarmupSettings,
)


def test_file_wins_over_defaults_and_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("loop: {max_steps: 7, seed: 3}\nmodel: {transformer: {num_layers: 2}}\n", encoding="utf-8")
    settings = load_settings(RunSettings, str(config), ["loop.seed=4", "model.transformer.attention_head_dim=32"])
    assert settings.loop.max_steps == 7
    assert settings.loop.seed == 4
    assert settings.loop.batch_size == RunSettings().loop.batch_size
    assert settings.model.transformer == {"num_layers": 2, "attention_head_dim": 32}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loop.max_step=3", "'loop.max_steps'"),
        ("lop.max_steps=3", "'loop'"),
        ("loop.learning_rate=0.1", "'optimizer.learning_rate'"),
        ("model.transformer.layers=2", "'model.transformer.num_layers'"),
        ("model.latent_encoder.hiden_size=2", "'model.latent_encoder.hidden_size'"),
        ("model.scheduler.tangent=2", "'model.scheduler.tangent_d'"),
        ("data.sorce=x", "'data.source'"),
        ("loop.max_steps=many", "loop.max_steps"),
        ("loop=3", "section"),
        ("max_steps", "section.key=value"),
        ("loop.max_steps=0", "loop.max_steps=0"),
        ("loop.checkpoints_total_limit=-1", "loop.checkpoints_total_limit=-1 must lie in [1, inf)"),
        ("loop.checkpoints_total_limit=0", "loop.checkpoints_total_limit=0"),
        ("loop.seed=4294967296", "loop.seed=4294967296"),
        ("data.holdout_fraction=1.5", "data.holdout_fraction=1.5"),
        ("warmup.steps=-1", "warmup.steps=-1"),
        ("warmup.midpoint=9", "warmup.midpoint=9.0 must lie in [0, 1]"),
        ("optimizer.ema_decay=1.7", "optimizer.ema_decay=1.7 must lie in [0, 1)"),
        ("optimizer.beta1=-3", "optimizer.beta1=-3.0"),
        ("timestep_sampler.floor=-1", "timestep_sampler.floor=-1.0"),
        ("model.transformer.num_layers=[", "model.transformer.num_layers=["),
        ("evaluation.sampler=DDIM", "unknown scheduler 'DDIM'"),
        ("evaluation.sampler=own:self_condition_decay=1.5", "self_condition_decay goes with the pipeline's call"),
        ("loop.mixed_precision=fp16", "float16"),
        ("optimizer.lr_decay_steps=1000000", "more than loop.max_steps"),
        ("objective.reconstruction=mse", "hidden, token, hidden"),
        ("objective.decoder_noise=-1", "decoder_noise=-1"),
    ],
)
def test_bad_settings_are_refused_by_name(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_settings(RunSettings, None, [override])


SECTIONS = [
    DataSettings,
    JointObjectiveSettings,
    TimestepSamplerSettings,
    ModelSettings,
    WarmupSettings,
    OptimizerSettings,
    LoopSettings,
    EvaluationSettings,
    TokenDecoderSettings,
    DistillationSettings,
    LikelihoodSettings,
    LoraSettings,
    # what the sections of `model` are handed to
    LDLMLatentEncoderConfig,
    LDLMLatentDecoderConfig,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
    TangentEulerMaruyamaScheduler,
]


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (section, name)
        for section in SECTIONS
        for name, hint in get_type_hints(section.__init__).items()
        if {int, float} & {hint, *get_args(hint)}
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_number_has_a_range(section: type, name: str) -> None:
    required = (
        {"encoder_noise": 0.5, "decoder_noise": 0.5, "hidden_noise": 0.5} if section is LikelihoodSettings else {}
    )
    outside = [math.nan, math.inf, -math.inf]
    # an index into the layers counts from either end, and that it exists only the backbone knows
    if name != "layer":
        outside.append(-1)
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{name}={value}"):
            section(**required | {name: value})


TYPED = [
    "no",
    "off",
    "2018_05",
    "0012345",
    "1e3",
    "2018-05-01",
    "[a].txt",
    "x #1.txt",
    "{a}",
    "a: b",
    "${b}",
    "a${b",
    r"\${",
]


@pytest.mark.parametrize("text", TYPED)
def test_a_text_is_taken_as_it_was_typed(text: str, tmp_path: Path) -> None:
    overrides = [f"data.source={text}", f"data.config_name={text}", f"components={text}", "stage=diffusion"]
    settings = load_settings(RunSettings, None, overrides)
    assert (settings.data.source, settings.data.config_name, settings.components) == (text, text, text)
    # what is saved with the run is read back
    config = tmp_path / "settings.yaml"
    config.write_text(to_yaml(settings), encoding="utf-8")
    assert load_settings(RunSettings, str(config), []) == settings
    assert load_data_settings(str(config), []) == settings.data
    assert differences(settings, config.read_text(encoding="utf-8")) == []


def test_plain_texts_of_a_file_are_as_they_stand_there(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        """
        data: {source: off, config_name: no, revision: 0012345, text_column: 2018_05}
        loop:
          output_dir: runs/${loop.seed}
          trackers: [no, 1_0]
        model:
          backbone: &name 1e3
          tokenizer: ~
          latent_encoder: &layers {architecture: yes, initializer_range: 1e-3}
          latent_decoder: {<<: *layers, hidden_size: 24}
        evaluation: {judge: *name}
        """,
        encoding="utf-8",
    )
    settings = load_settings(RunSettings, str(config), [])
    data = settings.data
    assert (data.source, data.config_name, data.revision, data.text_column) == ("off", "no", "0012345", "2018_05")
    assert (settings.loop.output_dir, settings.loop.trackers) == ("runs/${loop.seed}", ["no", "1_0"])
    assert (settings.model.backbone, settings.model.tokenizer) == ("1e3", None)
    assert settings.model.latent_encoder == {"architecture": "yes", "initializer_range": 1e-3}
    assert settings.model.latent_decoder == settings.model.latent_encoder | {"hidden_size": 24}
    assert settings.evaluation.judge == "1e3"


def test_null_unsets_a_text_that_may_be_none(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("evaluation: {judge: null}\ndata: {revision: 'null', config_name: a}\n", encoding="utf-8")
    settings = load_settings(RunSettings, str(config), ["data.config_name=null", "data.detokenizer="])
    assert (settings.evaluation.judge, settings.data.config_name, settings.data.detokenizer) == (None, None, None)
    assert settings.data.revision == "null"
    with pytest.raises(ValueError, match=r"data\.source=null"):
        load_settings(RunSettings, None, ["data.source=null"])


def test_what_is_no_yaml_is_refused_by_name(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("loop: {seed: 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.yaml: .*expected ',' or '}'"):
        load_settings(RunSettings, str(config), [])


def test_settings_of_a_sampler_are_read_by_their_types() -> None:
    sampler = Sampler.parse("TangentDDIMScheduler:eta=1.0,time_grid=no,timestep_cdf=null")
    assert sampler.settings == (("eta", 1.0), ("time_grid", "no"), ("timestep_cdf", None))
    with pytest.raises(ValueError, match=r"sampler 'TangentDDIMScheduler:eta=\['"):
        Sampler.parse("TangentDDIMScheduler:eta=[")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such file"):
        load_settings(RunSettings, str(tmp_path / "none.yaml"), [])


@pytest.mark.parametrize(
    "name", ["demo", "openwebtext_1024", "openwebtext_128", "lm1b_128", "rocstories", "xsum", "wmt14_de_en", "qqp"]
)
def test_shipped_configurations_load(name: str, repository: Path) -> None:
    assert load_settings(RunSettings, str(repository / f"training/configs/{name}.yaml"), []).data.source


def test_main_run_has_the_values_of_the_paper(repository: Path) -> None:
    settings = load_settings(RunSettings, str(repository / "training/configs/openwebtext_1024.yaml"), [])
    assert (settings.loop.max_steps, settings.loop.batch_size) == (1_000_000, 512)
    assert settings.optimizer.lr_warmup_steps == 5_000
    assert settings.warmup.steps == 50_000
    assert settings.data.holdout_documents == 100_000


def test_saved_settings_are_complete_and_differences_are_named() -> None:
    settings = load_settings(RunSettings, None, ["loop.seed=5", "model.transformer.num_layers=3"])
    assert differences(settings, to_yaml(settings)) == []
    assert set(differences(settings, to_yaml(RunSettings()))) >= {"loop.seed", "model.transformer.num_layers"}


@pytest.mark.parametrize(("has_products", "precision"), [(True, "bf16"), (False, "no")])
def test_automatic_precision_is_that_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, has_products: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_products)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    settings = load_settings(RunSettings, None, ["loop.mixed_precision=auto"])
    # what the run saves is what it did, so that it goes on with that elsewhere
    assert f"mixed_precision: {'bf16' if has_products else repr('no')}" in to_yaml(settings).replace('"', "'")
    assert settings.loop.mixed_precision == precision
