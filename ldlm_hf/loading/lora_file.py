"""What a LoRA adapter's file holds, `pytorch_lora_weights.safetensors` in diffusers' layout, and what it may.

diffusers builds an adapter from what a file's metadata say: regular expressions, ranks, modules to import. Here the
tensors alone decide which layers have an adapter and of which rank, metadata give its scale, and anything else that
would change what a layer computes is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from .safe_loading import MAX_JSON_DEPTH, is_of_peft, nested_settings, read_header


# of `load_lora_weights`: where a file is
LORA_SOURCE_ARGUMENTS = (
    "weight_name",
    "subfolder",
    "use_safetensors",
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
)
LORA_TENSOR = re.compile(
    r"(?P<layer>\w+(\.\w+)*)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector)"
)
LORA_LAYER_PATTERN = re.compile(r"\^?\w+(\.\w+)*")
# fields of peft's LoraConfig that say how large an adapter is beside its weights, what tensors show anyway, and what
# counts in training only
LORA_SCALES = ("r", "lora_alpha", "alpha_pattern", "use_rslora")
LORA_UNREAD_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_bias",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
    }
)


# 1. Reading a file


def find_lora(source: str | os.PathLike[str], arguments: Mapping[str, Any]) -> Path:
    """The local file of an adapter: `source` itself, or in its folder or repository on the Hub `weight_name`, which is
    `pytorch_lora_weights.safetensors` by default.

    Raises:
        ValueError: another kind of file than safetensors is asked for.
        OSError: there is no such file.
    """
    name = arguments.get("weight_name") or LORA_WEIGHT_NAME_SAFE
    path = Path(source)
    for asked in (name, path.name if path.is_file() else name):
        if arguments.get("use_safetensors") is False or not asked.endswith(".safetensors"):
            raise ValueError(
                f"{asked}: adapters are loaded from safetensors only, since pickled weights can run any code; leave "
                "use_safetensors out, and name a .safetensors file."
            )
    subfolder = arguments.get("subfolder") or ""
    if not path.exists() and str(source).count("/") > 1:
        raise OSError(f"{path}: there is no such folder or file, and a repository on the Hub is OWNER/NAME.")
    if not path.exists():
        hub = {key: value for key, value in arguments.items() if key not in LORA_SOURCE_ARGUMENTS[:3]}
        return Path(hf_hub_download(str(source), name, subfolder=subfolder or None, **hub))
    file = path if path.is_file() else path / subfolder / name
    if not file.is_file():
        raise OSError(f"{file}: there is no such file; name that of the adapter by weight_name.")
    return file


def read_lora(
    source: str | os.PathLike[str] | dict[str, torch.Tensor], arguments: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Tensors and metadata of an adapter's file, or of a dictionary of tensors, which has none.

    Raises:
        ValueError: no safetensors, or metadata that are no JSON object.
        OSError: there is no such file.
    """
    if isinstance(source, dict):
        return dict(source), None
    file = find_lora(source, arguments)
    read_header(file)
    with safe_open(file, framework="pt") as tensors:
        text = (tensors.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    return load_file(file), None if text is None else parse_metadata(text, file)


def parse_metadata(text: str, file: Path) -> dict[str, Any]:
    """A JSON object of bounded depth."""
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {LORA_ADAPTER_METADATA_KEY} is not valid JSON: {error}") from error
    if not isinstance(metadata, dict) or any(depth > MAX_JSON_DEPTH for _, _, depth in nested_settings(metadata)):
        raise ValueError(f"{file}: {LORA_ADAPTER_METADATA_KEY}={reprlib.repr(metadata)} must be a flat JSON object.")
    return metadata


def with_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values whose names begin with a prefix and a dot, without these."""
    return {key.removeprefix(f"{prefix}."): value for key, value in values.items() if key.startswith(f"{prefix}.")}


# 2. What it would make of a model


def lora_config(
    model: nn.Module, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Arguments of peft's LoraConfig for an adapter of a model; names are those within the model.

    Raises:
        ValueError: tensors that fit no linear layer of it, or metadata of another kind of adapter.
    """
    ranks: dict[str, int] = {}
    parts: dict[str, set[str]] = {}
    for name, tensor in weights.items():
        match = LORA_TENSOR.fullmatch(name)
        layer = None if match is None else find_linear(model, match["layer"])
        if match is None or layer is None:
            raise ValueError(
                f"{reprlib.repr(name)} is no LoRA weight of a linear layer of {type(model).__name__}; those are named "
                "LAYER.lora_A.weight and LAYER.lora_B.weight, as save_lora_weights writes them."
            )
        parts.setdefault(match["layer"], set()).add(match["part"])
        if match["part"] == "lora_A.weight":
            ranks[match["layer"]] = tensor.shape[0] if tensor.ndim else 0
    for name, found in parts.items():
        if not found >= {"lora_A.weight", "lora_B.weight"}:
            raise ValueError(f"{name} lacks one of lora_A.weight and lora_B.weight; an adapter has both.")
        layer = find_linear(model, name)
        assert layer is not None
        shapes = {
            "lora_A.weight": (ranks[name], layer.in_features),
            "lora_B.weight": (layer.out_features, ranks[name]),
            "lora_B.bias": (layer.out_features,),
            "lora_magnitude_vector": (layer.out_features,),
        }
        for part in found:
            shape = tuple(weights[f"{name}.{part}"].shape)
            if shape != shapes[part] or not ranks[name]:
                raise ValueError(
                    f"{name}.{part} of shape {shape} does not fit the layer, where it has the shape {shapes[part]}: "
                    "the adapter is of another model."
                )
    alphas, use_rslora = lora_alphas(ranks, metadata)
    rank, alpha = most_common(ranks), most_common(alphas)
    every_part = set().union(*parts.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{layer}": value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{layer}": value for layer, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "use_rslora": use_rslora,
        "use_dora": "lora_magnitude_vector" in every_part,
        "lora_bias": "lora_B.bias" in every_part,
    }


def find_linear(model: nn.Module, name: str) -> nn.Linear | None:
    """A linear layer of a model by its name, or that within an adapter's layer; None for what is none."""
    layer = model
    for part in name.split("."):
        child = getattr(layer, part, None)
        if not isinstance(child, nn.Module) or is_of_peft(layer):
            return None
        layer = child
    layer = base_layer(layer) or layer
    return layer if isinstance(layer, nn.Linear) else None


def base_layer(layer: Any) -> nn.Module | None:
    """The layer that adapters have wrapped; None for one without any."""
    return layer.get_base_layer() if is_of_peft(layer) and hasattr(layer, "get_base_layer") else None


def most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def lora_alphas(ranks: Mapping[str, int], metadata: Mapping[str, Any] | None) -> tuple[dict[str, float], bool]:
    """alpha of each layer's adapter, whose scale is alpha / r, and whether it is alpha / sqrt r instead.

    Without metadata alpha is the rank, as in diffusers.

    Raises:
        ValueError: metadata of adapters that compute something else than LoRA does.
    """
    if metadata is None:
        return dict(ranks), False
    for key, value in metadata.items():
        allowed = {
            "peft_type": ("LORA",),
            "bias": ("none",),
            # the others change the layer's own weights
            "init_lora_weights": (True, False, "gaussian", "orthogonal"),
        }.get(key)
        is_known = value in allowed if allowed else key in LORA_SCALES or key in LORA_UNREAD_FIELDS or not value
        if not is_known:
            raise ValueError(
                f"The adapter's metadata have {key}={reprlib.repr(value)}, which is not of a plain LoRA; train it "
                "without that."
            )
    alpha: Any = metadata.get("lora_alpha")
    pattern = metadata.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(LORA_LAYER_PATTERN.fullmatch(name) for name in pattern):
        raise ValueError(
            f"The adapter's metadata have alpha_pattern={reprlib.repr(pattern)}; names of layers are due."
        )
    for value in [alpha, *pattern.values()]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(
                f"The adapter's metadata have alpha={reprlib.repr(value)}, which must be a finite number."
            )

    def alpha_of(layer: str) -> float:
        for name, value in pattern.items():
            if layer == name.removeprefix("^") or layer.endswith(f".{name}"):
                return value
        return alpha

    return {layer: alpha_of(layer) for layer in ranks}, metadata.get("use_rslora") is True
