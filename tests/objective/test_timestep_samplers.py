from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from ldlm_hf import AdaptiveTimestepSampler, TimestepSamplerSettings, UniformTimestepSampler


def taught(
    loss: Callable[[torch.Tensor], torch.Tensor], num_updates: int = 50, batch_size: int = 512, **settings
) -> AdaptiveTimestepSampler:
    """A sampler that has seen exact losses at uniform times, refreshed at its last update."""
    sampler = AdaptiveTimestepSampler(**({"num_bins": 20, "update_every": num_updates} | settings))
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_updates):
        timesteps = torch.rand(batch_size, generator=generator)
        sampler.update(timesteps, loss(timesteps))
    return sampler


def test_uniform_sampler():
    sampler = UniformTimestepSampler()
    timesteps = sampler.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert timesteps.dtype == torch.float32
    quantiles = torch.quantile(timesteps, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), rtol=0, atol=0.015)
    sampler.update(timesteps, timesteps)
    grid = torch.linspace(0, 1, 5)
    assert torch.equal(sampler.cdf(grid), grid)
    assert torch.equal(sampler.quantile(grid), grid)
    assert sampler.state_dict() == {}
    assert not sampler.is_active
    sampler.load_state_dict({})
    with pytest.raises(ValueError, match="adaptive"):
        sampler.load_state_dict(AdaptiveTimestepSampler().state_dict())


def test_uniform_until_the_first_refresh():
    sampler = AdaptiveTimestepSampler(num_bins=10, update_every=3)
    grid = torch.linspace(0, 1, 101)
    timesteps = (torch.arange(1000) + 0.5) / 1000
    for i in range(3):
        assert not sampler.is_active
        torch.testing.assert_close(sampler.cdf(grid), grid)
        sampler.update(timesteps, timesteps**2)
        assert sampler.num_updates == i + 1
    assert sampler.is_active
    assert not torch.allclose(sampler.cdf(grid), grid, atol=0.05)


def test_uniform_while_an_edge_has_not_been_seen():
    sampler = AdaptiveTimestepSampler(num_bins=10, update_every=1)
    seen = torch.linspace(0, 0.85, 100)
    for _ in range(20):
        sampler.update(seen, seen)
        assert not sampler.is_active
    assert sampler.edge_losses.isnan().tolist() == 10 * [False] + [True]
    grid = torch.linspace(0, 1, 11)
    torch.testing.assert_close(sampler.quantile(grid), grid)
    sampler.update(torch.tensor([0.99]), torch.tensor([1.0]))
    assert sampler.is_active


def test_each_pair_informs_its_two_edges_in_proportion_to_nearness():
    sampler = AdaptiveTimestepSampler(num_bins=4, ema_decay=0.5, update_every=100)
    sampler.update(torch.tensor([0.3125, 0.5]), torch.tensor([2.0, 8.0]))
    # 0.3125 lies a quarter of the way from edge 1 (0.25) to edge 2 (0.5); 0.5 is edge 2
    expected = torch.tensor([math.nan, 2.0, (0.25 * 2 + 8) / 1.25, math.nan, math.nan], dtype=torch.float64)
    torch.testing.assert_close(sampler.edge_losses, expected, equal_nan=True)


def test_estimate_is_an_unbiased_moving_average_from_the_first_update_on():
    """With decay 0.999 a plain average started at 0 would stand at 0.3% of a constant loss after three updates."""
    sampler = AdaptiveTimestepSampler(num_bins=5, ema_decay=0.999)
    timesteps = torch.linspace(0, 1, 64)
    for _ in range(3):
        sampler.update(timesteps, torch.full_like(timesteps, 7.0))
        torch.testing.assert_close(sampler.edge_losses, torch.full((6,), 7.0, dtype=torch.float64))


def test_estimate_forgets_at_the_given_decay():
    sampler = AdaptiveTimestepSampler(num_bins=5, ema_decay=0.9)
    timesteps = torch.linspace(0, 1, 64)
    sampler.update(timesteps, torch.full_like(timesteps, 1.0))
    sampler.update(timesteps, torch.full_like(timesteps, 2.0))
    expected = (0.9 * 1 + 2) / 1.9
    torch.testing.assert_close(sampler.edge_losses, torch.full((6,), expected, dtype=torch.float64))


