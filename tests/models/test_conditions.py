"""What is given knows nothing of what is written: not a bit of its latents changes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from ldlm_hf import LDLMLatentEncoder, LDLMLatentEncoderConfig, LDLMTokenEncoder, LDLMTransformer1DModel
from ldlm_hf.models.conditions import Conditions
from ldlm_hf.models.layers import attend, attend_by_products


LENGTH, WIDTH, VOCAB_SIZE = 8, 32, 40
GIVEN = torch.tensor(
    [
        [1, 1, 1, 0, 0, 0, 0, 0],  # a prefix
        [0, 0, 0, 0, 0, 1, 1, 1],  # a suffix
        [0, 1, 0, 0, 1, 1, 0, 1],  # gaps
        [0, 0, 0, 0, 0, 0, 0, 0],  # nothing
        [1, 1, 1, 1, 1, 1, 1, 1],  # everything
    ]
).bool()


@pytest.fixture(params=["gpt2", "llama", "bert"])
def backbone(request: pytest.FixtureRequest, backbone_folders: dict[str, Path]) -> str:
    return str(backbone_folders[request.param])


@pytest.fixture
def make_encoders(backbone: str, random_tokens: Callable, randomize: Callable) -> Callable[..., tuple[Any, Any]]:
    def make(architecture: str = "perceiver", prefix: bool = True, **kwargs: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        token_encoder = LDLMTokenEncoder.from_backbone(backbone, prefix=prefix, **kwargs)
        if token_encoder.config.representation != "scratch":
            token_encoder.fit_statistics([random_tokens(8, seed=1)])
        config = LDLMLatentEncoderConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            sequence_length=LENGTH,
            num_latents=LENGTH,
            latent_size=6,
            token_hidden_size=WIDTH,
            architecture=architecture,
        )
        return token_encoder, randomize(LDLMLatentEncoder(config)).eval()

    return make


@torch.no_grad()
def encode(encoders: tuple[Any, Any], input_ids: torch.Tensor, conditions: Conditions | None) -> torch.Tensor:
    """Latents (B, N, d_z)."""
    mask = None if conditions is None else conditions.attention_mask()
    token_encoder, latent_encoder = encoders
    hidden_states = token_encoder(input_ids, attention_mask=mask).hidden_states
    return latent_encoder(hidden_states.to(latent_encoder.dtype), attention_mask=mask).latents


def other_tokens(input_ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Token ids that are others at each of these places."""
    return torch.where(where, (input_ids - 2 + 7) % (VOCAB_SIZE - 2) + 2, input_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("architecture", ["perceiver", "self_attention"])
def test_latents_of_given_tokens_do_not_change_with_written_ones(
    make_encoders: Callable, random_tokens: Callable, architecture: str, prefix: bool, dtype: torch.dtype
):
    encoders = [part.to(dtype) for part in make_encoders(architecture, prefix)]
    input_ids, conditions = random_tokens(len(GIVEN)), Conditions(GIVEN)
    latents = encode(encoders, input_ids, conditions)
    changed = encode(encoders, other_tokens(input_ids, ~GIVEN), conditions)
    assert torch.equal(latents[GIVEN], changed[GIVEN])
    assert not torch.equal(latents[~GIVEN], changed[~GIVEN])
    # without the mask they would have seen it
    unmasked = [encode(encoders, ids, None) for ids in (input_ids, other_tokens(input_ids, ~GIVEN))]
    assert not torch.equal(unmasked[0][GIVEN], unmasked[1][GIVEN])


@pytest.mark.parametrize("architecture", ["perceiver", "self_attention"])
def test_written_tokens_see_what_is_given(make_encoders: Callable, random_tokens: Callable, architecture: str):
    encoders, input_ids, given = make_encoders(architecture), random_tokens(2), GIVEN[[0, 2]]
    latents = encode(encoders, input_ids, Conditions(given))
    changed = encode(encoders, other_tokens(input_ids, given), Conditions(given))
    for row in range(2):
        assert (latents[row, ~given[row]] != changed[row, ~given[row]]).any(-1).all()


@pytest.mark.parametrize("prefix", [True, False])
def test_dropped_rows_know_nothing_of_what_is_given(make_encoders: Callable, random_tokens: Callable, prefix: bool):
    encoders, input_ids = make_encoders(prefix=prefix), random_tokens(4)
    conditions = Conditions(GIVEN[:4], dropped=torch.tensor([True, True, True, False]))
    latents = encode(encoders, input_ids, conditions)
    changed = encode(encoders, other_tokens(input_ids, GIVEN[:4]), conditions)
    assert torch.equal(latents[~GIVEN[:4]], changed[~GIVEN[:4]])
    of_denoiser = conditions.of_denoiser(latents)
    assert not of_denoiser["given_latents"].any()
    assert torch.equal(of_denoiser["given"], GIVEN[:4])


@pytest.mark.parametrize("architecture", ["perceiver", "self_attention"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_which_nothing_or_everything_is_given_is_encoded_as_ever(
    make_encoders: Callable, random_tokens: Callable, architecture: str, attention: str
):
    encoders, input_ids = make_encoders(architecture), random_tokens(2)
    encoders[0].set_attn_implementation(attention)
    latents = encode(encoders, input_ids, Conditions(GIVEN[[3, 4]]))
    torch.testing.assert_close(latents, encode(encoders, input_ids, None), rtol=1e-4, atol=1e-5)


def test_eager_attention_hides_the_same(make_encoders: Callable, random_tokens: Callable):
    encoders, input_ids, conditions = make_encoders(), random_tokens(len(GIVEN)), Conditions(GIVEN)
    fused = encode(encoders, input_ids, conditions)
    encoders[0].set_attn_implementation("eager")
    torch.testing.assert_close(encode(encoders, input_ids, conditions), fused, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("representation", ["embedding", "scratch"])
def test_embeddings_need_no_mask(make_encoders: Callable, random_tokens: Callable, representation: str):
    encoders, input_ids = make_encoders(representation=representation, prefix=False), random_tokens(len(GIVEN))
    latents = encode(encoders, input_ids, Conditions(GIVEN))
    changed = encode(encoders, other_tokens(input_ids, ~GIVEN), Conditions(GIVEN))
    assert torch.equal(latents[GIVEN], changed[GIVEN])


def test_attention_that_heeds_masks_is_told_from_one_that_does_not(make_encoders: Callable):
    token_encoder, _ = make_encoders()
    token_encoder.check_masks()
    for module in token_encoder.backbone.modules():
        if hasattr(module, "is_causal"):
            module.register_forward_pre_hook(
                lambda _, arguments, kwargs: (arguments, kwargs | {"attention_mask": None}), with_kwargs=True
            )
    with pytest.raises(ValueError, match="does not heed masks"):
        token_encoder.check_masks()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_backbones_that_heed_masks_are_taken(
    make_encoders: Callable, randomize: Callable, tiny_tokenizer: Any, tmp_path: Path, attention: str
):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=32, pad_token_id=1, **sizes)
    randomize(RobertaForMaskedLM(config)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    for token_encoder in (make_encoders()[0], LDLMTokenEncoder.from_backbone(str(tmp_path))):
        token_encoder.set_attn_implementation(attention)
        token_encoder.check_masks()


def test_backbones_that_cannot_take_masks_say_so(randomize: Callable, tiny_tokenizer: Any, tmp_path: Path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    local = MistralConfig(
        vocab_size=VOCAB_SIZE, sliding_window=4, num_key_value_heads=1, intermediate_size=64, **sizes
    )
    opt = OPTConfig(vocab_size=VOCAB_SIZE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32, **sizes)
    for name, model in (("local", MistralForCausalLM(local)), ("opt", OPTForCausalLM(opt))):
        randomize(model).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="part of a text can be given"):
            LDLMTokenEncoder.from_backbone(str(tmp_path / name)).check_masks()


def test_masks_of_another_type_or_shape_are_refused(make_encoders: Callable, random_tokens: Callable):
    token_encoder, latent_encoder = make_encoders()
    input_ids, mask = random_tokens(2), Conditions(GIVEN[:2]).attention_mask()
    hidden_states = token_encoder(input_ids).hidden_states
    for wrong in (mask.float(), mask[0], mask[:1], mask[:, :4]):
        with pytest.raises(ValueError, match="attention_mask must be bool"):
            token_encoder(input_ids, attention_mask=wrong)
        with pytest.raises(ValueError, match="attention_mask must be bool"):
            latent_encoder(hidden_states, attention_mask=wrong)


def test_a_denoiser_that_is_told_nothing_has_a_gradient_for_all(denoiser: LDLMTransformer1DModel):
    """Or DDP would wait for the one of its roles."""
    denoiser(torch.randn(2, LENGTH, 6), 0.5).sample.sum().backward()
    assert denoiser.given_embedding.grad is not None and not denoiser.given_embedding.grad.any()


def test_a_latent_has_to_belong_to_a_token():
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "token_hidden_size": 8}
    encoder = LDLMLatentEncoder(LDLMLatentEncoderConfig(**sizes, sequence_length=8, num_latents=4))
    with pytest.raises(ValueError, match="num_latents=4 for sequence_length=8"):
        encoder(torch.zeros(5, 8, 8), attention_mask=Conditions(GIVEN).attention_mask())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_attention_is_attention_to_what_is_left(dtype: torch.dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 3, LENGTH, 4).to(dtype) for _ in range(3))
    mask = torch.rand(1, LENGTH, LENGTH) < 0.5
    mask |= torch.eye(LENGTH, dtype=torch.bool)
    masked = attend(query, key, value, mask)
    for i in range(LENGTH):
        seen = mask[0, i]
        alone = attend(query[:, :, i : i + 1], key[:, :, seen], value[:, :, seen])
        torch.testing.assert_close(masked[:, i : i + 1], alone, rtol=2e-2, atol=2e-2)
    by_products = attend_by_products(query, key, value, mask[:, None]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(by_products, masked, rtol=2e-2, atol=2e-2)


@pytest.fixture
def denoiser(randomize: Callable) -> LDLMTransformer1DModel:
    torch.manual_seed(0)
    sizes = {"in_channels": 6, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    return randomize(LDLMTransformer1DModel(**sizes, sample_size=LENGTH, role_embeds=True))


def test_denoiser_keeps_what_is_given_and_sees_no_noise_there(denoiser: LDLMTransformer1DModel):
    torch.manual_seed(1)
    noisy, clean, estimate, other = (torch.randn(len(GIVEN), LENGTH, 6) for _ in range(4))
    arguments = {"given": GIVEN, "given_latents": clean * GIVEN[..., None]}
    sample = denoiser(noisy, 0.5, estimate, **arguments).sample
    assert torch.equal(sample[GIVEN], clean[GIVEN])
    place = GIVEN[..., None]
    elsewhere = denoiser(torch.where(place, other, noisy), 0.5, torch.where(place, other, estimate), **arguments)
    assert torch.equal(elsewhere.sample, sample)
    assert not torch.equal(denoiser(noisy, 0.5, estimate).sample[0, 3:], sample[0, 3:])


def test_role_changes_nothing_at_the_start_of_training():
    torch.manual_seed(0)
    sizes = {"in_channels": 6, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    denoiser = LDLMTransformer1DModel(**sizes, role_embeds=True)
    assert not denoiser.given_embedding.any()
    assert LDLMTransformer1DModel(**sizes).given_embedding is None


def test_denoiser_refuses_conditions_that_do_not_fit(denoiser: LDLMTransformer1DModel):
    noisy = torch.randn(len(GIVEN), LENGTH, 6)
    for given, latents in ((GIVEN, None), (GIVEN.float(), noisy), (GIVEN[:, :4], noisy), (GIVEN, noisy[:1])):
        with pytest.raises(ValueError, match="given must be bool"):
            denoiser(noisy, 0.5, given=given, given_latents=latents)
    plain = LDLMTransformer1DModel(**{**denoiser.config, "role_embeds": False})
    with pytest.raises(ValueError, match="role_embeds=True"):
        plain(noisy, 0.5, given=GIVEN, given_latents=noisy)
