"""What the denoisers share of diffusers' models: safe loading, adapters, attention processors and caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from ..loading.lora import LoraModelMixin
from ..loading.safe_loading import SafeLoadingMixin


class DenoiserMixin(SafeLoadingMixin, LoraModelMixin, AttentionMixin, CacheMixin):
    """To stand before diffusers' `ModelMixin`, for a model whose layers are `blocks`."""

    blocks: nn.ModuleList

    def enable_cache(self, config: Any) -> None:
        """Reuses what layers computed at earlier steps, as [`~diffusers.models.CacheMixin.enable_cache`] does.

        Raises:
            ValueError: a cache of blocks for a model that has only one.
        """
        if len(self.blocks) < 2:
            raise ValueError("A cache of blocks needs two of them, and this model has one.")
        # here, and not where the class is defined: in a repository's code it is another class
        block_class = type(self.blocks[0])
        TransformerBlockRegistry.register(block_class, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    def forget_cache(self) -> None:
        """Begins with an empty cache, if there is one: what is denoised next is another sample."""
        if self.is_cache_enabled:
            self._reset_stateful_cache()

    @contextmanager
    def caching(self, num_predictions: int) -> Iterator[None]:
        """The context of a call that makes so many predictions of each sample; a cache keeps one state for each
        number of them, which batches of different sizes are."""
        if not self.is_cache_enabled:
            yield
            return
        with self.cache_context(f"{num_predictions} predictions"):
            yield
