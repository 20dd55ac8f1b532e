"""Settings: defaults ← YAML ← overrides, and errors that name the setting, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from settings import RunSettings, differences, load_settings, to_yaml


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
        ("loop.max_steps=-4", "loop.max_steps=-4"),
        ("loop.batch_size=0", "loop.batch_size=0"),
        ("warmup.steps=-1", "warmup.steps=-1"),
        ("evaluation.num_inference_steps=0", "evaluation.num_inference_steps=0"),
        ("evaluation.sampler=DDIM", "unknown scheduler 'DDIM'"),
        ("evaluation.sampler=own:self_condition_scale=1.5", "no saved pipeline keeps it"),
        ("loop.mixed_precision=fp16", "float16"),
        ("optimizer.lr_decay_steps=1000000", "more than loop.max_steps"),
        ("objective.reconstruction=mse", "hidden, token, hidden"),
        ("objective.decoder_noise=-1", "decoder_noise=-1"),
    ],
)
def test_bad_settings_are_refused_by_name(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected.replace("+", r"\+")):
        load_settings(RunSettings, None, [override])


def test_a_learned_time_grid_needs_a_sampler_that_learns() -> None:
    sampler = "evaluation.sampler=TangentDDIMScheduler:eta=1.0,time_grid=learned"
    assert load_settings(RunSettings, None, [sampler]).evaluation.sampler.startswith("TangentDDIM")
    with pytest.raises(ValueError, match=r"needs the times that timestep_sampler.adaptive=true"):
        load_settings(RunSettings, None, [sampler, "timestep_sampler.adaptive=false"])


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such file"):
        load_settings(RunSettings, str(tmp_path / "none.yaml"), [])


@pytest.mark.parametrize("name", ["demo", "openwebtext_1024", "openwebtext_128", "lm1b_128"])
def test_shipped_configurations_load(name: str, repository: Path) -> None:
    load_settings(RunSettings, str(repository / f"training/configs/{name}.yaml"), []).data.validate()


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
