"""torch.compile: every trained model is one graph, forward and backward, and a run's steps bring no new ones.

The backends trace and differentiate as the default one does, but need no C++ compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional

from ldlm_hf import (
    DistillationObjective,
    JointObjective,
    JointObjectiveSettings,
    LDLMLatentEncoder,
    LDLMLatentEncoderConfig,
    LDLMTransformer1DModel,
)
from ldlm_hf.models import layers
from ldlm_hf.objective.flow_map import BY_STUDENT, BY_TEACHER, DIAGONAL
from ldlm_hf.training.components import compile_blocks


TRAINED = ("latent_encoder", "latent_decoder", "token_decoder", "transformer")
BATCH = 4


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    """Inputs of a component of `make_components`, with gradients where training has them."""
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(BATCH, 8, 32, generator=generator)
    latents = torch.randn(BATCH, 6, 16, generator=generator)
    return {
        "latent_encoder": (hidden_states,),
        "latent_decoder": (latents.requires_grad_(),),
        "token_decoder": (hidden_states,),
        "transformer": (latents.requires_grad_(), torch.rand(BATCH, generator=generator), latents.detach() / 2),
    }[name]


def output_and_gradients(module: nn.Module, call: Callable[..., Any], name: str, dtype: torch.dtype) -> list:
    inputs = inputs_of(name)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = call(*inputs)[0]
    output.float().square().mean().backward()
    gradients = [tensor.grad for tensor in (*module.parameters(), *inputs) if tensor.grad is not None]
    module.zero_grad()
    return [output.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRAINED)
def test_models_are_one_graph(
    make_components: Callable, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    # what is not compiled computes attention in bfloat16 by plain products on some processors, and rounds elsewhere
    monkeypatch.setattr(layers, "attend_by_products", functional.scaled_dot_product_attention)
    module = make_components()[name]
    expected = output_and_gradients(module, module, name, dtype)
    # fullgraph raises at a graph break
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    results = output_and_gradients(module, compiled, name, dtype)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(results) == len(expected) > len(list(module.parameters())) // 2
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == reference.dtype
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance)


def test_self_attention_encoder_is_one_graph() -> None:
    config = LDLMLatentEncoderConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        sequence_length=8,
        num_latents=8,
        latent_size=16,
        token_hidden_size=32,
        architecture="self_attention",
    )
    module = LDLMLatentEncoder(config)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled(*inputs_of("latent_encoder")).latents.sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_denoiser_in_its_training_passes(make_components: Callable) -> None:
    """Without gradient and self-condition on half the examples, then with both on all: two graphs, no more."""
    module = make_components()["transformer"]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(3):
        latents, timesteps, self_condition = inputs_of("transformer")
        with torch.no_grad():
            compiled(latents[::2], timesteps[::2])
        compiled(latents, timesteps, self_condition).sample.sum().backward()
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("batch_size", "probability", "checkpointing"),
    [(4, 0.5, False), (4, 0.5, True), (5, 0.5, False)],
)
def test_steps_bring_no_new_graphs(
    make_components: Callable,
    random_tokens: Callable[..., torch.Tensor],
    batch_size: int,
    probability: float,
    checkpointing: bool,
) -> None:
    """Ten steps with compiled blocks, as `loop.compile` compiles them.

    The examples with self-conditioning are drawn systematically: half of four is always two, and half of five is two
    or three, which is one graph more.
    """
    settings = JointObjectiveSettings(self_conditioning_probability=probability)
    objective = JointObjective(**make_components(), settings=settings).train()
    if checkpointing:
        objective.transformer.enable_gradient_checkpointing()
        objective.latent_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    num_blocks = 0
    for name in TRAINED:
        model = getattr(objective, name)
        for block in model.modules():
            if type(block).__name__ in model._repeated_blocks:
                block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
                num_blocks += 1
    assert num_blocks == 7
    generator = torch.Generator().manual_seed(0)
    numbers = []
    for step in range(10):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = objective(random_tokens(batch_size, seed=step), torch.rand(batch_size), generator=generator)
        losses.total.backward()
        numbers.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    if batch_size % 2 == 0:
        assert numbers == numbers[:1] * 10
    else:
        assert numbers[-1] == numbers[0] + 1
    # at most one graph for each way in which a layer is called, whatever the number of layers
    assert 4 <= numbers[0] <= 8


def test_distillation_with_other_numbers_of_each_target_in_every_step(
    make_components: Callable, random_tokens: Callable[..., torch.Tensor]
) -> None:
    """A batch of 16, of which 1 to 15 examples go after the teacher, as `loop.compile` compiles it; a size that is
    not known yet would be a graph of its own, and more than eight are refused."""
    parts = make_components()
    teacher = parts["transformer"]
    student = LDLMTransformer1DModel.from_config(
        teacher.config, self_conditioning=False, next_timestep_conditioning=True
    )
    objective = DistillationObjective(
        parts["token_encoder"], parts["latent_encoder"], student, teacher, parts["scheduler"], self_condition_scale=2.0
    )
    for module in objective.children():
        compile_blocks(module, objective.batch_sizes_vary, backend="aot_eager")
    times = torch.tensor([[0.9, 0.6, 0.3]]).repeat(16, 1)
    for by_teacher in range(1, 13):
        targets = [DIAGONAL] * 4 + [BY_TEACHER] * by_teacher + [BY_STUDENT] * (12 - by_teacher)
        objective(random_tokens(16, seed=by_teacher), times, targets).total.backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 16
