"""The stages of latent spaces that are not trained jointly, and COSMOS' augmentations of the first one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldlm_hf import JointLosses, JointObjective, JointObjectiveSettings
from ldlm_hf.models.statistics import mean_and_std
from ldlm_hf.objective.draws import random_mask


TIMESTEPS = torch.tensor([0.1, 0.5, 0.9])
AUGMENTATIONS = {"token_masking": 0.3, "mask_token_id": 1, "feature_noise": 0.714, "latent_dropout": 0.4}


@pytest.fixture
def make_stage(make_components: Callable[..., dict[str, Any]]) -> Callable[..., JointObjective]:
    def make(stage: str, **settings: Any) -> JointObjective:
        components = make_components() | ({"transformer": None} if stage == "autoencoder" else {})
        return JointObjective(**components, settings=JointObjectiveSettings(**settings), stage=stage)

    return make


@pytest.fixture
def run(random_tokens: Callable[..., torch.Tensor]) -> Callable[..., JointLosses]:
    def forward(objective: JointObjective, seed: int = 0) -> JointLosses:
        return objective(random_tokens(), TIMESTEPS, 1.0, torch.Generator().manual_seed(seed))

    return forward


def parts_with_gradient(objective: JointObjective) -> set[str]:
    return {
        name
        for name, part in objective.named_children()
        if any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())
    }


def test_autoencoder_has_the_reconstruction_losses_of_joint_training(make_stage, run):
    joint = run(make_stage("joint", reconstruction="hidden+token"))
    objective = make_stage("autoencoder", reconstruction="hidden+token")
    alone = run(objective)
    assert torch.equal(alone.hidden, joint.hidden)
    assert torch.equal(alone.token, joint.token)
    assert torch.equal(alone.total, alone.hidden + alone.token)
    assert alone.diffusion == 0
    assert alone.diffusion_per_example.shape == (3,)
    alone.total.backward()
    assert parts_with_gradient(objective) == {"latent_encoder", "latent_decoder", "token_decoder"}


def test_diffusion_trains_the_denoiser_alone(make_stage, run):
    objective = make_stage("diffusion")
    losses = run(objective)
    assert torch.equal(losses.total, losses.diffusion)
    assert losses.hidden == losses.token == 0
    assert math.isnan(losses.token_accuracy)
    losses.total.backward()
    assert parts_with_gradient(objective) == {"transformer"}
    trained = {name.split(".")[0] for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {"transformer"}


def test_augmentations_change_the_input_and_not_the_targets(make_stage, run, random_tokens):
    objective = make_stage("autoencoder", decoder_noise=0.0, **AUGMENTATIONS)
    input_ids = random_tokens()
    hidden_states = objective.token_encoder(input_ids).hidden_states
    disturbed = objective.disturbed_hidden_states(input_ids, hidden_states, torch.Generator().manual_seed(0))
    assert disturbed.shape == hidden_states.shape
    assert not torch.allclose(disturbed, hidden_states)

    # a decoder that gives the undisturbed hidden states has no loss, whatever was encoded
    class Oracle(torch.nn.Module):
        config = objective.latent_decoder.config

        def forward(self, latents: torch.Tensor, return_dict: bool) -> Any:
            return type("Output", (), {"hidden_states": hidden_states})

    objective.latent_decoder = Oracle()
    assert run(objective).hidden == 0


def test_feature_noise_keeps_the_variance(make_stage):
    objective = make_stage("autoencoder", feature_noise=0.714)
    hidden_states = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(1))
    noised = objective.disturbed_hidden_states(torch.zeros(64, 8), hidden_states, torch.Generator().manual_seed(0))
    assert noised.var() == pytest.approx(1.0, abs=0.03)
    correlation = float((noised * hidden_states).mean())
    assert correlation == pytest.approx(math.sqrt(1 - 0.714**2), abs=0.03)


def test_all_tokens_masked_are_all_the_same_text(make_stage, random_tokens):
    objective = make_stage("autoencoder", token_masking=1.0, mask_token_id=1)
    input_ids = random_tokens()
    hidden_states = objective.token_encoder(input_ids).hidden_states
    masked = objective.disturbed_hidden_states(input_ids, hidden_states, None)
    expected = objective.token_encoder(torch.ones_like(input_ids)).hidden_states
    torch.testing.assert_close(masked, expected)


@pytest.mark.parametrize("probability", [0.1, 0.4, 1.0])
def test_random_mask_has_its_probability_and_a_stream_for_each_example(probability: float):
    shape = torch.Size((2, 100, 100))
    mask = random_mask(shape, probability, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert mask.float().mean() == pytest.approx(probability, abs=0.02)
    both = random_mask(shape, probability, [torch.Generator().manual_seed(seed) for seed in (1, 2)], mask.device)
    second = random_mask(shape[1:], probability, torch.Generator().manual_seed(2), mask.device)
    assert torch.equal(both[1], second)


def test_dropped_latents_keep_their_mean(make_stage):
    """E[dropout(z)] = z: what is left is scaled up by what was dropped."""
    objective = make_stage("autoencoder", latent_dropout=0.4, decoder_noise=0.0)
    seen: list[torch.Tensor] = []
    objective.latent_decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    latents = torch.ones(2000, 6, 16)
    hidden_states, input_ids = torch.zeros(2000, 8, 32), torch.zeros(2000, 8, dtype=torch.long)
    objective.reconstruction_losses(latents, hidden_states, input_ids, torch.Generator().manual_seed(0))
    assert seen[0].mean() == pytest.approx(1.0, abs=0.01)
    assert (seen[0] == 0).float().mean() == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("second", {}, "stage='second' is unknown; it is one of joint, autoencoder, diffusion"),
        ("joint", {"token_masking": 0.3, "mask_token_id": 1}, "token_masking=0.3 goes with stage='autoencoder' only"),
        ("diffusion", {"feature_noise": 0.3}, "feature_noise=0.3 goes with stage='autoencoder' only"),
        ("autoencoder", {"token_masking": 0.3}, "token_masking=0.3 needs a mask_token_id"),
        ("autoencoder", {"latent_dropout": 1.0}, r"latent_dropout=1.0 must lie in \[0, 1\)"),
        ("autoencoder", {"feature_noise": 1.5}, r"feature_noise=1.5 must lie in \[0, 1\]"),
    ],
)
def test_contradictions_are_refused(make_stage, stage: str, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_stage(stage, **settings)


def test_denoiser_goes_with_the_stages_that_have_one(make_components):
    with pytest.raises(ValueError, match="stage='autoencoder' has no transformer"):
        JointObjective(**make_components(), stage="autoencoder")
    with pytest.raises(ValueError, match="stage='diffusion' needs a transformer"):
        JointObjective(**make_components() | {"transformer": None}, stage="diffusion")


def test_statistics_do_not_depend_on_the_batches():
    """Far from zero, where a sum of squares in float32 would have cancelled."""
    vectors = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 3, 4, 0.0]) + 1000
    mean, std, count = mean_and_std(iter(vectors.split(7)))
    assert count == 500
    torch.testing.assert_close(mean, vectors.double().mean(0))
    torch.testing.assert_close(std[:4], vectors.double().std(0, correction=0)[:4])
    assert std[4] == pytest.approx(0.01)  # the floor: the root of 1e-4
    with pytest.raises(ValueError, match="at least one token"):
        mean_and_std([])
