from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from ldlm_hf import scale_gradient, warmup_gate


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.0), (0.5, 0.053), (0.8, 0.57), (1.0, 1.0), (1.5, 1.0), (100, 1.0)]
)
@pytest.mark.parametrize("warmup_steps", [1000, 10_000, 50_000])
def test_known_values(progress: float, expected: float, warmup_steps: int):
    assert warmup_gate(int(progress * warmup_steps), warmup_steps) == pytest.approx(expected, abs=0.0036)
    if progress in (0.0, 1.0):
        assert warmup_gate(int(progress * warmup_steps), warmup_steps) == expected


@pytest.mark.parametrize(("midpoint", "steepness"), [(0.8, 10.0), (0.5, 4.0), (0.2, 30.0)])
def test_is_the_formula_of_the_paper(midpoint: float, steepness: float):
    """Eq. 29–30, written out."""

    def logistic(step: int) -> float:
        return 1 / (1 + math.exp(-steepness * (step / 100 - midpoint)))

    gates = [warmup_gate(step, 100, midpoint, steepness) for step in range(101)]
    expected = [(logistic(step) - logistic(0)) / (logistic(100) - logistic(0)) for step in range(101)]
    assert gates == pytest.approx(expected, abs=1e-12)
    assert all(a < b for a, b in pairwise(gates))


def test_no_warmup_means_an_open_gate():
    assert warmup_gate(0, 0) == 1.0
    assert warmup_gate(7, 0) == 1.0


def test_a_very_steep_gate_is_a_step():
    gates = [warmup_gate(step, 100, midpoint=0.5, steepness=1e5) for step in range(101)]
    assert gates[:50] == 50 * [0.0]
    assert gates[51:] == 50 * [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gate", [0.0, 0.053, 1 / 3, 0.57, 0.999, 1.0])
def test_gate_changes_gradients_and_not_one_bit_of_the_values(dtype: torch.dtype, gate: float):
    torch.manual_seed(0)
    x = (1000 * torch.randn(10_000)).to(dtype).requires_grad_()
    weight = torch.randn(10_000).to(dtype)
    gated = scale_gradient(x, gate)
    assert gated.dtype == dtype
    assert torch.equal(gated, x)
    (gradient,) = torch.autograd.grad((gated * weight).sum(), x)
    torch.testing.assert_close(gradient, gate * weight)
    assert gate != 0 or not gradient.any()


def test_the_literal_sum_would_change_values_in_bfloat16():
    """Why Eq. 28 is written as an interpolation."""
    torch.manual_seed(0)
    x = torch.randn(10_000).bfloat16()
    assert not torch.equal(0.3 * x + (1 - 0.3) * x, x)
    assert torch.equal(scale_gradient(x, 0.3), x)


def test_gate_may_be_a_tensor():
    x = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale_gradient(x, torch.tensor(0.25)).sum(), x)
    assert torch.equal(gradient, torch.full((5,), 0.25))
