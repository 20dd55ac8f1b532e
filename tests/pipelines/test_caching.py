"""diffusers' caches of what blocks computed at earlier steps, on both denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig

from ldlm_hf import LDLMTransformer1DModel, MDLMScheduler, TokenDiffusionPipeline, TokenDiffusionTransformer


STEPS = 6


@pytest.fixture(params=["ldlm", "token diffusion"])
def pipe(request: pytest.FixtureRequest, make_pipeline: Callable, tiny_tokenizer: Any, randomize: Callable) -> Any:
    if request.param == "ldlm":
        return make_pipeline()
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    transformer = randomize(TokenDiffusionTransformer(len(tiny_tokenizer), **sizes).eval(), 0.5)
    pipe = TokenDiffusionPipeline(transformer, MDLMScheduler(), tiny_tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, num_inference_steps=STEPS, generator=generator, output_type="seq", **arguments).sequences


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_nothing_is_reused_below_the_threshold(pipe: Any) -> None:
    expected = sample(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(sample(pipe), expected)
    pipe.transformer.disable_cache()
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(sample(pipe), expected)


def test_blocks_are_left_out_above_it_and_each_call_begins_anew(pipe: Any) -> None:
    first, second = (count_calls(block.attention) for block in pipe.transformer.blocks)
    sample(pipe)
    assert len(first) == len(second)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    first.clear(), second.clear()
    once = sample(pipe)
    assert len(first) > 2 and len(second) == 1
    assert torch.equal(sample(pipe), once)
    assert len(second) == 2


def test_guided_steps_have_a_state_of_their_own(make_pipeline: Callable) -> None:
    """The first step has no self-condition, so it makes one prediction, and the others two."""
    pipe = make_pipeline()
    (second,) = (count_calls(block.attention) for block in pipe.transformer.blocks[1:])
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    sample(pipe, self_condition_scale=3.0)
    assert len(second) == 2


def test_one_block_has_nothing_to_leave_out() -> None:
    transformer = LDLMTransformer1DModel(8, num_layers=1, num_attention_heads=2, attention_head_dim=12, sample_size=5)
    with pytest.raises(ValueError, match="needs two"):
        transformer.enable_cache(FirstBlockCacheConfig())
