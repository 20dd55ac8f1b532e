from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ldlm_hf import (
    JointLosses,
    JointObjective,
    JointObjectiveSettings,
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMLatentEncoder,
    LDLMLatentEncoderConfig,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTokenEncoder,
    LDLMTransformer1DModel,
)
from ldlm_hf.objective.draws import systematic_sample


PARTS = ["token_encoder", "latent_encoder", "latent_decoder", "token_decoder", "transformer"]
TIMESTEPS = torch.tensor([0.1, 0.5, 0.9])


@pytest.fixture
def make_objective(make_components: Callable[..., dict[str, Any]]) -> Callable[..., JointObjective]:
    def make(representation: str = "hidden", without: tuple[str, ...] = (), **settings: Any) -> JointObjective:
        components = make_components(representation) | dict.fromkeys(without)
        return JointObjective(**components, settings=JointObjectiveSettings(**settings))

    return make


@pytest.fixture
def run(random_tokens: Callable[..., torch.Tensor]) -> Callable[..., JointLosses]:
    def forward(objective: JointObjective, gate: float = 1.0, seed: int = 0, **arguments: Any) -> JointLosses:
        generator = torch.Generator().manual_seed(seed)
        return objective(random_tokens(), TIMESTEPS, gate, generator, **arguments)

    return forward


