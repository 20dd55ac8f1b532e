"""Each building block against its formula, written out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldlm_hf.models import layers
from ldlm_hf.models.layers import (
    AdaLayerNormModulation,
    DiffusionTransformerBlock,
    PerceiverAttention,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    modulate,
)


def rms_normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def head_by_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for each head, by loops."""
    heads = []
    for q, k, v in zip(*(part.chunk(num_heads, dim=-1) for part in (query, key, value)), strict=True):
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        heads.append(weights @ v)
    return torch.cat(heads, dim=-1)


def per_head(x: torch.Tensor, weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    return torch.cat([rms_normed(part, weight) for part in x.chunk(num_heads, dim=-1)], dim=-1)


def test_rms_norm(randomize):
    torch.manual_seed(0)
    norm, x = randomize(RMSNorm(12)), torch.randn(2, 3, 12)
    torch.testing.assert_close(norm(x), rms_normed(x, norm.weight))


def test_rms_norm_has_the_type_of_its_input():
    norm = RMSNorm(12)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(torch.ones(2, 12, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("qk_norm", [False, True])
def test_self_attention(randomize, qk_norm: bool):
    torch.manual_seed(0)
    attention, x = randomize(SelfAttention(12, 3, bias=True, qk_norm=qk_norm)), torch.randn(2, 5, 12)
    query, key, value = attention.to_qkv(x).chunk(3, dim=-1)
    if qk_norm:
        query = per_head(query, attention.norm_q.weight, 3)
        key = per_head(key, attention.norm_k.weight, 3)
    expected = attention.to_out(head_by_head(query, key, value, 3))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def test_perceiver_attention(randomize):
    """Queries from the latents; keys and values of context and latents from projections of their own."""
    torch.manual_seed(0)
    attention = randomize(PerceiverAttention(12, 3))
    latents, context = torch.randn(2, 4, 12), torch.randn(2, 7, 12)
    normed_latents = rms_normed(latents, attention.norm_latents.weight)
    normed_context = rms_normed(context, attention.norm_context.weight)
    to_q, latents_to_k, latents_to_v = attention.latents_to_qkv.weight.chunk(3)
    context_to_k, context_to_v = attention.context_to_kv.weight.chunk(2)
    query = per_head(normed_latents @ to_q.T, attention.norm_q.weight, 3)
    key = torch.cat([normed_latents @ latents_to_k.T, normed_context @ context_to_k.T], dim=1)
    key = per_head(key, attention.norm_k.weight, 3)
    value = torch.cat([normed_latents @ latents_to_v.T, normed_context @ context_to_v.T], dim=1)
    expected = head_by_head(query, key, value, 3) @ attention.to_out.weight.T
    torch.testing.assert_close(attention(latents, context), expected, rtol=1e-5, atol=1e-5)
    assert not any("bias" in name for name, _ in attention.named_parameters())


def test_swiglu():
    torch.manual_seed(0)
    layer, x = SwiGLU(8, 16), torch.randn(2, 3, 8)
    gate, up = layer.linear_in.weight.chunk(2)
    hidden = (x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(layer(x), hidden @ layer.linear_out.weight.T)


def test_modulate():
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(modulate(x, shift, scale), (1 + scale) * normed + shift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_for_the_batch_modulates_as_one_for_each_sample(dtype: torch.dtype):
    torch.manual_seed(0)
    x, shift, scale = (torch.randn(shape, dtype=dtype) for shape in ((3, 5, 8), (1, 1, 8), (1, 1, 8)))
    leaves = [tensor.double().requires_grad_() for tensor in (x, shift, scale)]
    expected = modulate(leaves[0], leaves[1].expand(3, 1, 8), leaves[2].expand(3, 1, 8))
    found = modulate(*leaves)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(one, other)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(modulate(x, shift, scale).double(), expected, rtol=tolerance, atol=tolerance)
    mixed = modulate(x.float(), shift.bfloat16(), scale.bfloat16())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), expected, rtol=3e-2, atol=3e-2)


def test_modulation_has_one_row_a_time(randomize):
    torch.manual_seed(0)
    modulation, embedding = randomize(AdaLayerNormModulation(8, 6)), torch.randn(3, 8)
    parts = modulation(embedding)
    assert [part.shape for part in parts] == 6 * [torch.Size([3, 1, 8])]
    expected = F.silu(embedding) @ modulation.linear.weight.T + modulation.linear.bias
    torch.testing.assert_close(torch.cat(parts, dim=-1)[:, 0], expected)


def test_diffusion_block_with_closed_gates_is_the_identity():
    torch.manual_seed(0)
    block, x = DiffusionTransformerBlock(12, 3, 24), torch.randn(2, 5, 12)
    nn.init.zeros_(block.modulation.linear.weight)
    nn.init.zeros_(block.modulation.linear.bias)
    assert torch.equal(block(x, torch.randn(2, 12)), x)


def test_diffusion_block(randomize):
    torch.manual_seed(0)
    block, x, embedding = randomize(DiffusionTransformerBlock(12, 3, 24)), torch.randn(2, 5, 12), torch.randn(2, 12)
    parts = block.modulation(embedding)
    expected = x + parts[2] * block.attention(modulate(x, parts[0], parts[1]))
    hidden = block.feed_forward.linear_in(modulate(expected, parts[3], parts[4]))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    expected = expected + parts[5] * block.feed_forward.linear_out(hidden)
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-5, atol=1e-5)


class KernelNames(TorchDispatchMode):
    """Collects the names of the operators that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["no bfloat16", "AVX512-BF16", "AMX"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What torch says of the processor; attention computes the same on each."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param != "no bfloat16")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: request.param == "AMX")
    choices = (layers.products_beat_fused_attention, layers.transposed_weights_are_faster)
    for choice in choices:
        choice.cache_clear()
    yield request.param
    for choice in choices:
        choice.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_written_as_products_where_they_are_faster(processor: str, dtype: torch.dtype):
    query, key, value = torch.randn(3, 2, 3, 7, 16, dtype=dtype)
    with torch.no_grad(), KernelNames() as kernels:
        for _ in range(3):
            layers.attend(query, key, value)
    by_products = processor == "AVX512-BF16" and dtype == torch.bfloat16
    assert ("bmm" in kernels.names) == by_products
    assert any("scaled_dot_product" in name for name in kernels.names) != by_products
    # the processor is asked once
    assert layers.products_beat_fused_attention.cache_info().misses == (dtype == torch.bfloat16)


def test_compiled_attention_is_the_fused_one(processor: str):
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    query, key, value = torch.randn(3, 2, 3, 7, 16).bfloat16()
    torch.compile(layers.attend, backend=backend, fullgraph=True)(query, key, value)
    (graph,) = graphs
    functions = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert F.scaled_dot_product_attention in functions
    assert torch.bmm not in functions
    assert layers.products_beat_fused_attention.cache_info().misses == 0


def test_a_weight_lies_transposed_at_inference_where_that_is_faster(processor: str, make_components, tmp_path):
    model = make_components()["latent_decoder"].bfloat16()
    latents = torch.randn(2, 6, 16).bfloat16()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model(latents).hidden_states.sum().backward()
    linear = model.mapper.layers[0].feed_forward.linear_in
    assert linear.weight.is_contiguous(), "training leaves it as it is"
    with torch.no_grad():
        expected = F.linear(latents.new_ones(3, 24), linear.weight, linear.bias)
        model(latents)
        torch.testing.assert_close(linear(latents.new_ones(3, 24)), expected)
    assert linear.weight.is_contiguous() == (processor != "AMX")
    assert linear.weight.t().is_contiguous() == (processor == "AMX")
    # values, shapes, gradients, saved files and moves are those of any linear layer
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    model(latents).hidden_states.sum().backward()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    assert model.float().mapper.layers[0].feed_forward.linear_in.weight.dtype == torch.float32


def test_a_denoiser_with_transposed_weights_is_saved(processor: str, make_components, tmp_path):
    model = make_components()["transformer"].bfloat16()
    with torch.no_grad():
        expected = model(torch.randn(2, 6, 16).bfloat16(), torch.tensor(0.5)).sample
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert expected.isfinite().all()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize("scores_at_once", [1, 150, 10**6])
@pytest.mark.parametrize("num_keys", [5, 12])
def test_bfloat16_attention_on_the_cpu_is_attention(
    monkeypatch: pytest.MonkeyPatch, processor: str, num_keys: int, scores_at_once: int
) -> None:
    monkeypatch.setattr(layers, "SCORES_AT_ONCE", scores_at_once)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, length, 16).bfloat16().requires_grad_() for length in (7, num_keys, num_keys)]
    exact_inputs = [part.detach().double().requires_grad_() for part in inputs]
    attended = layers.attend(*inputs)
    exact = F.scaled_dot_product_attention(*exact_inputs).transpose(1, 2).flatten(2)
    assert attended.shape == (2, 7, 48)
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(attended.double(), exact, rtol=0.03, atol=0.03)
    with torch.no_grad():
        assert torch.equal(layers.attend(*inputs), attended)
    gradient = torch.randn(2, 7, 48)
    attended.backward(gradient.bfloat16())
    exact.backward(gradient.double())
    for part, exact_part in zip(inputs, exact_inputs, strict=True):
        torch.testing.assert_close(part.grad.double(), exact_part.grad, rtol=0.03, atol=0.03)
