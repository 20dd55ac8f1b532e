from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.utils._python_dispatch import TorchDispatchMode

from ldlm_hf import LDLMTransformer1DModel
from ldlm_hf.models.layers import DiffusionTransformerBlock


def make_transformer(**settings) -> LDLMTransformer1DModel:
    torch.manual_seed(0)
    sizes = {"in_channels": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "sample_size": 5}
    return LDLMTransformer1DModel(**(sizes | settings))


def test_starts_by_predicting_zero_with_identity_blocks():
    transformer = make_transformer()
    outputs: list[tuple] = []
    for block in transformer.blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append((inputs[0], output)))
    sample = transformer(torch.randn(3, 5, 8), torch.rand(3)).sample
    assert torch.equal(sample, torch.zeros(3, 5, 8))
    assert len(outputs) == 2
    for before, after in outputs:
        assert torch.equal(before, after)


def test_one_time_for_the_batch_equals_the_same_time_for_each(randomize):
    transformer = randomize(make_transformer())
    latents = torch.randn(3, 5, 8)
    expected = transformer(latents, torch.full((3,), 0.3)).sample
    times = (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=torch.float64), 0.3, np.float32(0.3))
    for timestep in times:
        torch.testing.assert_close(transformer(latents, timestep).sample, expected, rtol=1e-5, atol=1e-5)


def test_times_may_lie_on_another_device():
    """The meta device stands for a GPU."""
    transformer = make_transformer(next_timestep_conditioning=True).to("meta")
    times = torch.tensor([0.3, 0.8])
    sample = transformer(torch.empty(2, 5, 8, device="meta"), times, next_timestep=times / 2).sample
    assert sample.device.type == "meta"


def test_no_self_condition_means_zeros(randomize):
    transformer = randomize(make_transformer())
    latents, timesteps = torch.randn(3, 5, 8), torch.rand(3)
    without = transformer(latents, timesteps).sample
    assert torch.equal(without, transformer(latents, timesteps, torch.zeros_like(latents)).sample)
    assert not torch.allclose(without, transformer(latents, timesteps, torch.ones_like(latents)).sample, atol=1e-3)


def test_time_embedding_is_sinusoids_of_a_thousand_times_t():
    transformer = make_transformer()
    recorded: list[torch.Tensor] = []
    transformer.time_embedder.register_forward_pre_hook(lambda _, inputs: recorded.append(inputs[0]))
    transformer(torch.randn(2, 5, 8), torch.tensor([0.0, 0.37]))
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    angles = 1000 * torch.tensor([0.0, 0.37])[:, None] * frequencies
    torch.testing.assert_close(recorded[0], torch.cat([angles.cos(), angles.sin()], dim=-1), rtol=1e-4, atol=1e-4)


def test_near_times_are_told_apart_in_bfloat16(randomize):
    """Sinusoids are taken before the cast: in bfloat16 the times 0.899 and 0.900 would be one."""
    transformer = randomize(make_transformer()).to(torch.bfloat16)
    latents = torch.randn(1, 5, 8, dtype=torch.bfloat16)
    one, other = (transformer(latents, torch.tensor([t])).sample for t in (0.899, 0.9))
    assert not torch.equal(one, other)


def test_positions_and_bidirectional_attention(randomize):
    transformer = randomize(make_transformer())
    latents, timesteps = torch.randn(1, 5, 8), torch.rand(1)
    sample = transformer(latents, timesteps).sample
    assert not torch.allclose(transformer(latents.flip(1), timesteps).sample.flip(1), sample, atol=1e-3)
    changed = latents.clone()
    changed[0, -1] += 1
    assert ((transformer(changed, timesteps).sample - sample).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("timestep", [torch.rand(2), torch.rand(4), torch.rand(0)])
def test_wrong_number_of_times(timestep: torch.Tensor):
    with pytest.raises(ValueError, match=r"timestep of shape .* 3 samples"):
        make_transformer()(torch.zeros(3, 5, 8), timestep)


def test_wrong_self_condition():
    with pytest.raises(ValueError, match=r"self_condition of shape \(3, 5, 9\).*\(3, 5, 8\)"):
        make_transformer()(torch.zeros(3, 5, 8), torch.rand(3), torch.zeros(3, 5, 9))


def test_compile_repeated_blocks_compiles_the_block_once(randomize):
    transformer = randomize(make_transformer())
    latents, timesteps = torch.randn(3, 5, 8), torch.rand(3)
    expected = transformer(latents, timesteps).sample
    expected.sum().backward()
    gradient = transformer.proj_in.weight.grad.clone()

    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph

    transformer.zero_grad()
    transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    found = transformer(latents, timesteps).sample
    found.sum().backward()
    assert len(graphs) == 1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(transformer.proj_in.weight.grad, gradient)
    assert transformer._repeated_blocks == [DiffusionTransformerBlock.__name__]


def test_layerwise_casting_keeps_what_is_sensitive(randomize):
    transformer = randomize(make_transformer())
    latents, timesteps = torch.randn(3, 5, 8), torch.rand(3)
    expected = transformer(latents, timesteps).sample
    transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert transformer.blocks[0].attention.to_qkv.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].modulation.linear.weight.dtype == torch.float32
    assert transformer.time_embedder.linear_1.weight.dtype == torch.float32
    torch.testing.assert_close(transformer(latents, timesteps).sample, expected, rtol=0.1, atol=0.1)


def kernels_of(transformer: LDLMTransformer1DModel) -> set[str]:
    """Names of the operators that a call dispatches."""
    names: set[str] = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():
        transformer(torch.randn(3, 5, 8), torch.rand(3))
    return names


def test_attention_backend_is_that_of_this_model(randomize):
    """diffusers' dispatcher, by its own names; "_native_math" is attention written out, and runs on every device."""
    transformer, other = randomize(make_transformer()), make_transformer()
    latents, timesteps = torch.randn(3, 5, 8), torch.rand(3)
    expected = transformer(latents, timesteps).sample
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert fused in kernels_of(transformer)
    active = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        transformer.set_attention_backend("_native_math")
        assert fused not in kernels_of(transformer)
        assert fused in kernels_of(other)
        torch.testing.assert_close(transformer(latents, timesteps).sample, expected, rtol=1e-5, atol=1e-5)
        compiled = torch.compile(transformer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(latents, timesteps).sample, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="nonsense"):
            transformer.set_attention_backend("nonsense")
        transformer.reset_attention_backend()
        assert fused in kernels_of(transformer)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


def test_guidance_changes_nothing_at_the_start_and_everything_later(randomize):
    transformer = make_transformer(guidance_embeds=True)
    latents, times = torch.randn(2, 5, 8), torch.tensor([0.3, 0.6])
    torch.nn.init.normal_(transformer.proj_out.weight)

    def predict(guidance: float | torch.Tensor | None, rows: slice = slice(None)) -> torch.Tensor:
        return transformer(latents[rows], times[rows], latents[rows], guidance=guidance).sample

    assert torch.equal(predict(None), predict(3.0))
    randomize(transformer)
    torch.testing.assert_close(predict(None), predict(1.0))
    apart = [predict(2.0, slice(0, 1)), predict(4.0, slice(1, 2))]
    torch.testing.assert_close(predict(torch.tensor([2.0, 4.0])), torch.cat(apart))
    assert not torch.allclose(predict(2.0), predict(1.0))


def test_guidance_for_a_model_that_was_not_trained_for_it():
    with pytest.raises(ValueError, match="guidance_embeds=True"):
        make_transformer()(torch.randn(1, 5, 8), 0.5, guidance=2.0)
