"""Saving a pipeline that has adapters: its weights without them, and each of them in a file beside.

peft is imported by name where it is needed. An `import` statement anywhere in a repository's code makes the loaders of
diffusers and transformers ask for the package, and sampling without adapters needs no peft.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import logging
from torch import nn

from .lora_file import base_layer, lora_config
from .safe_loading import check_adapters, is_of_peft


LORA_LOGGER = logging.get_logger(__name__)

# in `model_index.json`: adapter → the file beside it
LORA_INDEX_KEY = "_lora_weights"
LORA_NAME = re.compile(r"[\w-]+")


def adapted_components(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """Components with adapters that a pipeline can save, compiled or not, by their names."""
    for name in getattr(pipeline, "_lora_loadable_modules", ()):
        component = getattr(pipeline, name, None)
        component = getattr(component, "_orig_mod", component)
        if isinstance(component, PeftAdapterMixin) and any(map(is_of_peft, component.modules())):
            yield name, component


def adapters_to_save(name: str, model: Any) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Tensors and metadata of a model's adapters by their names, without those that are fused into its weights.

    Raises:
        ValueError: adapters that would not load again.
    """
    fused = {one for layer in model.modules() for one in getattr(layer, "merged_adapters", ())}
    found = {}
    for adapter, config in getattr(model, "peft_config", {}).items():
        if adapter in fused:
            continue
        weights = importlib.import_module("peft.utils").get_peft_model_state_dict(model, adapter_name=adapter)
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        try:
            if not LORA_NAME.fullmatch(adapter):
                raise ValueError("a file is named after it, so it must be letters, digits, - and _.")
            lora_config(model, weights, metadata)
        except ValueError as error:
            raise ValueError(f"The adapter {adapter!r} of {name} would not load again: {error}") from error
        found[adapter] = weights, metadata
    if not hasattr(model, "peft_config"):
        check_adapters(name, model)  # it does not say what they are
    return found


@contextmanager
def without_adapters(models: Iterable[nn.Module]) -> Iterator[None]:
    """Puts the layers that adapters have wrapped back into models, for as long as these are saved."""
    wrapped = [
        (parent, name, layer)
        for model in models
        for parent in model.modules()
        for name, layer in parent.named_children()
        if base_layer(layer) is not None and not is_of_peft(parent)
    ]
    try:
        for parent, name, layer in wrapped:
            setattr(parent, name, base_layer(layer))
        yield
    finally:
        for parent, name, layer in wrapped:
            setattr(parent, name, layer)


def lora_file_name(adapter: str, is_only_one: bool) -> str:
    """Where an adapter lies beside the `model_index.json` of its pipeline."""
    return LORA_WEIGHT_NAME_SAFE if is_only_one else LORA_WEIGHT_NAME_SAFE.replace(".", f"_{adapter}.")


def write_adapters(
    pipeline: Any, adapters: Mapping[str, Any], folder: Path, before: Mapping[str, str], is_variant: bool
) -> dict[str, str]:
    """Writes a pipeline's adapters into its folder; adapter → file, of those `before`, too, where other weights of the
    same pipeline are saved beside its first ones. No file is removed."""
    files = {name: lora_file_name(name, len(adapters) == 1) for name in adapters}
    for name, (weights, metadata) in adapters.items():
        pipeline.save_lora_weights(
            folder, weights, weight_name=files[name], transformer_lora_adapter_metadata=metadata
        )
    others = {name: file for name, file in before.items() if file not in files.values()}
    if others and not is_variant:
        LORA_LOGGER.warning(
            f"Adapters of the pipeline that was saved here before stay in their files, {', '.join(others.values())}: "
            "remove them if they do not belong to this one."
        )
    if files:
        LORA_LOGGER.warning(
            f"The adapters of this pipeline are saved in files of their own, and not loaded with it: after "
            f"from_pretrained, {loading_commands(files)}. Which of them are active, and the weights of set_adapters, "
            "are not saved."
        )
    return others | files if is_variant else files


def saved_adapters(model_index: Mapping[str, Any]) -> dict[str, str]:
    """Adapter → file beside a `model_index.json` that names them."""
    files = model_index.get(LORA_INDEX_KEY)
    return {
        name: file
        for name, file in (files.items() if isinstance(files, dict) else ())
        if LORA_NAME.fullmatch(name) and file in (lora_file_name(name, True), lora_file_name(name, False))
    }


def name_adapters(model_index: Mapping[str, Any]) -> None:
    """Says which adapters a pipeline was saved with, since they are not loaded with it."""
    if files := saved_adapters(model_index):
        LORA_LOGGER.warning(
            f"This pipeline was saved with adapters, which are not loaded with it: {loading_commands(files)}."
        )


def loading_commands(files: Mapping[str, str]) -> str:
    """How a pipeline is given its adapters again."""
    return ", ".join(
        f"pipe.load_lora_weights(FOLDER, weight_name={file!r}, adapter_name={name!r})" for name, file in files.items()
    )
