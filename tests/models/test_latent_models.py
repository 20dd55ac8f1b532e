from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from ldlm_hf import LDLMLatentDecoder, LDLMLatentDecoderConfig, LDLMLatentEncoder, LDLMLatentEncoderConfig
from ldlm_hf.models.layers import PerceiverAttention


def make_encoder(seed: int = 0, **settings) -> LDLMLatentEncoder:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "sequence_length": 16,
        "num_latents": 16,
        "latent_size": 64,
        "token_hidden_size": 64,
    }
    return LDLMLatentEncoder(LDLMLatentEncoderConfig(**(sizes | settings)))


@pytest.mark.parametrize(("sequence_length", "num_latents"), [(16, 16), (16, 5), (5, 16), (16, 1)])
@pytest.mark.parametrize(("latent_size", "token_hidden_size"), [(64, 64), (24, 64), (64, 40), (24, 40)])
def test_perceiver_maps_any_length_and_width_to_any(
    sequence_length: int, num_latents: int, latent_size: int, token_hidden_size: int
):
    sizes = {
        "sequence_length": sequence_length,
        "num_latents": num_latents,
        "latent_size": latent_size,
        "token_hidden_size": token_hidden_size,
    }
    encoder = make_encoder(**sizes)
    decoder = LDLMLatentDecoder(LDLMLatentDecoderConfig(**encoder.config.to_diff_dict()))
    latents = encoder(torch.randn(2, sequence_length, token_hidden_size)).latents
    assert latents.shape == (2, num_latents, latent_size)
    assert decoder(latents).hidden_states.shape == (2, sequence_length, token_hidden_size)


def test_equal_widths_need_no_projection():
    encoder = make_encoder()
    assert isinstance(encoder.proj_in, nn.Identity)
    assert isinstance(encoder.proj_out, nn.Identity)
    assert isinstance(make_encoder(latent_size=8).proj_out, nn.Linear)


def test_self_attention_variant():
    encoder = make_encoder(architecture="self_attention")
    assert encoder.mapper.latents is None
    assert encoder(torch.randn(2, 16, 64)).latents.shape == (2, 16, 64)
    assert not any(isinstance(module, PerceiverAttention) for module in encoder.modules())


def test_self_attention_sees_positions_and_all_other_tokens():
    encoder = make_encoder(architecture="self_attention").eval()
    hidden_states = torch.randn(1, 16, 64)
    latents = encoder(hidden_states).latents
    reversed_latents = encoder(hidden_states.flip(1)).latents.flip(1)
    assert not torch.allclose(latents, reversed_latents, atol=1e-4)
    changed = hidden_states.clone()
    changed[0, 0] += 1
    assert ((encoder(changed).latents - latents).abs().amax(-1) > 0).all()


def test_output_has_no_norm():
    """The magnitude of the latents is free: scaling the last layer's output projections scales them without bound."""
    encoder = make_encoder()
    hidden_states = torch.randn(2, 16, 64)
    small = encoder(hidden_states).latents.std()
    with torch.no_grad():
        for layer in encoder.mapper.layers:
            layer.feed_forward.linear_out.weight.mul_(1000)
    assert encoder(hidden_states).latents.std() > 100 * small


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "conv"}, "architecture='conv'"),
        ({"architecture": "self_attention", "num_latents": 4}, "num_latents=4.*sequence_length=16"),
        ({"num_attention_heads": 5}, "num_attention_heads=5.*hidden_size=64"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        make_encoder(**settings)


def influence(encoder: LDLMLatentEncoder) -> torch.Tensor:
    """How much output i depends on input j: size of the gradient of random directions of output i, (N, L)."""
    torch.manual_seed(1)
    hidden_states = torch.randn(16, encoder.config.sequence_length, 64, requires_grad=True)
    latents = encoder(hidden_states).latents
    rows = []
    for i in range(encoder.config.num_latents):
        direction = torch.randn(16, 64)
        (gradient,) = torch.autograd.grad((latents[:, i] * direction).sum(), hidden_states, retain_graph=True)
        rows.append(gradient.square().sum((0, 2)).sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize("num_latents", [16, 8])
def test_aligned_queries_tie_output_i_to_input_i(num_latents: int):
    matching = torch.linspace(0, 15, num_latents).round().long()
    aligned = influence(make_encoder(num_latents=num_latents)).argmax(1)
    assert (aligned == matching).float().mean() >= 0.9
    independent = influence(make_encoder(num_latents=num_latents, aligned_queries=False)).argmax(1)
    assert (independent == matching).float().mean() <= 0.3


def test_aligned_queries_attend_most_to_their_own_input():
    encoder = make_encoder()
    attention = encoder.mapper.layers[0].attention
    recorded: dict[str, torch.Tensor] = {}
    attention.norm_q.register_forward_hook(lambda _, __, output: recorded.update(query=output))
    attention.norm_k.register_forward_hook(lambda _, __, output: recorded.update(key=output))
    encoder(torch.randn(32, 16, 64))
    weights = torch.softmax(recorded["query"] @ recorded["key"].transpose(-1, -2) / 32**0.5, dim=-1)
    to_context = weights[..., :16].mean((0, 1))  # (N, L)
    assert torch.equal(to_context.argmax(1), torch.arange(16))
    # at 16 keys an unaligned query would give each about 1/32
    assert to_context.diagonal().min() > 5 / 32


def test_loading_a_checkpoint_keeps_every_loaded_weight(tmp_path: Path, randomize):
    """Alignment is a start: it must not run over weights that were trained."""
    encoder = randomize(make_encoder(), 1.0)
    encoder.save_pretrained(tmp_path)
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded = LDLMLatentEncoder.from_pretrained(tmp_path)
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("missing", ["mapper.latents", "mapper.positions"])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path, missing: str):
    make_encoder().save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state[missing]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lack 1 tensors .*{missing}"):
        LDLMLatentEncoder.from_pretrained(tmp_path)


def test_plain_queries_start_at_the_configured_range():
    mapper = make_encoder(aligned_queries=False, initializer_range=0.02).mapper
    assert mapper.latents.std().item() == pytest.approx(0.02, rel=0.1)
    assert mapper.positions.std().item() == pytest.approx(0.02, rel=0.1)
