"""LoRA adapters of a denoiser and of its pipeline, by diffusers' mixins and loaded safely."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import USE_PEFT_BACKEND
from torch import nn

from .lora_file import LORA_SOURCE_ARGUMENTS, lora_config, read_lora, with_prefix


class LoraModelMixin(PeftAdapterMixin):
    """Adapters of a model as diffusers has them, loaded safely."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads an adapter, with the arguments of [`~diffusers.loaders.PeftAdapterMixin.load_lora_adapter`].

        Raises:
            ValueError: a file that is no safetensors, or an adapter that does not fit the model; see [`lora_config`].
            OSError: there is no such file.
        """
        if not USE_PEFT_BACKEND:
            raise ValueError("Adapters need peft: `pip install peft`.")
        arguments = {key: kwargs.pop(key) for key in LORA_SOURCE_ARGUMENTS if kwargs.get(key) is not None}
        weights, metadata = read_lora(pretrained_model_name_or_path_or_dict, arguments)
        given = kwargs.pop("metadata", None)
        metadata = metadata if given is None else given
        if kwargs.pop("network_alphas", None) is not None:
            raise ValueError("network_alphas: give lora_alpha and alpha_pattern as metadata instead.")
        if prefix is not None:
            weights, metadata = with_prefix(weights, prefix), metadata and with_prefix(metadata, prefix)
        if not weights:
            raise ValueError(f"There are no weights of an adapter whose names begin with {prefix}.")
        assert isinstance(self, nn.Module)
        config = lora_config(self, weights, metadata or None)
        super().load_lora_adapter(weights, prefix=None, hotswap=hotswap, metadata=config, **kwargs)


class LDLMLoraLoaderMixin(LoraBaseMixin):
    """Loads and saves adapters of a pipeline's `transformer`, as the pipelines of diffusers do.

    What is not here is [`~diffusers.loaders.lora_base.LoraBaseMixin`]'s: `set_adapters`, `get_active_adapters`,
    `get_list_adapters`, `disable_lora`, `enable_lora`, `delete_adapters`, `unload_lora_weights`.
    """

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        return_lora_metadata: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Tensors of an adapter's file by their names, which begin with `transformer.`, and with
        `return_lora_metadata` its metadata beside them; arguments and errors as of
        [`~LDLMLoraLoaderMixin.load_lora_weights`]."""
        weights, metadata = read_lora(pretrained_model_name_or_path_or_dict, kwargs)
        for name in weights:
            if not name.startswith(f"{cls.transformer_name}."):
                raise ValueError(
                    f"{reprlib.repr(name)}: names of an adapter's weights begin with {cls.transformer_name}., as "
                    "save_lora_weights writes them."
                )
        return (weights, metadata) if return_lora_metadata else weights

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Loads an adapter and makes it the active one.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, a repository on the Hub, or tensors by name.
            adapter_name: what it is called in this pipeline; `default_0`, `default_1`, ... by default.
            hotswap: put the weights into the adapter of this name, in place.
            low_cpu_mem_usage: do not give the adapter first values.
            kwargs: `weight_name` (`pytorch_lora_weights.safetensors` by default), `subfolder`, and for the Hub
                `revision`, `cache_dir`, `token`, `force_download` and `local_files_only`.

        Raises:
            ValueError: peft is missing, or an adapter that is no safetensors file or does not fit the transformer.
            OSError: there is no such file.
        """
        weights, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        transformer = getattr(self, self.transformer_name)
        if transformer is None:
            raise ValueError("load_lora_weights needs the component transformer, which this pipeline lacks.")
        transformer.load_lora_adapter(
            weights,
            prefix=self.transformer_name,
            adapter_name=adapter_name,
            metadata=metadata,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage,
            _pipeline=self,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Writes an adapter's file, with the arguments of diffusers' pipelines.

        Args:
            save_directory: its folder.
            transformer_lora_layers: what peft's `get_peft_model_state_dict(pipe.transformer)` gives.
            is_main_process: whether this process writes.
            weight_name: `pytorch_lora_weights.safetensors` by default.
            save_function: writes tensors by name into a file, in place of safetensors' own.
            safe_serialization: only True.
            transformer_lora_adapter_metadata: what `pipe.transformer.peft_config["default"].to_dict()` gives, without
                which the scale alpha / r is taken for 1.

        Raises:
            ValueError: no weights, or a file that would not be loaded.
        """
        if not safe_serialization or not (weight_name or LORA_WEIGHT_NAME_SAFE).endswith(".safetensors"):
            raise ValueError(
                f"safe_serialization={safe_serialization}, weight_name={weight_name!r}: adapters are loaded from "
                "safetensors only."
            )
        if not transformer_lora_layers:
            raise ValueError("transformer_lora_layers holds no weights of an adapter.")
        if is_main_process:
            cls._save_lora_weights(
                save_directory,
                {cls.transformer_name: transformer_lora_layers},
                {cls.transformer_name: transformer_lora_adapter_metadata},
                weight_name=weight_name,
                save_function=save_function,
            )

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds active adapters, or those that are named, to the weights of the transformer."""
        super().fuse_lora(components or [self.transformer_name], lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Takes adapters off the weights of the transformer again."""
        super().unfuse_lora(components or [self.transformer_name], **kwargs)
