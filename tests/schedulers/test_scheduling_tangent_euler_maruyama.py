from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ldlm_hf import TangentEulerMaruyamaScheduler


def marginal_tan_form(t: float, d: float) -> tuple[float, float]:
    alpha = 1 / math.sqrt(1 + d**2 * math.tan(math.pi * t / 2) ** 2)
    return alpha, math.sqrt(1 - alpha**2)


def test_marginal_is_exact_at_both_ends_in_every_type():
    scheduler = TangentEulerMaruyamaScheduler()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        alpha, sigma = scheduler.marginal(torch.tensor([0.0, 1.0], dtype=dtype))
        assert alpha.dtype == sigma.dtype == dtype
        assert alpha.tolist() == [1.0, 0.0]
        assert sigma.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("t", [0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)])
def test_marginal_takes_numbers_and_tensors(t: float | torch.Tensor):
    alpha, sigma = TangentEulerMaruyamaScheduler(tangent_d=5.0).marginal(t)
    assert (float(alpha), float(sigma)) == pytest.approx(marginal_tan_form(0.25, 5.0), rel=1e-6)


def test_marginal_takes_integers():
    alpha, sigma = TangentEulerMaruyamaScheduler().marginal(torch.tensor([0, 1]))
    assert alpha.tolist() == [1.0, 0.0]
    assert sigma.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_add_noise(dtype: torch.dtype):
    torch.manual_seed(0)
    clean, noise = torch.randn(4, 3, 2, dtype=dtype), torch.randn(4, 3, 2, dtype=dtype)
    timesteps = torch.tensor([0.0, 0.3, 0.7, 1.0])
    noisy = TangentEulerMaruyamaScheduler().add_noise(clean, noise, timesteps)
    assert noisy.dtype == dtype
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[3], noise[3])
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-7, torch.bfloat16: 3e-2}[dtype]
    for row, t in ((1, 0.3), (2, 0.7)):
        alpha, sigma = marginal_tan_form(t, 3.0)
        expected = alpha * clean[row].double() + sigma * noise[row].double()
        torch.testing.assert_close(noisy[row].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("timestep", [torch.tensor(0.5), torch.tensor([0.5])])
def test_add_noise_takes_one_time_for_the_batch(timestep: torch.Tensor):
    scheduler = TangentEulerMaruyamaScheduler()
    clean, noise = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    expected = scheduler.add_noise(clean, noise, torch.full((4,), 0.5))
    assert torch.equal(scheduler.add_noise(clean, noise, timestep), expected)


@pytest.mark.parametrize("timesteps", [torch.rand(3), torch.rand(4, 1), torch.rand(0)])
def test_add_noise_wants_a_time_for_each_sample(timesteps: torch.Tensor):
    with pytest.raises(ValueError, match="each of the 4 samples"):
        TangentEulerMaruyamaScheduler().add_noise(torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), timesteps)


def test_set_timesteps_is_the_papers_grid():
    scheduler = TangentEulerMaruyamaScheduler(t_min=0.01)
    scheduler.set_timesteps(10)
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == len(scheduler) == 10
    np.testing.assert_allclose(scheduler.timesteps.numpy(), np.linspace(1, 0.01, 11)[:-1], rtol=1e-6)
    assert scheduler.timesteps.dtype == torch.float32


def test_explicit_timesteps_end_at_t_min():
    scheduler = TangentEulerMaruyamaScheduler()
    scheduler.set_timesteps(timesteps=[1.0, 0.4, 0.1])
    assert scheduler.timesteps.tolist() == pytest.approx([1.0, 0.4, 0.1])

    uniform = TangentEulerMaruyamaScheduler()
    uniform.set_timesteps(4)
    scheduler.set_timesteps(timesteps=torch.linspace(1, 0.05, 5, dtype=torch.float64)[:-1])
    torch.testing.assert_close(scheduler.timesteps, uniform.timesteps)
    sample, output = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    for one, other in zip(scheduler.timesteps, uniform.timesteps, strict=True):
        steps = [
            s.step(output, t, sample, generator=torch.Generator().manual_seed(0)).prev_sample
            for s, t in ((scheduler, one), (uniform, other))
        ]
        torch.testing.assert_close(*steps)


