"""What training knows beside the paper's loss: several times a text, guidance, consistency, unit variance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldlm_hf import JointObjective, JointObjectiveSettings, LDLMTransformer1DModel
from ldlm_hf.objective import ConsistencySettings
from ldlm_hf.objective.diffusion import Denoised, guided_target
from ldlm_hf.schedulers.scheduling_tangent_ddim import TangentDDIMScheduler


TIMES = torch.tensor([[0.1, 0.4], [0.5, 0.6], [0.9, 0.95]])


@pytest.fixture
def make_objective(make_components: Callable[..., dict[str, Any]], randomize: Callable) -> Callable:
    def make(
        guidance_embeds: bool = False, averaged: bool = False, stage: str = "joint", **settings: Any
    ) -> JointObjective:
        components = make_components()
        if guidance_embeds:
            transformer = LDLMTransformer1DModel.from_config(components["transformer"].config, guidance_embeds=True)
            components["transformer"] = randomize(transformer)
        if averaged:
            components["averaged_transformer"] = randomize(copy.deepcopy(components["transformer"]))
        return JointObjective(**components, settings=JointObjectiveSettings(**settings), stage=stage)

    return make


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(3)]


def test_several_times_of_a_text_share_its_latents(make_objective, random_tokens):
    """The loss at each time is that of a batch in which every text stands once for each of its times."""
    objective = make_objective(stage="diffusion")  # which draws no noise but the diffusion's
    calls: list[torch.Tensor] = []
    objective.transformer.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[1]))
    encoded: list[int] = []
    objective.latent_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    drawn = [True, False, False, True, True, True]
    together = objective(random_tokens(), TIMES, 1.0, torch.Generator().manual_seed(0), drawn)
    assert encoded == [3] and torch.equal(calls[-1], TIMES.flatten())
    assert together.diffusion_per_example.shape == (3, 2)
    torch.testing.assert_close(together.diffusion, together.diffusion_per_example.mean())

    repeated = random_tokens().repeat_interleave(2, dim=0)
    expected = objective(repeated, TIMES.flatten(), 1.0, torch.Generator().manual_seed(0), drawn)
    torch.testing.assert_close(together.diffusion_per_example.flatten(), expected.diffusion_per_example)


def test_one_time_is_the_papers_loss_whatever_the_shape(make_objective, random_tokens):
    objective = make_objective()
    flat = objective(random_tokens(), TIMES[:, 0], 1.0, generators(), [True, False, True])
    column = objective(random_tokens(), TIMES[:, :1], 1.0, generators(), [True, False, True])
    assert torch.equal(flat.diffusion_per_example, column.diffusion_per_example[:, 0])
    assert torch.equal(flat.total, column.total)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0, 5.0])
def test_the_guided_targets_fixed_point_is_guidance(weight: float):
    """Where the prediction is what it is trained to, it is x_0 + w (E - x_0), E the mean of the clean latents."""
    clean, first = torch.tensor([[[3.0]]]), torch.tensor([[[1.0]]])
    guided = first + weight * (clean - first)
    target = guided_target(clean, Denoised(torch.zeros_like(clean), first, guided), torch.tensor([weight]))
    torch.testing.assert_close(target, guided)


def test_without_a_first_estimate_the_target_is_the_clean_latents():
    latents, first = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    first[1] = 0
    denoised = Denoised(torch.randn(2, 3, 4), first, torch.randn(2, 3, 4))
    target = guided_target(latents, denoised, torch.tensor([3.0, 3.0]))
    assert torch.equal(target[1], latents[1])
    assert not torch.isclose(target[0], latents[0]).any()


def test_guidance_needs_a_denoiser_that_is_told_its_weight(make_objective):
    with pytest.raises(ValueError, match=r"guidance_range=\[0.5, 5\] needs a denoiser"):
        make_objective(guidance_range=[0.5, 5])


def test_guidance_reaches_the_denoiser_and_moves_the_target_only(make_objective, random_tokens):
    objective = make_objective(guidance_embeds=True, self_conditioning_probability=1.0)
    told: list[torch.Tensor] = []
    objective.transformer.register_forward_pre_hook(
        lambda _, __, keywords: told.append(keywords.get("guidance")), with_kwargs=True
    )
    weights = torch.tensor([[1.0, 4.0], [1.0, 0.5], [1.0, 2.0]])
    run = lambda guidance: objective(random_tokens(), TIMES, 1.0, generators(), [True] * 6, guidance)  # noqa: E731
    guided, plain = run(weights), run(None)
    assert told[0] is None  # the first estimate
    assert torch.equal(told[1], weights.flatten())
    torch.testing.assert_close(guided.diffusion_per_example[:, 0], plain.diffusion_per_example[:, 0])
    assert not torch.isclose(guided.diffusion_per_example[:, 1], plain.diffusion_per_example[:, 1]).any()


def test_consistency_is_the_distance_to_the_prediction_after_a_step_of_the_sampler(make_objective, random_tokens):
    """Against DDIM's own step, as the scheduler takes it."""
    objective = make_objective(averaged=True, self_conditioning_probability=1.0)
    input_ids, times, later = random_tokens(), torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.3, 0.3, 0.3])
    calls: list[tuple] = []
    objective.transformer.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output.sample)))
    losses = objective(input_ids, times, 1.0, generators(), [True] * 3, next_timesteps=later, consistency_weight=0.7)
    ((noisy, _, _), prediction) = calls[-1]
    scheduler = TangentDDIMScheduler(t_min=0.3)
    scheduler.set_timesteps(timesteps=[0.5])
    with torch.no_grad():
        after = scheduler.step(prediction, 0.5, noisy).prev_sample
        target = objective.averaged_transformer(after, later, prediction).sample
    torch.testing.assert_close(losses.consistency, (prediction - target).square().mean())
    without = objective(input_ids, times, 1.0, generators(), [True] * 3)
    assert without.consistency == 0
    torch.testing.assert_close(losses.total, without.total + 0.7 * losses.consistency)


