from __future__ import annotations

import math

import pytest
import torch

from ldlm_hf.schedulers import tangent


DS = [0.5, 1.0, 3.0, 5.0, 9.0]
INSIDE = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


@pytest.mark.parametrize("d", DS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_and_sigma_are_exact_at_both_ends(d: float, dtype: torch.dtype):
    alpha, sigma = tangent.alpha_sigma(torch.tensor([0.0, 1.0], dtype=dtype), d)
    assert alpha.tolist() == [1.0, 0.0]
    assert sigma.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("d", DS)
def test_alpha_and_sigma_agree_with_the_tangent_form(d: float):
    alpha, sigma = tangent.alpha_sigma(INSIDE, d)
    tangent_form = 1 / torch.sqrt(1 + d**2 * torch.tan(math.pi * INSIDE / 2) ** 2)
    torch.testing.assert_close(alpha, tangent_form, rtol=1e-10, atol=0)
    torch.testing.assert_close(sigma, torch.sqrt(1 - tangent_form**2), rtol=1e-7, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-14, atol=0)


@pytest.mark.parametrize("d", DS)
def test_beta_is_minus_twice_the_slope_of_log_alpha(d: float):
    timesteps = INSIDE.clone().requires_grad_()
    alpha, _ = tangent.alpha_sigma(timesteps, d)
    (slope,) = torch.autograd.grad(alpha.log().sum(), timesteps)
    torch.testing.assert_close(tangent.beta(INSIDE, d), -2 * slope, rtol=1e-9, atol=0)

    tan = torch.tan(math.pi * INSIDE / 2)
    written_out = math.pi * d**2 * tan * (1 + tan**2) / (1 + d**2 * tan**2)
    torch.testing.assert_close(tangent.beta(INSIDE, d), written_out, rtol=1e-9, atol=0)


def test_beta_at_the_ends():
    assert tangent.beta(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0.0, math.inf]


@pytest.mark.parametrize("d", DS)
def test_log_snr_round_trip(d: float):
    log_snr = tangent.log_snr(INSIDE, d)
    alpha, sigma = tangent.alpha_sigma(INSIDE, d)
    torch.testing.assert_close(log_snr, 2 * torch.log(alpha / sigma))
    torch.testing.assert_close(tangent.timesteps_from_log_snr(log_snr, d), INSIDE, rtol=1e-12, atol=1e-14)


def test_log_snr_at_the_ends():
    ends = torch.tensor([0.0, 1.0])
    assert tangent.log_snr(ends, 3.0).tolist() == [math.inf, -math.inf]
    assert tangent.timesteps_from_log_snr(tangent.log_snr(ends, 3.0), 3.0).tolist() == [0.0, 1.0]


def test_log_snr_zero_is_where_signal_and_noise_are_equal():
    time = tangent.timesteps_from_log_snr(torch.zeros(1), 3.0)
    assert time.item() == pytest.approx(2 / math.pi * math.atan(1 / 3), rel=1e-15)
    torch.testing.assert_close(*tangent.alpha_sigma(time, 3.0))


@pytest.mark.parametrize("d", DS)
def test_snr_slope_is_the_slope_of_the_snr(d: float):
    timesteps = INSIDE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(tangent.log_snr(timesteps, d).exp().sum(), timesteps)
    torch.testing.assert_close(tangent.snr_slope(INSIDE, d), slope, rtol=1e-9, atol=0)
    assert tangent.snr_slope(torch.tensor([0.0, 1.0]), d).tolist() == [-math.inf, 0.0]


def test_uniform_time_grid():
    grid = tangent.uniform_time_grid(19, 0.05)
    assert grid.dtype == torch.float64
    torch.testing.assert_close(grid, torch.arange(20, 0, -1, dtype=torch.float64) / 20)
