"""What the token encoder does to a language model of transformers: keeps its first blocks, leaves masks out, and makes
room for a token before the text."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AttentionInterface,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward


UNMASKED_ATTENTION = "ldlm_unmasked"


def language_model_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """A language model's configuration from its settings; ValueError if transformers has no language model of their
    `model_type`. Others may load further models, of their own choice, when they are built."""
    model_type = settings.get("model_type")
    config_class = CONFIG_MAPPING[model_type] if model_type in list(CONFIG_MAPPING) else None
    is_language_model = config_class in MODEL_FOR_CAUSAL_LM_MAPPING or config_class in MODEL_FOR_MASKED_LM_MAPPING
    if config_class is None or not is_language_model:
        raise ValueError(
            f"backbone_config: model_type={model_type!r} is no causal or masked language model of this version of "
            "transformers."
        )
    return config_class(**{key: value for key, value in settings.items() if key != "model_type"})


def leave_out_masks(backbone: PreTrainedModel) -> None:
    """Replaces torch's fused attention by the same without a mask, where a mask would say nothing."""
    if backbone.config._attn_implementation == "sdpa" and needs_no_mask(backbone.config):
        AttentionInterface.register(UNMASKED_ATTENTION, attend_without_own_mask)
        backbone.set_attn_implementation(UNMASKED_ATTENTION)


def needs_no_mask(backbone_config: PretrainedConfig) -> bool:
    """Whether all layers attend to everything, or everything before: without padding, then, no mask says more."""
    layer_types = getattr(backbone_config, "layer_types", None) or ["full_attention"]
    return set(layer_types) == {"full_attention"} and getattr(backbone_config, "sliding_window", None) is None


def attend_without_own_mask(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA over (B, H, L, D/H), causal where the language model is, or with the mask that it was called with.

    For the attentions that it knows, transformers first looks for packed sequences among the positions. A look at
    values waits until an accelerator has done everything that was queued; for this attention it does not look, and
    makes no mask.
    """
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def is_causal(backbone: PreTrainedModel) -> bool:
    """Whether a language model's tokens attend to those before them only."""
    return any(getattr(module, "is_causal", False) for module in backbone.modules())


def language_model_mask(
    backbone: PreTrainedModel, attention_mask: torch.Tensor, has_prefix: bool, dtype: torch.dtype
) -> torch.Tensor:
    """A mask (B, L, L) as a language model's attention takes it, (B, 1, L, L); with a prefix L is one more there.

    A prefix is seen by all tokens, and sees the tokens that all of them see, so that it hands nothing on that was
    hidden.

    Raises:
        ValueError: a language model whose attention takes no such mask.
    """
    implementation = backbone.config._attn_implementation
    if not needs_no_mask(backbone.config) or implementation not in ("eager", "sdpa", UNMASKED_ATTENTION):
        raise ValueError(
            f"attention_mask: {type(backbone).__name__} has layers that attend to their neighbourhood only, or the "
            f"attention {implementation!r}, so no part of a text can be given. Use a backbone whose layers attend to "
            "everything, or everything before, with the attention 'sdpa' or 'eager'."
        )
    if has_prefix:
        seen_by_all = attention_mask.all(1)  # (B, L)
        attention_mask = F.pad(attention_mask, (1, 0, 1, 0), value=True)
        attention_mask[:, 0, 1:] = seen_by_all
    if is_causal(backbone):
        attention_mask = attention_mask.tril()
    attention_mask = attention_mask[:, None]
    if implementation == "eager":
        # it adds the mask to its scores
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)
    return attention_mask


def find_blocks(backbone: PreTrainedModel, num_blocks: int) -> tuple[nn.Module, nn.ModuleList]:
    """The list of a language model's blocks, and the module that it belongs to."""
    for owner in backbone.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == num_blocks:
                return owner, child
    raise ValueError(
        f"{type(backbone).__name__} holds no list of {num_blocks} blocks, so it cannot serve as a token encoder."
    )


def cut_config(backbone_config: PretrainedConfig, num_blocks: int) -> dict[str, Any]:
    """The configuration of the same language model with its first `num_blocks` blocks only."""
    cut = copy.deepcopy(backbone_config)
    cut.num_hidden_layers = num_blocks
    if getattr(cut, "layer_types", None) is not None:
        cut.layer_types = cut.layer_types[:num_blocks]
    cut.use_cache = False
    config = cut.to_dict()
    # the weights have been unpacked by now, and where they lay on this machine is nobody's business
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    return config


def drop_parts_behind_blocks(backbone: PreTrainedModel, apply_final_norm: bool) -> None:
    """Drops a language model's pooler, and its final norm unless that is asked for."""
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    if not apply_final_norm:
        owner, _ = find_blocks(backbone, backbone.config.num_hidden_layers)
        for name, child in owner.named_children():
            if "Norm" in type(child).__name__ and "embed" not in name:
                setattr(owner, name, nn.Identity())


def prefix_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text begins with: BOS or CLS, or end-of-text where the tokenizer has neither."""
    for token_id in (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        f"The tokenizer {tokenizer.name_or_path!r} has no token to put before the text (bos_token, cls_token or "
        "eos_token): give it one, or use prefix=False (model.prefix=false in training)."
    )


def position_table(backbone: PreTrainedModel) -> nn.Embedding | None:
    """The table of learned positions; None in a language model without one (rotary positions, ALiBi)."""
    for name, module in backbone.named_modules():
        last = name.rpartition(".")[2]
        # "wpe" in GPT-2 and its kin, "position_embeddings" or "embed_positions" in others
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last):
            return module
    return None


def longest_sequence(backbone: PreTrainedModel) -> int | None:
    """How many tokens a language model takes; None where nothing bounds it."""
    table = position_table(backbone)
    if table is None or table.padding_idx is None:
        return getattr(backbone.config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from behind the padding token's
    return table.num_embeddings - table.padding_idx - 1


def add_position(backbone: PreTrainedModel) -> None:
    """Makes room for one token more: the last two of the longest text share the last position of a learned table, what
    is computed ahead is computed one further, and rotary positions know no end."""
    table = position_table(backbone)
    if table is not None:
        table.weight = nn.Parameter(torch.cat([table.weight, table.weight[-1:]]), requires_grad=False)
        table.num_embeddings += 1
    add_position_to_config(backbone.config)


def add_position_to_config(config: PretrainedConfig) -> None:
    """The same in a language model's configuration."""
    is_bounded = getattr(config, "max_position_embeddings", None) is not None
    # some kinds of rotary positions depend on that number
    if is_bounded and getattr(config, "rope_parameters", None) is None:
        config.max_position_embeddings += 1
