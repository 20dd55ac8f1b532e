"""What is given in training: shares of a batch, lengths of prompts, gaps, and the losses of what is written."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ldlm_hf import (
    JointObjective,
    JointObjectiveSettings,
    LDLMLatentDecoder,
    LDLMLatentEncoder,
    LDLMTransformer1DModel,
)
from ldlm_hf.models.conditions import Conditions
from ldlm_hf.objective import ConditioningSettings
from ldlm_hf.objective.conditioning import draw_gaps, draw_prefix
from ldlm_hf.objective.diffusion import example_errors
from ldlm_hf.training.randomness import RowRandomness


LENGTH = 8


def draw(settings: ConditioningSettings, rows: range, batch_size: int, step: int = 0, length: int = 16) -> Conditions:
    randomness = RowRandomness(0, step, rows, batch_size)
    return settings.draw(randomness.places().tolist(), randomness.numpy_generators(), length)


def test_every_batch_has_its_shares() -> None:
    settings = ConditioningSettings(prefix_share=0.25, gaps_share=0.25, dropout=0.25)
    for step in range(5):
        conditions = draw(settings, range(32), 32, step, length=64)
        assert 15 <= int(conditions.given.any(1).sum()) <= 16  # a gap may be the whole text
        assert int(conditions.dropped.sum()) == 4
        assert conditions.given[conditions.dropped].any(1).sum() >= 3
        begins = conditions.given.long().cumsum(1) == torch.arange(1, 65)
        is_prefix = conditions.given.any(1) & (begins == conditions.given).all(1)
        assert 8 <= int(is_prefix.sum()) <= 11  # a gap may be at the end


def test_a_row_is_the_same_in_any_layout_and_another_at_each_step() -> None:
    settings = ConditioningSettings(prefix_share=0.5, gaps_share=0.5)
    whole = draw(settings, range(8), 8)
    parts = [draw(settings, range(first, first + 2), 8) for first in (0, 2, 4, 6)]
    assert torch.equal(torch.cat([part.given for part in parts]), whole.given)
    assert torch.equal(torch.cat([part.dropped for part in parts]), whole.dropped)
    assert not torch.equal(draw(settings, range(8), 8, step=1).given, whole.given)


def test_short_prompts_are_as_frequent_as_long_ones() -> None:
    """n tokens with probability log((n + 1) / n) / log L."""
    generator = np.random.default_rng(0)
    lengths = np.array([draw_prefix(32, generator).sum() for _ in range(20_000)])
    assert lengths.min() == 1 and lengths.max() == 31
    expected = np.log1p(1 / np.arange(1, 32)) / math.log(32)
    counts = np.bincount(lengths, minlength=32)[1:]
    chi_squared = ((counts - 20_000 * expected) ** 2 / (20_000 * expected)).sum()
    assert chi_squared < 30 + 5 * math.sqrt(60)


def test_gaps_are_as_many_as_asked_for_and_anywhere() -> None:
    generator = np.random.default_rng(0)
    rows = np.stack([draw_gaps(16, 4, generator) for _ in range(4_000)])
    starts = (~rows & np.pad(rows, ((0, 0), (1, 0)), constant_values=True)[:, :-1]).sum(1)
    assert (np.bincount(starts)[1:] > 900).all() and starts.max() == 4
    assert (rows.any(0) & ~rows.all(0)).all()
    assert len({row.tobytes() for row in rows}) > 2_000
    assert draw_gaps(1, 4, generator).tolist() == [False]


@pytest.mark.parametrize(
    "values", [{"prefix_share": 0.7, "gaps_share": 0.4}, {"dropout": 1.5}, {"max_gaps": 0}, {"start_step": -1}]
)
def test_impossible_shares_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(values)):
        ConditioningSettings(**values)


def test_errors_are_those_of_what_is_written() -> None:
    prediction, target = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    target[0, 1:] = 2
    given = torch.tensor([[True, False, False, False], [True, True, True, True]])
    assert example_errors(prediction, target, given).tolist() == [4.0, 0.0]


@pytest.fixture
def make_objective(make_components: Callable[..., dict[str, Any]], randomize: Callable) -> Callable:
    def make(averaged: bool = False, **settings: Any) -> JointObjective:
        components = make_components()
        for name, model_class in (("latent_encoder", LDLMLatentEncoder), ("latent_decoder", LDLMLatentDecoder)):
            config = copy.deepcopy(components[name].config)
            config.num_latents = LENGTH
            components[name] = randomize(model_class(config))
        changes = {"sample_size": LENGTH, "role_embeds": True}
        transformer = LDLMTransformer1DModel.from_config(components["transformer"].config, **changes)
        components["transformer"] = randomize(transformer)
        if averaged:
            components["averaged_transformer"] = copy.deepcopy(components["transformer"])
        return JointObjective(**components, settings=JointObjectiveSettings(**settings))

    return make


def run(objective: JointObjective, input_ids: torch.Tensor, conditions: Conditions | None, **arguments: Any) -> Any:
    generators = [torch.Generator().manual_seed(row) for row in range(len(input_ids))]
    times = torch.full((len(input_ids), objective.settings.noise_levels), 0.4)
    drawn = [True, False, True] * objective.settings.noise_levels
    return objective(input_ids, times, 1.0, generators, drawn, conditions=conditions, **arguments)


def test_a_batch_of_which_nothing_is_given_has_the_losses_of_today(make_objective, random_tokens) -> None:
    objective = make_objective()
    nothing = Conditions(torch.zeros(3, LENGTH, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    expected, found = (run(objective, random_tokens(), conditions) for conditions in (None, nothing))
    for name in ("total", "hidden", "token", "diffusion_per_example"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    found.total.backward()
    # or DDP would miss it
    assert objective.transformer.given_embedding.grad is not None


@pytest.mark.parametrize("levels", [1, 2])
def test_the_denoiser_is_told_given_latents_and_trained_on_the_others(make_objective, random_tokens, levels) -> None:
    objective = make_objective(noise_levels=levels)
    given = torch.tensor([[True] * 3 + [False] * 5, [False] * 8, [True, False] * 4])
    conditions = Conditions(given, dropped=torch.tensor([False, False, True]))
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    objective.transformer.register_forward_hook(
        lambda _, __, keywords, output: calls.append((keywords, output.sample)), with_kwargs=True
    )
    latents: list[torch.Tensor] = []
    objective.latent_encoder.register_forward_hook(lambda _, __, output: latents.append(output.latents))
    losses = run(objective, random_tokens(), conditions)
    assert len(calls) == 2  # the first estimate is told the same
    told, prediction = calls[-1]
    repeated = latents[0].repeat_interleave(levels, 0)
    given = given.repeat_interleave(levels, 0)
    shown = given & (torch.arange(3).repeat_interleave(levels) != 2)[:, None]
    torch.testing.assert_close(told["given_latents"], repeated * shown[..., None])
    assert not told["given_latents"].requires_grad
    errors = (prediction - repeated).square().mean(-1)
    expected = torch.stack([errors[row][~given[row]].mean() for row in range(3 * levels)])
    torch.testing.assert_close(losses.diffusion_per_example.flatten(), expected)


def test_consistency_is_that_of_what_is_written(make_objective, random_tokens) -> None:
    objective = make_objective(averaged=True)
    arguments = {"next_timesteps": torch.full((3, 1), 0.3), "consistency_weight": 1.0}
    everything = Conditions(torch.ones(3, LENGTH, dtype=torch.bool))
    losses = run(objective, random_tokens(), everything, **arguments)
    assert losses.consistency == losses.diffusion == 0
    half = Conditions(torch.arange(LENGTH).expand(3, -1) < 4)
    assert run(objective, random_tokens(), half, **arguments).consistency > 0
