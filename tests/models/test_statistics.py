from __future__ import annotations

import pytest
import torch

from ldlm_hf.models.statistics import LatentSpread


def measured(latents: torch.Tensor) -> tuple[float, float]:
    spread = LatentSpread()
    for batch in latents.split(100):
        spread.add(batch)
    return spread.measure()


def test_white_latents_have_the_rank_of_their_width():
    rank, position_share = measured(torch.randn(4000, 6, 8) + torch.randn(8))
    assert rank == pytest.approx(8, rel=0.01)
    assert position_share == pytest.approx(0, abs=1e-3)


def test_latents_in_a_space_of_fewer_dimensions_have_its_rank():
    axes = torch.linalg.qr(torch.randn(8, 3)).Q.T
    rank, _ = measured(torch.randn(4000, 6, 3) @ axes)
    assert rank == pytest.approx(3, rel=0.01)


def test_what_differs_between_places_is_told_apart():
    """Variance 3 between the places, 1 between texts; a mean of all changes neither."""
    places = torch.randn(6, 8)
    places = (places - places.mean(0)) / places.std(0, correction=0) * 3**0.5
    rank, position_share = measured(torch.randn(4000, 6, 8) + places + 50)
    assert rank == pytest.approx(8, rel=0.01)
    assert position_share == pytest.approx(0.75, abs=0.01)
