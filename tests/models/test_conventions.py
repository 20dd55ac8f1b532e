"""What transformers and diffusers expect of any model: first values, outputs, attention and checkpointing by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ldlm_hf import JointObjective, LDLMLatentDecoder, LDLMLatentEncoder, LDLMTokenEncoder, LDLMTransformer1DModel


# 1. First values


VARIANTS = [
    "latent_encoder",
    "latent_decoder",
    "identity",
    "token_decoder",
    "transformer",
    "gpt2",
    "bert",
    "llama",
    "embedding",
    "scratch",
]


@pytest.fixture(params=VARIANTS)
def make_fresh(
    request: pytest.FixtureRequest, make_components: Callable[..., dict[str, Any]], backbone_folders: dict[str, Path]
) -> Callable[[], nn.Module]:
    """Builds a model from nothing but its configuration; the variants between them hold every buffer there is."""
    name = request.param
    components = make_components()
    if name in backbone_folders:
        config = LDLMTokenEncoder.from_backbone(str(backbone_folders[name])).config
        return lambda: LDLMTokenEncoder(config)
    if name in ("embedding", "scratch"):
        config = components["token_encoder"].config.to_diff_dict()
        config |= {"representation": name, "backbone_config": None, "prefix_token_id": None}
        return lambda: LDLMTokenEncoder(LDLMTokenEncoder.config_class(**config))
    if name == "transformer":
        settings = dict(components["transformer"].config) | {"next_timestep_conditioning": True}
        return lambda: LDLMTransformer1DModel.from_config(settings)
    model = components["latent_encoder" if name == "identity" else name]
    config = model.config
    if name != "token_decoder":
        config.standardize_latents = True
    if name == "identity":
        config.architecture, config.num_latents, config.latent_size = "identity", 8, 32
    return lambda: type(model)(config)


def test_every_weight_and_buffer_has_its_first_value_after_to_empty(make_fresh: Callable[[], nn.Module]):
    fresh = make_fresh()
    with torch.device("meta"):
        model = make_fresh()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    if isinstance(model, LDLMTransformer1DModel):
        model.initialize_weights()
    else:
        model.init_weights()
    buffers = dict(model.named_buffers())
    for name, expected in fresh.named_buffers():
        assert torch.equal(buffers[name], expected), name
    for name, parameter in model.named_parameters():
        assert not parameter.numel() or (parameter != 7).all(), name


@pytest.mark.parametrize("model_class", [LDLMLatentEncoder, LDLMLatentDecoder])
def test_latents_of_another_width_start_without_statistics(
    make_components: Callable[..., dict[str, Any]], tmp_path: Path, model_class: type
):
    (model,) = [one for one in make_components().values() if type(one) is model_class]
    model.set_latent_statistics(torch.full((16,), 3.0), torch.full((16,), 5.0))
    model.save_pretrained(tmp_path)
    kept = model_class.from_pretrained(tmp_path)
    assert torch.equal(kept.latents_mean, torch.full((16,), 3.0))
    assert torch.equal(kept.latents_std, torch.full((16,), 5.0))
    other = model_class.from_pretrained(tmp_path, latent_size=12, ignore_mismatched_sizes=True)
    assert torch.equal(other.latents_mean, torch.zeros(12))
    assert torch.equal(other.latents_std, torch.ones(12))


# 2. Outputs


OF_TRANSFORMERS = ["token_encoder", "latent_encoder", "latent_decoder", "token_decoder"]


@pytest.fixture(params=OF_TRANSFORMERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, make_components: Callable[..., dict[str, Any]]) -> Any:
    return make_components()[name]


@pytest.fixture
def inputs(name: str, random_tokens: Callable[..., torch.Tensor]) -> torch.Tensor:
    shapes = {"latent_encoder": (3, 8, 32), "latent_decoder": (3, 6, 16), "token_decoder": (3, 8, 32)}
    return random_tokens() if name == "token_encoder" else torch.randn(shapes[name])


def test_return_dict_is_that_of_the_configuration(model: Any, inputs: torch.Tensor, tmp_path: Path):
    expected = model(inputs)
    assert isinstance(expected, ModelOutput)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, return_dict=False).train(model.training)
    assert isinstance(model(inputs), tuple)
    assert torch.equal(model(inputs)[0], expected[0])
    assert isinstance(model(inputs, return_dict=True), ModelOutput)
    model.config.return_dict = True
    assert isinstance(model(inputs), ModelOutput)
    assert isinstance(model(inputs, return_dict=False), tuple)


def test_training_and_pipeline_ask_for_the_outputs_that_they_read(
    make_components: Callable[..., dict[str, Any]], make_pipeline: Callable, random_tokens: Callable
):
    components = make_components()
    for name in OF_TRANSFORMERS:
        components[name].config.return_dict = False
    components["token_encoder"].backbone.config.return_dict = False
    pipe = make_pipeline(**components)
    assert pipe(num_inference_steps=2, output_type="seq").sequences.shape == (1, 8)
    latents = pipe.encode(["w2 w3 w4 w5 w6 w7 w8 w9"])
    assert len(pipe.decode(latents)) == 1
    assert torch.isfinite(JointObjective(**components)(random_tokens(), torch.rand(3)).total)


@pytest.mark.parametrize("name", OF_TRANSFORMERS[1:])
@pytest.mark.parametrize("output", ["output_attentions", "output_hidden_states"])
def test_outputs_that_there_are_not_are_refused(model: Any, inputs: torch.Tensor, output: str):
    with pytest.raises(TypeError, match=output):
        model(inputs, **{output: True})
    model = type(model)(type(model.config)(**model.config.to_diff_dict() | {output: True}))
    with pytest.raises(ValueError, match=f"{output}=True.*{type(model).__name__}.*False"):
        model(inputs)


# 3. Attention


@pytest.mark.parametrize("name", OF_TRANSFORMERS[1:])
def test_models_with_one_attention_refuse_others(model: Any, tmp_path: Path):
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='eager'.*'sdpa'"):
        type(model).from_pretrained(tmp_path, attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'.*'sdpa'"):
        model.set_attn_implementation("eager")


# 4. Gradient checkpointing


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("trained", ["latent_encoder", "latent_decoder", "token_decoder", "transformer"])
def test_checkpointing_trains_layers_whose_input_needs_no_gradient(
    make_components: Callable[..., dict[str, Any]], randomize: Callable, trained: str, use_reentrant: bool | None
):
    """As where the layers alone are trained, or at the token decoder's usual widths, where nothing precedes them."""
    model = randomize(make_components()[trained]).train().requires_grad_(False)
    (stack,) = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stack.requires_grad_(True)
    width = {"latent_decoder": (3, 6, 16), "transformer": (3, 6, 16)}.get(trained, (3, 8, 32))
    inputs = [torch.randn(width)] + [torch.rand(3)] * (trained == "transformer")

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(*inputs)[0].square().sum().backward()
        return [parameter.grad for parameter in stack.parameters()]

    expected = gradients()
    if trained == "transformer":
        how = None if use_reentrant is None else partial(checkpoint, use_reentrant=use_reentrant)
        model.enable_gradient_checkpointing(how)
    else:
        model.gradient_checkpointing_enable(None if use_reentrant is None else {"use_reentrant": use_reentrant})
    for found, gradient in zip(gradients(), expected, strict=True):
        assert found is not None
        assert torch.equal(found, gradient)


def test_the_frozen_model_has_nothing_to_checkpoint(make_components: Callable[..., dict[str, Any]]):
    with pytest.raises(ValueError, match="does not support"):
        make_components()["token_encoder"].gradient_checkpointing_enable()
