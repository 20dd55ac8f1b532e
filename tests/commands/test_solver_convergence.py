from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from figures.solver_convergence import (
    SOLVERS,
    GaussianMixture,
    Solver,
    errors,
    flow_error,
    observed_order,
    variance_error,
)
from ldlm_hf import TangentChurnScheduler, TangentDDIMScheduler, TangentDPMSolverMultistepScheduler, TangentScheduler


MIXTURE = GaussianMixture(weights=(0.5, 0.5), means=(-0.8, 1.0), stds=(0.4, 0.2))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@pytest.mark.parametrize("time_grid", ["uniform", "log_snr"])
def test_each_solver_has_the_order_that_it_claims(solver: Solver, time_grid: str):
    num_steps = [128, 256, 512]
    found = errors(solver, num_steps, time_grid=time_grid)
    assert observed_order(num_steps, found) == pytest.approx(solver.order, abs=0.25)


def test_denoiser_of_the_mixture_is_the_mean_of_what_made_each_sample():
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = (torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.8))
    component = torch.rand(400_000, generator=generator) < 0.5
    noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    clean = torch.where(component, -0.8 + 0.4 * noise[0], 1.0 + 0.2 * noise[0])
    noisy = alpha * clean + sigma * noise[1]
    for x in (-1.0, 0.2, 0.9):
        near = (noisy - x).abs() < 0.05
        expected = MIXTURE.denoise(torch.tensor([x], dtype=torch.float64), alpha, sigma)
        assert float(clean[near].mean()) == pytest.approx(float(expected), abs=0.03)


def test_the_flow_is_the_ode():
    """dx/dt = -beta/2 (x + score), by tiny Euler steps from t = 0.8 to 0.3."""
    scheduler = TangentDDIMScheduler()
    quantiles = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    times = torch.linspace(0.8, 0.3, 4_001, dtype=torch.float64)
    alphas, sigmas = scheduler.marginal(times)
    betas = -2 * torch.gradient(alphas.log(), spacing=(times,))[0]
    x = MIXTURE.flow(quantiles, alphas[0], sigmas[0])
    for i in range(4_000):
        score = (alphas[i] * MIXTURE.denoise(x, alphas[i], sigmas[i]) - x) / sigmas[i] ** 2
        x = x - betas[i] / 2 * (x + score) * (times[i + 1] - times[i])
    torch.testing.assert_close(x, MIXTURE.flow(quantiles, alphas[-1], sigmas[-1]), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "scheduler",
    [
        TangentDDIMScheduler(eta=1.0),
        TangentDDIMScheduler(eta=0.5),
        TangentDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
        TangentChurnScheduler(churn=20.0),
        TangentChurnScheduler(churn=20.0, update="noised"),
    ],
    ids=["ancestral", "eta 0.5", "sde 2m", "churn, original", "churn, noised"],
)
@pytest.mark.parametrize("std", [0.3, 1.0])
def test_stochastic_solvers_reach_the_right_variance(scheduler: TangentScheduler, std: float):
    """With many steps; and the variance that is worked out is that of drawn samples."""
    assert variance_error(scheduler, std, 4200) < 0.01

    num_steps, generator = 12, torch.Generator().manual_seed(0)
    predicted = variance_error(scheduler, std, num_steps)
    scheduler.set_timesteps(num_steps)
    sample = torch.randn(200_000, 1, 1, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        alpha, sigma = scheduler.marginal(t.double())
        clean = alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * sample
        sample = scheduler.step(clean, t, sample, generator=generator).prev_sample
    alpha, sigma = scheduler.marginal(torch.tensor(scheduler.config.t_min, dtype=torch.float64))
    found = abs(float(sample.var() / ((alpha * std) ** 2 + sigma**2)) - 1)
    # four standard errors of the variance of 200,000 samples
    assert found == pytest.approx(predicted, abs=4 * (2 / 200_000) ** 0.5)


def test_two_steps_too_few_to_see_are_still_worse_than_many():
    scheduler = TangentDPMSolverMultistepScheduler()
    few, many = (flow_error(scheduler, MIXTURE, steps) for steps in (4, 64))
    assert many < few / 20


def test_the_page_states_the_measured_orders(
    tmp_path: Path, capsys: pytest.CaptureFixture, run_script: Callable[..., None]
):
    run_script("solver_convergence", "--output_dir", str(tmp_path), "--steps", "16", "8", "32")
    page = (tmp_path / "solver_convergence.md").read_text()
    assert capsys.readouterr().out.strip().endswith("solver_convergence.md")
    assert "--time_grid log_snr --steps 8 16 32" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| DDIM ")]
    assert f"{errors(SOLVERS[0], [8], time_grid='log_snr')[0]:.1e}" in row
    assert (tmp_path / "solver_convergence.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        run_script("solver_convergence", "--output_dir", str(tmp_path), "--steps", "8")
