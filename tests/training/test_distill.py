"""Distillation of a tiny run: what students learn, and the pipelines that they come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ldlm_hf import (
    DistillationObjective,
    LDLMPipeline,
    TangentDDIMScheduler,
    TangentDPMSolverMultistepScheduler,
    TangentEulerMaruyamaScheduler,
    TangentFlowMapScheduler,
)
from ldlm_hf.loading.settings_reader import load_settings
from ldlm_hf.training.recipes.distillation import (
    TEACHER_STEPS,
    DistillationSettings,
    flow_map_times,
    follow_teacher,
    load_objective,
    progressive_times,
)


Run = Callable[..., None]


def evaluations(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row[f"eval/{name}"] for row in rows if f"eval/{name}" in row]


@pytest.fixture
def shared(tiny_overrides: list[str]) -> list[str]:
    """The settings that distillation has, too."""
    return [item for item in tiny_overrides if item.split(".")[0] in ("data", "optimizer", "loop", "evaluation")]


@pytest.fixture
def teacher(run_script: Run, tiny_overrides: list[str], tmp_path: Path) -> Path:
    """Long enough that its predictions depend on what it is given."""
    quick = ["loop.max_steps=150", "optimizer.learning_rate=0.01", "evaluation.num_samples=0"]
    run_script("train_joint", *tiny_overrides, *quick)
    return tmp_path / "run" / "pipeline"


@pytest.mark.slow
def test_a_flow_map_learns_and_samples_in_few_steps(
    run_script: Run, shared: list[str], teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "flow-map"
    run_script(
        "distill",
        *shared,
        f"components={teacher}",
        f"loop.output_dir={folder}",
        "loop.max_steps=1000",
        "optimizer.learning_rate=0.001",
        "evaluation.every=10",
        "evaluation.num_inference_steps=2",
    )
    losses = evaluations(folder, "distillation_loss")
    assert losses[-1] < 0.6 * losses[0]
    # so small a teacher predicts nearly the same whatever it is given, and its student is near it from the beginning
    assert max(evaluations(folder, f"distance_to_teacher/steps={steps}")[-1] for steps in (1, 2, 4, 8)) < 1e-3
    pipe = LDLMPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is TangentFlowMapScheduler
    assert pipe.transformer.config.next_timestep_conditioning
    assert not pipe.transformer.config.self_conditioning
    ends = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, keywords: ends.append(float(keywords["next_timestep"])), with_kwargs=True
    )
    assert len(pipe(batch_size=3, num_inference_steps=1).texts) == 3
    assert ends == [0.0]
    pipe(num_inference_steps=4)
    assert ends[1:] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    with pytest.raises(ValueError, match="trained without a self-condition"):
        pipe(num_inference_steps=1, self_condition_scale=1.0)
    # on its diagonal it is a denoiser for any solver
    pipe.scheduler = TangentEulerMaruyamaScheduler.from_config(pipe.scheduler.config, t_min=0.05)
    hook.remove()
    assert len(pipe(num_inference_steps=2).texts) == 1
    card = (folder / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "held-out real texts" in card


def test_the_teachers_latents_follow_what_it_teaches(make_pipeline: Callable[..., LDLMPipeline]) -> None:
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=True)
    ode = TangentDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = ode
    config = pipe.transformer.config
    noise = torch.randn(2, config.sample_size, config.in_channels, generator=torch.Generator().manual_seed(0))

    def followed(scale: float) -> torch.Tensor:
        parts = (pipe.token_encoder, pipe.latent_encoder, pipe.transformer, pipe.transformer)
        with torch.no_grad():
            return follow_teacher(DistillationObjective(*parts, ode, scale), noise)

    alone = pipe(
        batch_size=2, num_inference_steps=TEACHER_STEPS, latents=noise, self_condition_scale=0.0, output_type="latent"
    ).latents
    torch.testing.assert_close(followed(0.0), alone, rtol=1e-4, atol=1e-5)
    # from its own first estimate, that of the same time
    assert not torch.allclose(followed(1.0), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(followed(2.0), followed(1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_progressive_students_halve_their_teachers_steps(
    run_script: Run, shared: list[str], teacher: Path, tmp_path: Path
) -> None:
    source = teacher
    for num_steps in (4, 2):
        folder = tmp_path / f"progressive-{num_steps}"
        run_script(
            "distill",
            *shared,
            f"components={source}",
            "method=progressive",
            f"num_steps={num_steps}",
            f"loop.output_dir={folder}",
            "loop.max_steps=60",
            "evaluation.every=10",
            f"evaluation.num_inference_steps={num_steps}",
        )
        losses = evaluations(folder, "distillation_loss")
        assert losses[-1] < losses[0]
        source = folder / "pipeline"
    pipe = LDLMPipeline.from_pretrained(source)
    assert type(pipe.scheduler) is TangentDDIMScheduler
    assert not pipe.transformer.config.next_timestep_conditioning
    assert pipe(num_inference_steps=2).texts


def test_times_of_a_flow_map_cover_the_grid_with_its_ends() -> None:
    uniforms = torch.rand(50_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times, is_short = flow_map_times(TangentFlowMapScheduler(), uniforms)
    s, u, t = times.unbind(1)
    assert bool(torch.all((s > u) & (u > t)))
    assert float(s.max()) == 1.0
    assert float(t.min()) == 0.0
    # a draw from [-0.1, 1.1] lies beyond either end once in twelve
    assert float((s > 1 - 1e-9).double().mean()) == pytest.approx(1 / 12, abs=0.01)
    assert float((t < 1e-9).double().mean()) == pytest.approx(1 / 12, abs=0.01)
    # each halving of the length, from 1 to 1 / 128, takes one seventh of the steps; the teacher has the shortest
    assert float((s - t > 0.5).double().mean()) == pytest.approx(1 / 7, abs=0.01)
    assert float(torch.tensor(is_short).double().mean()) == pytest.approx(1 / 7, abs=0.01)
    assert is_short == (s - t < 1 / 64).tolist()

    cdf = [0.0, 0.8, 1.0]
    learned = TangentFlowMapScheduler(time_grid="learned", timestep_cdf=cdf)
    warped = torch.from_numpy(np.interp(flow_map_times(learned, uniforms)[0].numpy(), [0.0, 0.5, 1.0], cdf))
    torch.testing.assert_close(warped, times, rtol=1e-3, atol=1e-3)


def test_times_of_a_progressive_student_are_its_grid() -> None:
    uniforms = torch.tensor([[0.0], [0.49], [0.51], [0.999]], dtype=torch.float64)
    times = progressive_times(TangentDDIMScheduler(t_min=0.0), 2, uniforms)
    expected = [[1.0, 0.75, 0.5], [1.0, 0.75, 0.5], [0.5, 0.25, 0.0], [0.5, 0.25, 0.0]]
    torch.testing.assert_close(times, torch.tensor(expected, dtype=torch.float64))


def test_the_shipped_configuration_loads(repository: Path) -> None:
    settings = load_settings(DistillationSettings, str(repository / "training/configs/demo_flow_map.yaml"), [])
    assert settings.data.source
    assert (settings.method, settings.evaluation.num_inference_steps) == ("flow_map", 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=shortcut"], "method='shortcut' must be one of flow_map, progressive"),
        (["self_condition_scale=-1"], r"self_condition_scale=-1.0 must lie in \[0, inf\)"),
        (["num_steps=0"], r"num_steps=0 must lie in \[1, inf\)"),
        (["diagonal_share=1.0"], "diagonal_share=1.0"),
        (["components="], "components='' names no teacher"),
        (["time_grid=learned"], "time_grid='learned' needs timestep_cdf"),
    ],
)
def test_bad_settings(
    run_script: Run, shared: list[str], overrides: list[str], message: str, tmp_path: Path, make_pipeline: Callable
) -> None:
    make_pipeline().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        run_script("distill", *shared, f"components={tmp_path / 'teacher'}", *overrides)


def test_a_teacher_teaches_what_its_pipeline_does(tmp_path: Path, make_pipeline: Callable) -> None:
    teacher = make_pipeline()
    for own, asked, expected in ((None, None, 1.0), (2.5, None, 2.5), (2.5, 1.5, 1.5), (0.0, None, 0.0)):
        teacher.set_guidance(own, guidance_rescale=0.5)
        teacher.save_pretrained(tmp_path)
        settings = DistillationSettings(components=str(tmp_path), self_condition_scale=asked)
        objective, _ = load_objective(settings)
        assert (objective.self_condition_scale, objective.guidance_rescale) == (expected, 0.5)
    assert load_objective(DistillationSettings(components=str(tmp_path), guidance_rescale=0))[0].guidance_rescale == 0


def test_a_flow_map_teaches_no_progressive_student(
    run_script: Run, shared: list[str], tmp_path: Path, make_pipeline: Callable
) -> None:
    pipe = make_pipeline()
    flow_map = type(pipe.transformer).from_config(pipe.transformer.config, next_timestep_conditioning=True)
    make_pipeline(transformer=flow_map).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="The teacher is a flow map"):
        run_script("distill", *shared, f"components={tmp_path / 'teacher'}", "method=progressive")


def test_the_scheduler_of_a_flow_map_needs_one(make_pipeline: Callable) -> None:
    pipe = make_pipeline()
    pipe.scheduler = TangentFlowMapScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="which this transformer is not"):
        pipe(num_inference_steps=1)
