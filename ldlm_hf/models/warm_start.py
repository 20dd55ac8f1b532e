"""Starts the denoiser's blocks from those of a pretrained language model, which become bidirectional (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .layers import DiffusionTransformerBlock
from .transformer_ldlm import LDLMTransformer1DModel


@dataclass
class PretrainedBlock:
    """A language model's block in the denoiser's terms; matrices are (out, in), as those of `nn.Linear`.

    Attributes:
        linears: weight and bias of the projections to queries, keys and values in one, from attention, and of the
            feed-forward's two layers, by their names in [`DiffusionTransformerBlock`].
        norms: weight and bias of the norms that attention and feed-forward read.
    """

    linears: dict[str, tuple[torch.Tensor, torch.Tensor]]
    norms: tuple[nn.LayerNorm, nn.LayerNorm]


def bert_blocks(backbone: PreTrainedModel) -> list[PretrainedBlock]:
    """Blocks whose norms follow their sums: each reads the norm of the one before."""
    blocks: list[PretrainedBlock] = []
    norm = backbone.embeddings.LayerNorm
    for layer in backbone.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output
        projections = (attention.query, attention.key, attention.value)
        blocks.append(
            PretrainedBlock(
                linears={
                    "attention.to_qkv": (
                        torch.cat([one.weight for one in projections]),
                        torch.cat([one.bias for one in projections]),
                    ),
                    "attention.to_out": (output.dense.weight, output.dense.bias),
                    "feed_forward.linear_in": (layer.intermediate.dense.weight, layer.intermediate.dense.bias),
                    "feed_forward.linear_out": (layer.output.dense.weight, layer.output.dense.bias),
                },
                norms=(norm, output.LayerNorm),
            )
        )
        norm = layer.output.LayerNorm
    return blocks


def gpt2_blocks(backbone: PreTrainedModel) -> list[PretrainedBlock]:
    """Blocks whose norms come before what reads them, as the denoiser's do; matrices are (in, out) there."""
    return [
        PretrainedBlock(
            linears={
                "attention.to_qkv": (layer.attn.c_attn.weight.T, layer.attn.c_attn.bias),
                "attention.to_out": (layer.attn.c_proj.weight.T, layer.attn.c_proj.bias),
                "feed_forward.linear_in": (layer.mlp.c_fc.weight.T, layer.mlp.c_fc.bias),
                "feed_forward.linear_out": (layer.mlp.c_proj.weight.T, layer.mlp.c_proj.bias),
            },
            norms=(layer.ln_1, layer.ln_2),
        )
        for layer in backbone.h
    ]


READERS = {"bert": bert_blocks, "gpt2": gpt2_blocks}


@torch.no_grad()
def start_from_language_model(transformer: LDLMTransformer1DModel, backbone: PreTrainedModel) -> None:
    """Gives the denoiser's blocks the weights of a language model's last ones, their gates open.

    A norm's weight and bias become the start of what the time makes of them.
    """
    blocks = READERS[backbone.config.model_type](backbone)[-len(transformer.blocks) :]
    for block, pretrained in zip(transformer.blocks, blocks, strict=True):
        assert isinstance(block, DiffusionTransformerBlock)
        for name, (weight, bias) in pretrained.linears.items():
            linear = cast(nn.Linear, block.get_submodule(name))
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        one = torch.ones_like(pretrained.norms[0].weight)
        parts = [part for norm in pretrained.norms for part in (norm.bias, norm.weight - 1, one)]
        block.modulation.linear.bias.copy_(torch.cat(parts))