def gradients(objective: JointObjective, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of each part in one vector, zero where there is none; leaves nothing behind."""
    objective.zero_grad()
    loss.backward(retain_graph=True)
    collected = {}
    for name in PARTS:
        part = getattr(objective, name)
        parameters = [] if part is None else list(part.parameters())
        flat = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in parameters]
        collected[name] = torch.cat(flat) if flat else torch.zeros(1)
    objective.zero_grad()
    return collected


def receivers(found: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, gradient in found.items() if gradient.any()}


ALL_TRAINABLE = {"latent_encoder", "latent_decoder", "token_decoder", "transformer"}


@pytest.mark.parametrize(
    ("variant", "hidden", "token", "diffusion", "total"),
    [
        (
            {"reconstruction": "hidden"},
            {"latent_encoder", "latent_decoder"},
            {"token_decoder"},
            {"latent_encoder", "transformer"},
            ALL_TRAINABLE,
        ),
        (
            {"reconstruction": "token"},
            {"latent_encoder", "latent_decoder"},
            {"latent_encoder", "latent_decoder", "token_decoder"},
            {"latent_encoder", "transformer"},
            ALL_TRAINABLE,
        ),
        (
            {"reconstruction": "hidden+token"},
            {"latent_encoder", "latent_decoder"},
            {"latent_encoder", "latent_decoder", "token_decoder"},
            {"latent_encoder", "transformer"},
            ALL_TRAINABLE,
        ),
        (
            {"reconstruction": "hidden", "representation": "embedding"},
            {"latent_encoder", "latent_decoder"},
            {"token_decoder"},
            {"latent_encoder", "transformer"},
            ALL_TRAINABLE,
        ),
        (
            {"reconstruction": "token", "representation": "scratch"},
            {"token_encoder", "latent_encoder", "latent_decoder"},
            {"token_encoder", "latent_encoder", "latent_decoder", "token_decoder"},
            {"token_encoder", "latent_encoder", "transformer"},
            ALL_TRAINABLE | {"token_encoder"},
        ),
        (
            {"reconstruction": "hidden", "without": ("token_decoder",)},
            {"latent_encoder", "latent_decoder"},
            None,
            {"latent_encoder", "transformer"},
            ALL_TRAINABLE - {"token_decoder"},
        ),
    ],
)
def test_which_parts_each_loss_trains(
    make_objective, run, variant: dict, hidden: set, token: set | None, diffusion: set, total: set
):
    objective = make_objective(**variant)
    losses = run(objective)
    assert receivers(gradients(objective, losses.hidden)) == hidden
    assert receivers(gradients(objective, losses.diffusion)) == diffusion
    assert receivers(gradients(objective, losses.total)) == total
    if token is None:
        assert not losses.token.requires_grad
    else:
        assert receivers(gradients(objective, losses.token)) == token


def test_token_alone_does_not_minimise_the_hidden_loss(make_objective, run):
    losses = run(make_objective(reconstruction="token"))
    torch.testing.assert_close(losses.total, losses.token + losses.diffusion)


def test_total_is_the_weighted_sum(make_objective, run):
    losses = run(make_objective(reconstruction="hidden"))
    torch.testing.assert_close(losses.total, losses.hidden + losses.token + losses.diffusion)
    weights = {"hidden_weight": 2.0, "token_weight": 0.5, "diffusion_weight": 3.0}
    weighted = run(make_objective(reconstruction="hidden+token", **weights))
    torch.testing.assert_close(weighted.total, 2 * losses.hidden + 0.5 * losses.token + 3 * losses.diffusion)


@pytest.mark.parametrize("gate", [0.0, 0.5, 1.0])
def test_stop_gradient_keeps_the_token_loss_from_the_latents(make_objective, run, gate: float):
    """With the hidden loss alone shaping the latents, the token loss changes no gradient of them by one bit."""
    found = []
    for token_weight in (0.0, 1.0):
        objective = make_objective(reconstruction="hidden", token_weight=token_weight)
        found.append(gradients(objective, run(objective, gate).total))
    for name in ("latent_encoder", "latent_decoder", "transformer"):
        assert torch.equal(found[0][name], found[1][name])
        assert found[1][name].any() or name == "transformer"
    assert not found[0]["token_decoder"].any()
    assert found[1]["token_decoder"].any()


def test_lifted_stop_gradient_adds_the_token_losses_gradient(make_objective, run):
    objective = make_objective(reconstruction="hidden+token")
    losses = run(objective)
    parts = [gradients(objective, loss) for loss in (losses.hidden, losses.token, losses.diffusion)]
    total = gradients(objective, losses.total)
    for name in PARTS:
        torch.testing.assert_close(total[name], sum(part[name] for part in parts), rtol=1e-4, atol=1e-6)


def test_gate_changes_gradients_and_not_values(make_objective, run):
    objective = make_objective()
    values, diffusion_gradients = [], {}
    for gate in (0.0, 0.25, 0.5, 1.0):
        losses = run(objective, gate)
        values.append([float(value.detach().sum()) for value in vars(losses).values()])
        diffusion_gradients[gate] = gradients(objective, losses.diffusion)
    assert values[0] == values[1] == values[2] == values[3]

    # shut: exactly nothing reaches the encoder, while the denoiser learns as ever
    assert not diffusion_gradients[0.0]["latent_encoder"].any()
    for gate, found in diffusion_gradients.items():
        torch.testing.assert_close(found["transformer"], diffusion_gradients[1.0]["transformer"], rtol=0, atol=0)
        expected = gate * diffusion_gradients[1.0]["latent_encoder"]
        torch.testing.assert_close(found["latent_encoder"], expected, rtol=1e-4, atol=1e-9)
    assert diffusion_gradients[1.0]["latent_encoder"].any()


def record_output(module: nn.Module) -> list:
    recorded: list = []
    module.register_forward_hook(lambda _, __, output: recorded.append(output))
    return recorded


def test_noisy_input_and_target_both_carry_the_gradient(make_objective, run):
    """Against a computation by hand: d/dz mean (f(alpha z + sigma eps) - z)^2, its two paths apart."""
    objective = make_objective(self_conditioning_probability=0.0)
    recorded = record_output(objective.latent_encoder)
    losses = run(objective)
    latents = recorded[0].latents
    (found,) = torch.autograd.grad(losses.diffusion, latents, retain_graph=True)

    generator = torch.Generator().manual_seed(0)
    torch.randn(latents.shape, generator=generator)  # the decoder's noise
    noise = torch.randn(latents.shape, generator=generator)
    alpha, sigma = (c[:, None, None] for c in objective.scheduler.marginal(TIMESTEPS))
    by_path = {}
    for path in ("input", "target", "both"):
        z = latents.detach().requires_grad_()
        noisy = alpha * (z if path != "target" else z.detach()) + sigma * noise
        target = z if path != "input" else z.detach()
        per_example = (objective.transformer(noisy, TIMESTEPS).sample - target).square().mean((1, 2))
        torch.testing.assert_close(per_example, losses.diffusion_per_example)
        (by_path[path],) = torch.autograd.grad(per_example.mean(), z)
    torch.testing.assert_close(found, by_path["both"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(by_path["input"] + by_path["target"], by_path["both"], rtol=1e-4, atol=1e-7)
    assert by_path["input"].abs().max() > 1e-4
    assert by_path["target"].abs().max() > 1e-4


def test_values_are_those_of_the_equations(make_objective, run, random_tokens):
    """Eq. 1–4 computed by hand from the components and the same noise."""
    objective = make_objective(self_conditioning_probability=1.0, decoder_noise=0.7)
    losses = run(objective)
    input_ids, generator = random_tokens(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        hidden_states = objective.token_encoder(input_ids).hidden_states
        latents = objective.latent_encoder(hidden_states).latents
        noisy = latents + 0.7 * torch.randn(latents.shape, generator=generator)
        predicted = objective.latent_decoder(noisy).hidden_states
        logits = objective.token_decoder(predicted).logits
        alpha, sigma = (c[:, None, None] for c in objective.scheduler.marginal(TIMESTEPS))
        noisy_latents = alpha * latents + sigma * torch.randn(latents.shape, generator=generator)
        first = objective.transformer(noisy_latents, TIMESTEPS).sample
        second = objective.transformer(noisy_latents, TIMESTEPS, first).sample
    torch.testing.assert_close(losses.hidden, (predicted - hidden_states).square().mean())
    log_probabilities = logits.log_softmax(-1).gather(-1, input_ids[..., None])
    torch.testing.assert_close(losses.token, -log_probabilities.mean())
    torch.testing.assert_close(losses.token_accuracy, (logits.argmax(-1) == input_ids).float().mean())
    torch.testing.assert_close(losses.diffusion_per_example, (second - latents).square().mean((1, 2)))
    torch.testing.assert_close(losses.diffusion, losses.diffusion_per_example.mean())
    torch.testing.assert_close(losses.latent_std, latents.std())


def record_calls(transformer: nn.Module) -> list[tuple]:
    """Latents, times and self-condition of every call of the denoiser, and whether it had a graph."""
    calls: list[tuple] = []
    transformer.register_forward_pre_hook(lambda _, inputs: calls.append((*inputs, torch.is_grad_enabled())))
    return calls


def test_self_conditioning_is_drawn_for_half_of_the_examples_and_runs_on_those_only(make_objective, random_tokens):
    objective = make_objective(self_conditioning_probability=0.5)
    calls = record_calls(objective.transformer)
    input_ids, timesteps = random_tokens(16), torch.linspace(0.1, 0.9, 16)
    drawn = torch.zeros(16)
    for seed in range(20):
        calls.clear()
        objective(input_ids, timesteps, generator=torch.Generator().manual_seed(seed))
        (first_latents, first_times, first_grad), (latents, times, self_condition, second_grad) = calls
        assert (first_grad, second_grad) == (False, True)
        assert torch.equal(times, timesteps)
        chosen = self_condition.flatten(1).any(1)
        assert len(first_latents) == int(chosen.sum())
        assert torch.equal(first_latents, latents[chosen])
        assert torch.equal(first_times, timesteps[chosen])
        with torch.no_grad():
            estimate = objective.transformer(first_latents, first_times).sample
        torch.testing.assert_close(self_condition[chosen], estimate)
        assert not self_condition.requires_grad
        assert int(chosen.sum()) == 8
        drawn += chosen
    assert drawn.min() > 0
    assert drawn.max() < 20


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_systematic_sample_spreads_evenly_and_favours_none(probability: float):
    offsets = [(place + 0.5) / 1000 for place in range(1000)]
    draws = torch.tensor([systematic_sample(24, probability, offset) for offset in offsets]).double()
    torch.testing.assert_close(draws.mean(0), torch.full((24,), probability).double(), atol=2e-3, rtol=0)
    for length in (1, 4, 8, 24):
        counts = draws.unfold(1, length, 1).sum(-1)
        assert counts.max() - counts.min() <= 1
        assert (counts - probability * length).abs().max() < 1


def test_each_example_has_the_same_losses_alone_and_in_any_batch(make_objective, random_tokens):
    objective = make_objective()
    input_ids, gate, choice = random_tokens(), 1.0, [True, False, True]

    def losses(rows: list[int]):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        drawn = [choice[row] for row in rows]
        return objective(input_ids[rows], TIMESTEPS[rows], gate, generators, drawn)

    together = losses([0, 1, 2])
    alone = [losses([row]) for row in range(3)]
    torch.testing.assert_close(together.diffusion_per_example, torch.cat([one.diffusion_per_example for one in alone]))
    for name in ("total", "hidden", "token", "diffusion", "token_accuracy"):
        torch.testing.assert_close(getattr(together, name), sum(getattr(one, name) for one in alone) / 3)
    assert not torch.allclose(losses([2, 1, 0]).diffusion_per_example, together.diffusion_per_example)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, [3]), (1.0, [3, 3])])
def test_self_conditioning_never_and_always(make_objective, run, probability: float, expected: list[int]):
    objective = make_objective(self_conditioning_probability=probability)
    calls = record_calls(objective.transformer)
    run(objective)
    assert [len(call[0]) for call in calls] == expected
    assert bool(calls[-1][2].any()) == (probability == 1)


def test_every_rank_calls_the_denoiser_equally_often(make_objective, random_tokens):
    """Where none was drawn, one example stands in: sharded weights are gathered by all ranks or by none."""
    objective = make_objective(self_conditioning_probability=1e-9)
    calls = record_calls(objective.transformer)
    objective(random_tokens(), TIMESTEPS, generator=torch.Generator().manual_seed(0))
    assert [len(call[0]) for call in calls] == [1, 3]
    assert not calls[-1][2].any()


def test_denoiser_still_learns_under_autocast(make_objective, run):
    """Weights that the first pass casts without a graph must not serve the pass that is trained."""
    objective = make_objective(self_conditioning_probability=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = run(objective)
    losses.total.backward()
    for part in ALL_TRAINABLE:
        for name, parameter in getattr(objective, part).named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{part}.{name}"


def test_losses_are_float32_under_autocast(make_objective, run):
    objective = make_objective()
    expected = run(objective)
    with torch.autocast("cpu", torch.bfloat16):
        losses = run(objective)
    for name, value in vars(losses).items():
        assert value.dtype == torch.float32, name
    for name in ("total", "hidden", "token", "diffusion", "latent_std"):
        torch.testing.assert_close(getattr(losses, name), getattr(expected, name), rtol=0.05, atol=0)


def test_decoder_noise(make_objective, run):
    """delta = 0 decodes the latents as they are; the noise on the decoder's input grows with delta."""
    received = {}
    for delta in (0.0, 1.0, 3.0):
        objective = make_objective(decoder_noise=delta)
        latents = record_output(objective.latent_encoder)
        inputs: list[torch.Tensor] = []
        objective.latent_decoder.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        run(objective)
        received[delta] = inputs[0] - latents[0].latents
    assert not received[0.0].any()
    assert received[1.0].std().item() == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(received[3.0], 3 * received[1.0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("share", "rows"), [(1.0, 8), (0.5, 4), (0.3, 3), (0.01, 1)])
def test_token_share(make_objective, random_tokens, share: float, rows: int):
    objective = make_objective(token_share=share)
    decoded = record_output(objective.token_decoder)
    latents = record_output(objective.latent_decoder)
    losses = objective(random_tokens(8), torch.full((8,), 0.5))
    assert decoded[0].logits.shape == (rows, 8, 40)
    with torch.no_grad():
        expected = objective.token_decoder(latents[0].hidden_states[:rows]).logits
    cross_entropy = nn.functional.cross_entropy(expected.flatten(0, 1), random_tokens(8)[:rows].flatten())
    torch.testing.assert_close(losses.token.detach(), cross_entropy)


def test_without_token_decoder(make_objective, run):
    losses = run(make_objective(without=("token_decoder",)))
    assert losses.token.item() == 0
    assert losses.token_accuracy.isnan()
    torch.testing.assert_close(losses.total, losses.hidden + losses.diffusion)


def test_same_generator_same_losses(make_objective, run):
    objective = make_objective()
    assert torch.equal(run(objective).total, run(objective).total)
    assert not torch.equal(run(objective).total, run(objective, seed=1).total)


def test_int32_token_ids(make_objective, random_tokens):
    objective = make_objective()
    losses = [
        objective(ids, TIMESTEPS, generator=torch.Generator().manual_seed(0)).total
        for ids in (random_tokens(), random_tokens().int())
    ]
    assert torch.equal(*losses)


def test_gradient_checkpointing_leaves_the_gradients_as_they_are(make_objective, run):
    objective = make_objective(reconstruction="hidden+token")
    expected = gradients(objective, run(objective, 0.3).total)
    objective.transformer.enable_gradient_checkpointing()
    for name in ("latent_encoder", "latent_decoder", "token_decoder"):
        getattr(objective, name).gradient_checkpointing_enable()
    objective.train()
    found = gradients(objective, run(objective, 0.3).total)
    for name in PARTS:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_training_mode_leaves_the_token_encoder_frozen(make_objective):
    objective = make_objective().train()
    assert not objective.token_encoder.training
    assert objective.latent_encoder.training
    assert not any(parameter.requires_grad for parameter in objective.token_encoder.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reconstruction": "pixels"}, "reconstruction='pixels'.*hidden, token, hidden.token"),
        ({"decoder_noise": -1.0}, "decoder_noise=-1.0"),
        ({"decoder_noise": float("nan")}, "decoder_noise=nan"),
        ({"self_conditioning_probability": 1.5}, "self_conditioning_probability=1.5"),
        ({"token_share": 0.0}, "token_share=0.0"),
        ({"token_share": 1.5}, "token_share=1.5"),
        ({"token_weight": -1.0}, "token_weight=-1.0"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0"),
        ({"diffusion_weight": float("nan")}, "diffusion_weight=nan"),
    ],
)
def test_bad_settings_name_setting_and_value(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        JointObjectiveSettings(**settings)


@pytest.mark.parametrize("reconstruction", ["hidden", "hidden+token"])
def test_scratch_with_the_hidden_loss_is_refused(make_objective, reconstruction: str):
    with pytest.raises(ValueError, match=r"scratch.*collapses.*reconstruction='token'"):
        make_objective(representation="scratch", reconstruction=reconstruction)


@pytest.mark.parametrize("reconstruction", ["token", "hidden+token"])
def test_a_token_loss_needs_a_token_decoder(make_objective, reconstruction: str):
    with pytest.raises(ValueError, match="token decoder"):
        make_objective(reconstruction=reconstruction, without=("token_decoder",))


def test_unfitted_token_encoder_is_refused(make_components, backbone_folders):
    unfitted = LDLMTokenEncoder.from_backbone(str(backbone_folders["gpt2"]))
    objective = JointObjective(**(make_components() | {"token_encoder": unfitted}))
    with pytest.raises(ValueError, match="fit_statistics"):
        objective(torch.zeros(2, 8, dtype=torch.long), torch.rand(2))


LATENT_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "sequence_length": 8,
    "num_latents": 6,
    "latent_size": 16,
    "token_hidden_size": 32,
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("latent_encoder", {"token_hidden_size": 20}, "hidden_size=32.*token_hidden_size=20"),
        ("latent_decoder", {"token_hidden_size": 20}, "hidden_size=32.*latent decoder token_hidden_size=20"),
        ("latent_encoder", {"sequence_length": 9}, "sequence_length=9.*sequence_length=8"),
        ("latent_decoder", {"num_latents": 7}, "num_latents=6.*num_latents=7.*sample_size=6"),
        ("latent_decoder", {"latent_size": 12}, "latent_size=16.*latent_size=12.*in_channels=16"),
        ("token_decoder", {"vocab_size": 50}, "vocab_size=40.*vocab_size=50"),
        ("token_decoder", {"token_hidden_size": 20}, "token decoder token_hidden_size=20"),
        ("transformer", {"sample_size": 7}, "num_latents=6.*sample_size=7"),
        ("transformer", {"in_channels": 12}, "latent_size=16.*in_channels=12"),
    ],
)
def test_parts_that_do_not_fit_are_named(make_components, name: str, changes: dict, message: str):
    makers = {
        "latent_encoder": lambda: LDLMLatentEncoder(LDLMLatentEncoderConfig(**(LATENT_SIZES | changes))),
        "latent_decoder": lambda: LDLMLatentDecoder(LDLMLatentDecoderConfig(**(LATENT_SIZES | changes))),
        "token_decoder": lambda: LDLMTokenDecoder(
            LDLMTokenDecoderConfig(
                **({"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 0, "token_hidden_size": 32} | changes)
            )
        ),
        "transformer": lambda: LDLMTransformer1DModel(
            **({"in_channels": 16, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12} | changes)
            | ({} if "sample_size" in changes else {"sample_size": 6})
        ),
    }
    with pytest.raises(ValueError, match=message):
        JointObjective(**(make_components() | {name: makers[name]()}))


def test_sequences_longer_than_the_language_model_are_refused_at_once(make_components):
    """The tiny GPT-2 has 16 positions."""
    sizes = LATENT_SIZES | {"sequence_length": 17}
    longer = {
        "latent_encoder": LDLMLatentEncoder(LDLMLatentEncoderConfig(**sizes)),
        "latent_decoder": LDLMLatentDecoder(LDLMLatentDecoderConfig(**sizes)),
    }
    with pytest.raises(ValueError, match=r"sequence_length=17.*max_position_embeddings=16"):
        JointObjective(**(make_components() | longer))