def test_known_slopes_are_recovered():
    """L(t) = t^2 gives p(t) = 2t, so F(t) = t^2 and F^-1(u) = sqrt(u)."""
    sampler = taught(torch.square, num_bins=100, num_updates=200)
    edges = sampler.edges
    torch.testing.assert_close(sampler.cdf(edges), edges**2, rtol=0, atol=0.01)
    # the outermost edges are informed from one side only, so their bins' slopes are taken for too small
    inner_bins = ((edges[1:] + edges[:-1]) / 2)[1:-1]
    torch.testing.assert_close(sampler.probabilities[1:-1] * 100, 2 * inner_bins, rtol=0, atol=0.15)
    draws = sampler.sample(20_000, generator=torch.Generator().manual_seed(1))
    assert draws.mean().item() == pytest.approx(2 / 3, abs=0.01)
    assert draws.square().mean().item() == pytest.approx(1 / 2, abs=0.01)


@pytest.mark.parametrize("loss", [torch.square, lambda t: 1 / (1 + torch.exp(-12 * (t - 0.4))), torch.sin])
def test_loss_is_a_straight_line_in_warped_time(loss: Callable[[torch.Tensor], torch.Tensor]):
    """Fig. 5: L(F^-1(u)) = L(0) + u (L(1) - L(0))."""
    sampler = taught(loss, num_bins=100, num_updates=200)
    warped = torch.linspace(0, 1, 101, dtype=torch.float64)
    losses = loss(sampler.quantile(warped))
    low, high = loss(torch.zeros(1)).item(), loss(torch.ones(1)).item()
    torch.testing.assert_close(losses, low + warped * (high - low), rtol=0, atol=0.03 * (high - low))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantile_inverts_cdf(dtype: torch.dtype):
    sampler = taught(torch.square)
    grid = torch.linspace(0, 1, 997, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(sampler.cdf(sampler.quantile(grid)), grid, rtol=0, atol=tolerance)
    torch.testing.assert_close(sampler.quantile(sampler.cdf(grid)), grid, rtol=0, atol=tolerance)
    for function in (sampler.cdf, sampler.quantile):
        values = function(grid)
        assert values.dtype == dtype
        assert (values[0].item(), values[-1].item()) == (0.0, 1.0)
        assert (values.diff() > 0).all()


def test_density_is_the_slope_of_cdf():
    sampler = taught(torch.square)
    middles = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    slope = (sampler.cdf(middles + 0.01) - sampler.cdf(middles - 0.01)) / 0.02
    torch.testing.assert_close(sampler.density(middles), slope)
    assert UniformTimestepSampler().density(middles).tolist() == 20 * [1.0]


def test_falling_losses_count_as_flat_and_the_floor_keeps_every_bin_alive():
    sampler = AdaptiveTimestepSampler(num_bins=4, update_every=1, floor=0.1)
    sampler.update(torch.linspace(0, 1, 5), torch.tensor([0.0, 1.0, 0.2, 0.2, 0.7]))
    slopes = torch.tensor([1.1, 0.1, 0.1, 0.6], dtype=torch.float64)
    torch.testing.assert_close(sampler.probabilities, slopes / slopes.sum(), rtol=1e-6, atol=0)


def test_a_loss_without_any_slope_leaves_the_draw_uniform():
    sampler = taught(torch.zeros_like)
    assert sampler.is_active
    torch.testing.assert_close(sampler.probabilities, torch.full((20,), 0.05, dtype=torch.float64))


def test_state_round_trip_gives_identical_draws_and_identical_learning():
    sampler = taught(torch.square, update_every=7)
    other = AdaptiveTimestepSampler(num_bins=20, update_every=7)
    state = sampler.state_dict()
    other.load_state_dict(state)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(20):
        draws = [s.sample(64, generator=g) for s, g in zip((sampler, other), generators, strict=True)]
        assert torch.equal(*draws)
        sampler.update(draws[0], draws[0].sqrt())
        other.update(draws[1], draws[1].sqrt())
    assert torch.equal(sampler.probabilities, other.probabilities)
    assert sampler.num_updates == other.num_updates
    # the state that was handed out is a copy
    assert state["num_updates"] == 50
    assert not torch.equal(state["weights"], sampler.state_dict()["weights"])


def test_state_of_another_number_of_bins_is_refused():
    sampler = AdaptiveTimestepSampler(num_bins=20)
    with pytest.raises(ValueError, match="num_bins=10, not 20"):
        sampler.load_state_dict(AdaptiveTimestepSampler(num_bins=10).state_dict())
    with pytest.raises(ValueError, match="num_bins"):
        sampler.load_state_dict(UniformTimestepSampler().state_dict())


def test_ranks_that_see_the_same_pairs_hold_the_same_probabilities():
    one, other = taught(torch.square), taught(torch.square)
    assert torch.equal(one.probabilities, other.probabilities)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pairs_that_are_not_finite_are_ignored(bad: float):
    timesteps, losses = torch.tensor([0.2, 0.4, 0.9]), torch.tensor([1.0, 2.0, 3.0])
    expected, found = AdaptiveTimestepSampler(num_bins=5), AdaptiveTimestepSampler(num_bins=5)
    expected.update(timesteps, losses)
    found.update(torch.cat([timesteps, torch.tensor([0.5, bad])]), torch.cat([losses, torch.tensor([bad, 1.0])]))
    torch.testing.assert_close(found.edge_losses, expected.edge_losses, equal_nan=True, rtol=0, atol=0)


def test_gradients_and_half_precision_are_taken_in():
    sampler = AdaptiveTimestepSampler(num_bins=4, update_every=1)
    timesteps = torch.linspace(0, 1, 5)
    sampler.update(timesteps, timesteps.bfloat16().requires_grad_())
    torch.testing.assert_close(sampler.edge_losses, timesteps.double())
    assert not sampler.edge_losses.requires_grad


@pytest.mark.parametrize(("timesteps", "losses"), [(torch.rand(3), torch.rand(4)), (torch.rand(()), torch.rand(()))])
def test_pairs_must_be_pairs(timesteps: torch.Tensor, losses: torch.Tensor):
    with pytest.raises(ValueError, match="pairs"):
        AdaptiveTimestepSampler().update(timesteps, losses)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_bins", 0),
        ("update_every", 0),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("ema_decay", math.nan),
        ("floor", 0.0),
        ("floor", -1.0),
        ("floor", math.nan),
    ],
)
def test_bad_settings_name_setting_and_value(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        AdaptiveTimestepSampler(**{name: value})


def test_settings_build_what_they_describe():
    sampler = TimestepSamplerSettings(num_bins=7, ema_decay=0.5, update_every=3, floor=0.01).build()
    assert isinstance(sampler, AdaptiveTimestepSampler)
    assert (sampler.num_bins, sampler.ema_decay, sampler.update_every, sampler.floor) == (7, 0.5, 3, 0.01)
    assert isinstance(TimestepSamplerSettings(adaptive=False).build(), UniformTimestepSampler)
    papers = TimestepSamplerSettings().build()
    assert (papers.num_bins, papers.ema_decay, papers.update_every, papers.floor) == (100, 0.999, 5000, 1e-6)


def test_uniform_share_keeps_every_bin_in_sight() -> None:
    """A loss that rises in the last bin alone: Eq. 5 draws there only, but for the share that stays uniform."""
    sampler = AdaptiveTimestepSampler(num_bins=10, ema_decay=0.5, update_every=1, uniform_share=0.2)
    edges = sampler.edges
    sampler.update(edges, (edges > 0.95).double())
    assert sampler.is_active
    torch.testing.assert_close(
        sampler.probabilities[:-1], torch.full((9,), 0.02, dtype=torch.float64), atol=1e-5, rtol=0
    )
    assert float(sampler.probabilities[-1]) == pytest.approx(0.82, abs=1e-4)
    with pytest.raises(ValueError, match="uniform_share=1.5"):
        AdaptiveTimestepSampler(uniform_share=1.5)
