"""What transformers and diffusers expect of any model: first values, outputs, attention and checkpointing by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldlm_hf import (
    LDLMLatentDecoder,
    LDLMLatentEncoder,
    LDLMTokenEncoder,
    LDLMTransformer1DModel,
)


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
        config = components["token_encoder"].config.to_diff_dict() | {"representation": name, "backbone_config": None}
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