@pytest.mark.parametrize("number", [np.int64(4), np.float32(4), 4.0, torch.tensor(4)])
def test_whole_numbers_of_other_types(number: object):
    scheduler = TangentEulerMaruyamaScheduler()
    scheduler.set_timesteps(number)
    assert len(scheduler) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 0},
        {"num_inference_steps": -3},
        {"num_inference_steps": 2.5},
        {"num_inference_steps": True},
        {"num_inference_steps": 2, "timesteps": [1.0, 0.5]},
        {"timesteps": []},
        {"timesteps": [0.5, 0.5]},
        {"timesteps": [0.5, 0.7]},
        {"timesteps": [1.1, 0.5]},
        {"timesteps": [1.0, 0.05]},
        {"timesteps": [1.0, math.nan]},
    ],
)
def test_bad_grids(arguments: dict):
    with pytest.raises(ValueError, match=r"num_inference_steps|timesteps"):
        TangentEulerMaruyamaScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tangent_d", 0.0),
        ("tangent_d", math.nan),
        ("beta_t_max", 1.0),
        ("beta_t_max", 0.0),
        ("t_min", 1.0),
        ("t_min", -0.1),
    ],
)
def test_bad_settings_name_setting_and_value(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        TangentEulerMaruyamaScheduler(**{name: value})


@pytest.mark.parametrize("num_steps", [1, 7, 200])
def test_steps_are_the_formula_of_the_paper(num_steps: int):
    """Euler–Maruyama on the reverse SDE, written out literally in float64."""
    d, beta_t_max, t_min = 3.0, 0.95, 0.05
    scheduler = TangentEulerMaruyamaScheduler(d, beta_t_max, t_min)
    scheduler.set_timesteps(num_steps)
    grid = np.linspace(1, t_min, num_steps + 1)
    generator = torch.Generator().manual_seed(0)
    same_generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    sample = torch.randn(2, 3, 4, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        clean = torch.randn(2, 3, 4, dtype=torch.float64)
        output = scheduler.step(clean, t, sample, generator=generator)

        dt = grid[i + 1] - grid[i]
        alpha, sigma = marginal_tan_form(grid[i], d) if grid[i] < 1 else (0.0, 1.0)
        tan = math.tan(math.pi * min(grid[i], beta_t_max) / 2)
        beta = math.pi * d**2 * tan * (1 + tan**2) / (1 + d**2 * tan**2)
        score = (alpha * clean - sample) / sigma**2
        mean = sample + (-beta / 2 * sample - beta * score) * dt
        noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=same_generator)
        expected = mean + math.sqrt(beta) * math.sqrt(-dt) * noise

        torch.testing.assert_close(output.prev_sample, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(output.pred_original_sample, clean)
        sample = expected


def test_a_thousand_steps_reproduce_gaussian_data():
    """For z ~ N(m, S), E[z | z_t] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (z_t - alpha m): only the solver errs."""
    mean = torch.tensor([1.5, -0.5, 0.2], dtype=torch.float64)
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.6, 0.3, 0.4]], dtype=torch.float64)
    covariance = factor @ factor.T
    identity = torch.eye(3, dtype=torch.float64)
    scheduler = TangentEulerMaruyamaScheduler()
    scheduler.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    num_samples = 20_000
    sample = torch.randn(num_samples, 1, 3, dtype=torch.float64, generator=generator)
    for t in scheduler.timesteps:
        alpha, sigma = scheduler.marginal(t.double())
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * identity)
        clean = mean + (sample - alpha * mean) @ gain.T
        sample = scheduler.step(clean, t, sample, generator=generator).prev_sample

    # the samples are those of z at t_min, whose marginal is known
    alpha, sigma = scheduler.marginal(torch.tensor(scheduler.config.t_min, dtype=torch.float64))
    found_mean = sample.mean((0, 1)) / alpha
    found_covariance = (torch.cov(sample[:, 0].T) - sigma**2 * identity) / alpha**2
    # four standard errors of 20,000 samples: 4 sqrt(1.06 / 20,000) and 4 sqrt(2 / 20,000), the largest variance ~ 1
    torch.testing.assert_close(found_mean, mean, rtol=0, atol=0.03)
    torch.testing.assert_close(found_covariance, covariance, rtol=0, atol=0.045)


