"""A row's random numbers depend on seed, step and place in the whole batch, not on how the batch is split."""

from __future__ import annotations

import torch

from ldlm_hf.training.randomness import RowRandomness


CPU = torch.device("cpu")


def noise(randomness: RowRandomness) -> torch.Tensor:
    return torch.stack([torch.randn(3, generator=generator) for generator in randomness.generators(CPU)])


def test_parts_of_a_batch_have_the_numbers_of_the_whole() -> None:
    whole = RowRandomness(seed=1, step=5, rows=range(8), batch_size=8)
    parts = [RowRandomness(seed=1, step=5, rows=range(first, first + 2), batch_size=8) for first in (0, 2, 4, 6)]
    assert torch.equal(torch.cat([noise(part) for part in parts]), noise(whole))
    assert torch.equal(torch.cat([part.uniform() for part in parts]), whole.uniform())
    assert {part.shared_uniform() for part in parts} == {whole.shared_uniform()}


def test_seeds_steps_and_rows_differ() -> None:
    all_noise = [noise(RowRandomness(seed, step, range(4), 4)) for seed, step in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    rows = torch.cat(all_noise)
    assert len(rows.unique(dim=0)) == 16
    shared = {RowRandomness(seed, step, range(4), 4).shared_uniform() for seed in range(3) for step in range(3)}
    assert len(shared) == 9


def test_numbers_are_spread_as_they_should_be() -> None:
    uniform = torch.cat([RowRandomness(0, step, range(64), 64).uniform() for step in range(200)])
    assert abs(float(uniform.mean()) - 0.5) < 4 * (1 / 12 / len(uniform)) ** 0.5
    drawn = torch.cat([noise(RowRandomness(0, step, range(64), 64)) for step in range(50)])
    assert abs(float(drawn.mean())) < 4 / drawn.numel() ** 0.5
    assert abs(float(drawn.std()) - 1) < 4 / (2 * drawn.numel()) ** 0.5
