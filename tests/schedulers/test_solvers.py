from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ldlm_hf import (
    TangentChurnScheduler,
    TangentDDIMScheduler,
    TangentDPMSolverMultistepScheduler,
    TangentEulerMaruyamaScheduler,
    TangentScheduler,
    diffusers_config,
)
from ldlm_hf.schedulers import tangent
from ldlm_hf.schedulers.discrete import check_schedule, model_times
from ldlm_hf.schedulers.scheduling_tangent import StepWeights


SOLVERS = [
    TangentEulerMaruyamaScheduler,
    TangentDDIMScheduler,
    TangentDPMSolverMultistepScheduler,
    TangentChurnScheduler,
]
DIFFUSERS = [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
CDF = [0.0, 0.1, 0.6, 0.6, 1.0]


def run(scheduler, predictions: list[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """The samples of each step, for given predictions of the clean latents."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(predictions[0].shape, generator=generator, dtype=predictions[0].dtype)
    samples = [sample]
    takes_generator = not isinstance(scheduler, UniPCMultistepScheduler)
    for t, clean in zip(scheduler.timesteps, predictions, strict=True):
        sample = scheduler.step(clean, t, sample, **({"generator": generator} if takes_generator else {})).prev_sample
        samples.append(sample)
    return samples


def random_predictions(num_steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(num_steps, 2, 3, 4, generator=generator, dtype=torch.float64))


# --- time grids


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_grid_even_in_log_snr(solver: type[TangentScheduler]):
    scheduler = solver(time_grid="log_snr", t_max=0.98, t_min=0.1, tangent_d=5.0)
    grid = scheduler.make_time_grid(12)
    assert (float(grid[0]), float(grid[-1])) == (0.98, 0.1)
    steps = tangent.log_snr(grid, 5.0).diff()
    torch.testing.assert_close(steps, steps.mean().expand(12))


@pytest.mark.parametrize("t_min", [0.0, 0.05, 0.6])
def test_a_learned_grid_takes_equal_shares_of_the_draws(t_min: float):
    scheduler = TangentDDIMScheduler(time_grid="learned", timestep_cdf=CDF, t_min=t_min)
    grid = scheduler.make_time_grid(7)
    assert (float(grid[0]), float(grid[-1])) == (1.0, t_min)
    assert bool(torch.all(grid.diff() < 0))

    def cdf(t: float) -> float:
        left = min(int(4 * t), 3)
        return CDF[left] + (4 * t - left) * (CDF[left + 1] - CDF[left])

    levels = torch.tensor([cdf(t) for t in grid.tolist()])
    torch.testing.assert_close(levels.diff(), torch.full((7,), (cdf(t_min) - 1) / 7))


def test_a_learned_grid_of_uniform_draws_is_the_papers():
    learned = TangentEulerMaruyamaScheduler(time_grid="learned", timestep_cdf=[0.0, 0.5, 1.0])
    torch.testing.assert_close(learned.make_time_grid(9), TangentEulerMaruyamaScheduler().make_time_grid(9))


# --- what each solver does


@pytest.mark.parametrize("time_grid", ["uniform", "log_snr"])
@pytest.mark.parametrize(
    "scheduler_of",
    [
        lambda **kw: TangentDDIMScheduler(**kw),
        lambda **kw: TangentDDIMScheduler(eta=0.3, **kw),
        lambda **kw: TangentDDIMScheduler(eta=1.0, **kw),
        lambda **kw: TangentDDIMScheduler(fresh_noise_t_min=0.2, fresh_noise_t_max=0.7, **kw),
        lambda **kw: TangentDPMSolverMultistepScheduler(**kw),
        lambda **kw: TangentDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **kw),
        lambda **kw: TangentChurnScheduler(update="noised", **kw),
        lambda **kw: TangentChurnScheduler(**kw),
    ],
)
def test_with_a_prediction_that_does_not_change_any_grid_is_exact(scheduler_of, time_grid: str):
    """x = alpha x0 + sigma e stays of that form, with e of variance 1: the linear part has no error."""
    scheduler = scheduler_of(time_grid=time_grid, t_max=1 - 1e-9)
    scheduler.set_timesteps(5)
    clean = torch.full((40_000, 1, 1), 0.7, dtype=torch.float64)
    end = run(scheduler, [clean] * 5)[-1]
    alpha, sigma = scheduler.marginal(torch.tensor(scheduler.config.t_min, dtype=torch.float64))
    # five standard errors of 40,000 samples
    assert float(end.mean()) == pytest.approx(float(alpha) * 0.7, abs=5 * float(sigma) / 200)
    assert float(end.std() / sigma) == pytest.approx(1, abs=5 / math.sqrt(2 * 40_000))


def test_euler_maruyama_is_not_exact_there():
    scheduler = TangentEulerMaruyamaScheduler()
    scheduler.set_timesteps(5)
    end = run(scheduler, [torch.zeros(40_000, 1, 1, dtype=torch.float64)] * 5)[-1]
    _, sigma = scheduler.marginal(torch.tensor(scheduler.config.t_min, dtype=torch.float64))
    assert abs(float(end.std() / sigma) - 1) > 0.5


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_written_out(eta: float):
    scheduler = TangentDDIMScheduler(eta=eta)
    scheduler.set_timesteps(6)
    predictions = random_predictions(6)
    samples = run(scheduler, predictions)
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    grid = scheduler.make_time_grid(6)
    for i, clean in enumerate(predictions):
        (alpha, sigma), (next_alpha, next_sigma) = (tangent.alpha_sigma(grid[j], 3.0) for j in (i, i + 1))
        epsilon = (samples[i] - alpha * clean) / sigma
        std = eta * (next_sigma / sigma) * torch.sqrt(1 - alpha**2 / next_alpha**2)
        expected = next_alpha * clean + torch.sqrt(next_sigma**2 - std**2) * epsilon
        if eta:
            expected = expected + std * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(samples[i + 1], expected, rtol=1e-9, atol=1e-9)


def test_fresh_noise_written_out():
    """Where it is asked for a step forgets its sample; elsewhere it is the step that it was."""
    plain, fresh = TangentDDIMScheduler(), TangentDDIMScheduler(fresh_noise_t_min=0.3, fresh_noise_t_max=0.6)
    for scheduler in (plain, fresh):
        scheduler.set_timesteps(10)
    is_fresh = [0.3 <= float(t) <= 0.6 for t in fresh.timesteps]
    assert any(is_fresh) and not all(is_fresh)
    grid = fresh.make_time_grid(10)
    for i, asked in enumerate(is_fresh):
        alpha, sigma = (float(x) for x in tangent.alpha_sigma(grid[i + 1], 3.0))
        expected = StepWeights(sample=0.0, clean=alpha, noise=sigma) if asked else plain.step_weights[i]
        assert fresh.step_weights[i] == expected


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_dpm_solver_written_out(algorithm_type: str, lower_order_final: bool):
    """2M in lambda, from t < 1, where every lambda is finite."""
    scheduler = TangentDPMSolverMultistepScheduler(
        algorithm_type=algorithm_type, lower_order_final=lower_order_final, time_grid="log_snr"
    )
    scheduler.set_timesteps(timesteps=[0.9, 0.7, 0.4, 0.2])
    predictions = random_predictions(4)
    samples = run(scheduler, predictions)
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    grid = torch.tensor([0.9, 0.7, 0.4, 0.2, 0.05], dtype=torch.float64)
    half_log_snr = tangent.log_snr(grid, 3.0) / 2
    alphas, sigmas = tangent.alpha_sigma(grid, 3.0)
    for i, clean in enumerate(predictions):
        h = half_log_snr[i + 1] - half_log_snr[i]
        data = clean
        if i > 0 and not (lower_order_final and i == 3):
            ratio = (half_log_snr[i] - half_log_snr[i - 1]) / h
            data = (1 + 1 / (2 * ratio)) * clean - predictions[i - 1] / (2 * ratio)
        if algorithm_type == "dpmsolver++":
            expected = sigmas[i + 1] / sigmas[i] * samples[i] - alphas[i + 1] * torch.expm1(-h) * data
        else:
            expected = sigmas[i + 1] / sigmas[i] * torch.exp(-h) * samples[i]
            expected = expected - alphas[i + 1] * torch.expm1(-2 * h) * data
            noise = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
            expected = expected + sigmas[i + 1] * torch.sqrt(-torch.expm1(-2 * h)) * noise
        torch.testing.assert_close(samples[i + 1], expected, rtol=1e-9, atol=1e-9)


def test_first_order_dpm_solver_is_ddim_and_its_sde_form_ancestral():
    predictions = random_predictions(5)
    for algorithm_type, eta in (("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)):
        multistep = TangentDPMSolverMultistepScheduler(algorithm_type=algorithm_type, solver_order=1)
        ddim = TangentDDIMScheduler(eta=eta)
        multistep.set_timesteps(5)
        ddim.set_timesteps(5)
        for one, other in zip(run(multistep, predictions), run(ddim, predictions), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("update", ["original", "noised"])
def test_churn_written_out(update: str):
    """Noise up, evaluate, DDIM down from the original or from the noised sample."""
    scheduler = TangentChurnScheduler(churn=2.0, noise_scale=1.1, update=update, churn_t_min=0.2, churn_t_max=0.8)
    scheduler.set_timesteps(8)
    grid = scheduler.make_time_grid(8)
    predictions = random_predictions(8)
    states = run(scheduler, predictions)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    raised = 0
    for i, clean in enumerate(predictions):
        t, noised, evaluation_time = grid[i], sample, grid[i]
        if i > 0 and 0.2 <= t <= 0.8:
            raised += 1
            level = 1.25 * tangent.alpha_sigma(t, 3.0)[1] / tangent.alpha_sigma(t, 3.0)[0]
            evaluation_time = tangent.timesteps_from_log_snr(-2 * torch.log(level), 3.0)
            (alpha, sigma), (high_alpha, high_sigma) = (tangent.alpha_sigma(s, 3.0) for s in (t, evaluation_time))
            ratio = high_alpha / alpha
            noise = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
            noised = ratio * sample + 1.1 * torch.sqrt(high_sigma**2 - (ratio * sigma) ** 2) * noise
        assert float(scheduler.timesteps[i]) == pytest.approx(float(evaluation_time), abs=1e-6)
        torch.testing.assert_close(states[i], noised, rtol=1e-9, atol=1e-9)
        start, x = (t, sample) if update == "original" else (evaluation_time, noised)
        (alpha, sigma), (next_alpha, next_sigma) = (tangent.alpha_sigma(s, 3.0) for s in (start, grid[i + 1]))
        sample = next_alpha * clean + next_sigma * (x - alpha * clean) / sigma
    assert raised == 5
    torch.testing.assert_close(states[-1], sample, rtol=1e-9, atol=1e-9)


def test_no_churn_is_ddim():
    predictions = random_predictions(5)
    for scheduler in (TangentChurnScheduler(churn=0.0), TangentChurnScheduler(churn_t_min=0.0, churn_t_max=0.0)):
        ddim = TangentDDIMScheduler()
        for one in (scheduler, ddim):
            one.set_timesteps(5)
        for one, other in zip(run(scheduler, predictions), run(ddim, predictions), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_deterministic_solvers_draw_nothing():
    for scheduler in (TangentDDIMScheduler(), TangentDPMSolverMultistepScheduler()):
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        sample = torch.ones(1, 2, 2)
        for t in scheduler.timesteps:
            sample = scheduler.step(sample, t, sample, generator=generator).prev_sample
        assert torch.equal(generator.get_state(), before)


def test_a_grid_may_end_at_no_noise_at_all():
    clean = torch.full((1, 2, 2), 0.3, dtype=torch.float64)
    for scheduler in (
        TangentDDIMScheduler(t_min=0.0, eta=1.0),
        TangentDPMSolverMultistepScheduler(t_min=0.0),
        TangentDPMSolverMultistepScheduler(t_min=0.0, lower_order_final=False),
        TangentDPMSolverMultistepScheduler(t_min=0.0, algorithm_type="sde-dpmsolver++"),
        TangentChurnScheduler(t_min=0.0),
    ):
        scheduler.set_timesteps(4)
        torch.testing.assert_close(run(scheduler, [clean] * 4)[-1], clean)


def test_where_sampling_begins_inside_of_the_grid_the_first_step_is_of_first_order():
    predictions = random_predictions(2)
    multistep, ddim = TangentDPMSolverMultistepScheduler(), TangentDDIMScheduler()
    samples = []
    for scheduler in (multistep, ddim):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(4)
        start = torch.ones(2, 3, 4, dtype=torch.float64)
        samples.append(scheduler.step(predictions[0], scheduler.timesteps[4], start).prev_sample)
    torch.testing.assert_close(*samples)
    churn = TangentChurnScheduler()
    churn.set_timesteps(8)
    churn.set_begin_index(4)
    with pytest.raises(ValueError, match="first step of the grid"):
        churn.step(predictions[0], churn.timesteps[4], torch.ones(2, 3, 4, dtype=torch.float64))


# --- diffusers' own


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_agrees_with_diffusers(eta: float):
    ours = TangentDDIMScheduler(t_min=0.0, eta=eta)
    theirs = DDIMScheduler.from_config(diffusers_config(ours))
    theirs.set_timesteps(8)
    ours.set_timesteps(timesteps=model_times(theirs))
    predictions = random_predictions(8)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    for t, clean, expected in zip(theirs.timesteps, predictions, run(ours, predictions)[1:], strict=True):
        sample = theirs.step(clean, t, sample, eta=eta, generator=generator).prev_sample
        # diffusers keeps its levels in float32
        torch.testing.assert_close(sample, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver_agrees_with_diffusers(algorithm_type: str):
    ours = TangentDPMSolverMultistepScheduler(t_min=0.0, algorithm_type=algorithm_type)
    theirs = DPMSolverMultistepScheduler.from_config(diffusers_config(ours))
    assert theirs.config.algorithm_type == algorithm_type
    theirs.set_timesteps(8)
    ours.set_timesteps(timesteps=model_times(theirs))
    # diffusers draws in float32
    predictions = [one.float() for one in random_predictions(8)]
    for sample, expected in zip(run(theirs, predictions), run(ours, predictions), strict=True):
        torch.testing.assert_close(sample, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("solver", DIFFUSERS)
@pytest.mark.parametrize("num_levels", [50, 1000])
def test_diffusers_schedulers_have_the_noise_levels_of_the_times(solver: type, num_levels: int):
    scheduler = solver.from_config(diffusers_config(TangentEulerMaruyamaScheduler(tangent_d=5.0), num_levels))
    check_schedule(scheduler)
    scheduler.set_timesteps(10)
    times = model_times(scheduler)
    assert times.dtype == torch.float32
    alpha, _ = tangent.alpha_sigma(times, 5.0)
    found = scheduler.alphas_cumprod[scheduler.timesteps].double().sqrt()
    torch.testing.assert_close(found, alpha, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("solver", DIFFUSERS)
def test_there_and_back(solver: type):
    ours = TangentDDIMScheduler(tangent_d=5.0, eta=0.3, t_min=0.02)
    theirs = solver.from_config(diffusers_config(ours))
    back = TangentDDIMScheduler.from_config(theirs.config)
    assert (back.config.tangent_d, back.config.eta, back.config.t_min) == (5.0, 0.3, 0.02)
    check_schedule(back)
    others = [other for other in DIFFUSERS if other is not solver]
    for other in others:
        check_schedule(other.from_config(theirs.config))


# --- configurations


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("other", SOLVERS)
def test_solvers_are_swapped_in_both_directions(solver: type, other: type, tmp_path: Path):
    scheduler = solver(tangent_d=5.0, t_min=0.02, time_grid="learned", timestep_cdf=CDF)
    swapped = other.from_config(scheduler.config)
    for key in ("tangent_d", "t_min", "t_max", "time_grid", "timestep_cdf"):
        assert swapped.config[key] == scheduler.config[key]
    back = solver.from_config(swapped.config)
    assert {key: back.config[key] for key in scheduler.config if key[0] != "_"} == {
        key: value for key, value in scheduler.config.items() if key[0] != "_"
    }
    swapped.save_pretrained(tmp_path)
    assert other.from_pretrained(tmp_path).config.timestep_cdf == CDF
    assert other in scheduler.compatibles


def test_a_setting_of_one_solver_survives_another():
    churn = TangentChurnScheduler(churn=3.0, update="noised")
    back = TangentChurnScheduler.from_config(TangentDDIMScheduler.from_config(churn.config).config)
    assert (back.config.churn, back.config.update) == (3.0, "noised")


@pytest.mark.parametrize(
    ("solver", "settings", "message"),
    [
        (TangentDDIMScheduler, {"eta": 1.5}, r"eta=1\.5 must lie in \[0, 1\]"),
        (TangentDDIMScheduler, {"eta": -0.1}, "eta=-0.1"),
        (
            TangentDDIMScheduler,
            {"fresh_noise_t_min": 0.5, "fresh_noise_t_max": 0.4},
            r"fresh_noise_t_max=0.4 must lie in \[0.5, 1\]",
        ),
        (TangentDDIMScheduler, {"time_grid": "cosine"}, "time_grid='cosine' must be one of uniform, log_snr, learned"),
        (TangentDDIMScheduler, {"time_grid": "learned"}, "needs timestep_cdf"),
        (TangentDDIMScheduler, {"time_grid": "log_snr", "t_min": 0.0}, "set a positive t_min"),
        (TangentDDIMScheduler, {"t_max": 1.0}, "t_max=1.0"),
        (TangentDDIMScheduler, {"t_max": 0.01}, "t_max=0.01"),
        (TangentDDIMScheduler, {"timestep_cdf": [0.0, 0.7, 0.3, 1.0]}, "rise from 0 to 1"),
        (TangentDDIMScheduler, {"timestep_cdf": [0.0, 0.5]}, "rise from 0 to 1"),
        (TangentDDIMScheduler, {"timestep_cdf": [0.1, 1.0]}, "rise from 0 to 1"),
        (TangentDDIMScheduler, {"timestep_cdf": [1.0]}, "rise from 0 to 1"),
        (TangentDDIMScheduler, {"timestep_cdf": [0.0, math.nan, 1.0]}, "rise from 0 to 1"),
        (TangentDPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
        (TangentDPMSolverMultistepScheduler, {"solver_order": 3}, "solver_order=3"),
        (TangentChurnScheduler, {"churn": -1.0}, "churn=-1.0"),
        (TangentChurnScheduler, {"noise_scale": -1.0}, "noise_scale=-1.0"),
        (TangentChurnScheduler, {"churn_t_max": 1.0}, "churn_t_max=1.0"),
        (TangentChurnScheduler, {"churn_t_min": 0.9, "churn_t_max": 0.5}, r"churn_t_max=0.5 must lie in \[0.9, 1\)"),
        (TangentChurnScheduler, {"update": "both"}, "update='both' must be one of original, noised"),
    ],
)
def test_bad_settings(solver: type, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        solver(**settings)


def test_fewer_evaluations_than_the_order():
    with pytest.raises(ValueError, match="num_inference_steps=1 is below solver_order=2"):
        TangentDPMSolverMultistepScheduler().set_timesteps(1)
    TangentDPMSolverMultistepScheduler(solver_order=1).set_timesteps(1)


def test_schedulers_of_another_schedule():
    with pytest.raises(ValueError, match="DDIMScheduler belongs to another noise schedule"):
        check_schedule(DDIMScheduler())
    config = diffusers_config(TangentDDIMScheduler())
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        check_schedule(DDIMScheduler.from_config(config, prediction_type="epsilon"))
    with pytest.raises(ValueError, match="other noise levels"):
        check_schedule(DDIMScheduler.from_config(config, tangent_d=3.0, trained_betas=None))
    with pytest.raises(ValueError, match="DDIMScheduler is no scheduler of the tangent schedule"):
        diffusers_config(DDIMScheduler.from_config(config))