def test_step_returns_a_tuple_on_request():
    scheduler = TangentEulerMaruyamaScheduler()
    scheduler.set_timesteps(2)
    sample, clean = torch.ones(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bfloat16)
    output = scheduler.step(clean, scheduler.timesteps[0], sample, return_dict=False)
    assert isinstance(output, tuple)
    assert [tensor.dtype for tensor in output] == [torch.float32, torch.float32]


def test_a_list_of_generators_gives_each_sample_its_own_stream():
    sample, clean = torch.randn(3, 2, 2), torch.randn(3, 2, 2)

    def step(rows: slice) -> torch.Tensor:
        scheduler = TangentEulerMaruyamaScheduler()
        scheduler.set_timesteps(2)
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)][rows]
        return scheduler.step(clean[rows], scheduler.timesteps[0], sample[rows], generator=generators).prev_sample

    together = step(slice(None))
    for i in range(3):
        assert torch.equal(together[i : i + 1], step(slice(i, i + 1)))
    assert not torch.allclose(together[0] - together[1], step(slice(1, 2)))


def test_step_without_a_grid_off_the_grid_and_past_its_end():
    scheduler = TangentEulerMaruyamaScheduler()
    sample = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(sample, 1.0, sample)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep=0\.7"):
        scheduler.step(sample, 0.7, sample)
    for t in scheduler.timesteps:
        scheduler.step(sample, t, sample)
    assert scheduler.step_index == 2
    with pytest.raises(ValueError, match="All 2 steps"):
        scheduler.step(sample, scheduler.timesteps[-1], sample)
    scheduler.set_timesteps(2)
    assert scheduler.step_index is None
    scheduler.step(sample, scheduler.timesteps[0], sample)


def test_sampling_may_start_inside_the_grid():
    sample, clean = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    results = []
    for use_begin_index in (False, True):
        scheduler = TangentEulerMaruyamaScheduler()
        scheduler.set_timesteps(4)
        if use_begin_index:
            scheduler.set_begin_index(2)
            assert scheduler.begin_index == 2
        generator = torch.Generator().manual_seed(0)
        results.append(scheduler.step(clean, scheduler.timesteps[2], sample, generator=generator).prev_sample)
        assert scheduler.step_index == 3
    assert torch.equal(*results)


def test_configuration_survives_saving_and_swapping(tmp_path: Path):
    scheduler = TangentEulerMaruyamaScheduler(tangent_d=5.0, beta_t_max=0.9, t_min=0.01)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["tangent_d"] == 5.0
    for loaded in (
        TangentEulerMaruyamaScheduler.from_pretrained(tmp_path),
        TangentEulerMaruyamaScheduler.from_config(scheduler.config),
    ):
        # diffusers also notes there which settings were left at their defaults
        assert {key: loaded.config[key] for key in scheduler.config if key[0] != "_"} == {
            key: value for key, value in scheduler.config.items() if key[0] != "_"
        }
    changed = TangentEulerMaruyamaScheduler.from_config(scheduler.config, t_min=0.02)
    assert (changed.config.t_min, changed.config.tangent_d) == (0.02, 5.0)
    assert TangentEulerMaruyamaScheduler in scheduler.compatibles
    assert (scheduler.order, scheduler.init_noise_sigma) == (1, 1.0)


def test_defaults_are_the_papers():
    config = TangentEulerMaruyamaScheduler().config
    assert (config.tangent_d, config.beta_t_max, config.t_min) == (3.0, 0.95, 0.05)


def test_model_input_is_not_scaled():
    sample = torch.randn(1, 2, 2)
    assert TangentEulerMaruyamaScheduler().scale_model_input(sample, torch.tensor(0.5)) is sample