def test_consistency_trains_the_denoiser_and_not_its_average(make_objective, random_tokens):
    objective = make_objective(averaged=True)
    losses = objective(random_tokens(), TIMES, 0.0, generators(), [True] * 6, next_timesteps=TIMES / 2)
    losses.consistency.backward()
    assert all(parameter.grad is None for parameter in objective.averaged_transformer.parameters())
    assert objective.transformer.proj_out.weight.grad.any()
    assert not any(p.grad is not None and p.grad.any() for p in objective.latent_encoder.parameters())


def test_the_consistency_weight_rises_in_a_straight_line():
    settings = ConsistencySettings(weight=2.0, warmup_steps=4)
    assert [settings.weight_at(step) for step in (0, 1, 2, 4, 9)] == [0, 0.5, 1, 2, 2]
    assert ConsistencySettings(weight=2.0).weight_at(0) == 2


def test_latents_of_unit_variance_cannot_shrink_the_diffusion_loss(make_objective, random_tokens):
    """A smaller scale of the encoder's output lowers the loss where the scale is free, and changes nothing else."""

    def losses(standardize: bool, scale: float) -> tuple[float, float]:
        objective = make_objective()
        encoder = objective.latent_encoder
        if standardize:
            encoder.set_latent_statistics(torch.full((16,), 3.0), torch.full((16,), 5.0))
        with torch.no_grad():
            for parameter in encoder.proj_out.parameters():
                parameter.mul_(scale)
        found = objective(random_tokens(), TIMES, 1.0, generators(), [True] * 6)
        return found.diffusion.item(), found.latent_std.item()

    assert losses(standardize=False, scale=0.5)[1] == pytest.approx(losses(standardize=False, scale=1.0)[1] / 2)
    unit = losses(standardize=True, scale=1.0)
    assert losses(standardize=True, scale=0.5) == pytest.approx(unit, rel=1e-4)
    assert unit[1] == pytest.approx(1.0, abs=0.01)
