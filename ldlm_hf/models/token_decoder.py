"""The token decoder: hidden states (or latents) → logits over the vocabulary (Section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput, can_return_tuple

from ..loading.checks import check_settings
from .latent_encoder import check_attention_heads
from .layers import RMSNorm, TokenDecoderLayer, checkpoint_layer, initialize_layer
from .pretrained_model import LDLMPreTrainedModel


class LDLMTokenDecoderConfig(PretrainedConfig):
    """Configuration of [`LDLMTokenDecoder`].

    Args:
        vocab_size: vocabulary V, that of the tokenizer.
        hidden_size: width of the layers.
        num_hidden_layers: number of layers; 0 is the vocabulary head alone.
        num_attention_heads: attention heads; must divide `hidden_size`.
        intermediate_size: inner width of the gated feed-forward.
        token_hidden_size: width of the input: the token encoder's hidden states, or d_z for a decoder of latents.
        initializer_range: standard deviation of the vocabulary head at the start.
    """

    model_type = "ldlm_token_decoder"

    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 768,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        token_hidden_size: int = 768,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ):
        check_settings(
            LDLMTokenDecoderConfig.__init__,
            locals(),
            vocab_size="[1, inf)",
            hidden_size="[1, inf)",
            num_hidden_layers="[0, inf)",
            num_attention_heads="[1, inf)",
            intermediate_size="[1, inf)",
            token_hidden_size="[1, inf)",
            initializer_range="[0, inf)",
        )
        check_attention_heads(hidden_size, num_attention_heads)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.token_hidden_size = token_hidden_size
        self.initializer_range = initializer_range
        # there is no input embedding that the head could be tied to
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)


@dataclass
class LDLMTokenDecoderOutput(ModelOutput):
    """
    Attributes:
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`): unnormalised scores.
        token_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the most likely tokens, where those
            were asked for instead.
    """

    logits: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None


class LDLMTokenDecoder(LDLMPreTrainedModel):
    r"""
    The token decoder of LDLM: bidirectional layers with RMSNorm and SwiGLU, and a vocabulary head without bias. It has
    no positions of its own: its input carries them.
    """

    config_class = LDLMTokenDecoderConfig
    base_model_prefix = "ldlm_token_decoder"
    main_input_name = "hidden_states"
    _no_split_modules = [TokenDecoderLayer.__name__]
    _repeated_blocks = [TokenDecoderLayer.__name__]
    # 16 MB of logits in float32: on a CPU they are compared while they are in its cache, which is a quarter faster
    # than all logits of 1,024 positions at once, or than fewer positions by the whole vocabulary (50,257 words)
    _positions_at_once, _words_at_once = 1024, 4096

    def __init__(self, config: LDLMTokenDecoderConfig):
        super().__init__(config)
        width = config.hidden_size
        self.proj_in = (
            nn.Identity() if config.token_hidden_size == width else nn.Linear(config.token_hidden_size, width)
        )
        self.layers = nn.ModuleList(
            [
                TokenDecoderLayer(width, config.num_attention_heads, config.intermediate_size)
                for _ in range(config.num_hidden_layers)
            ]
        )
        # a norm belongs to the residual stream of the layers; the head alone reads its input as it is
        self.norm = RMSNorm(width) if config.num_hidden_layers > 0 else nn.Identity()
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.head:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        else:
            initialize_layer(module, self.config.initializer_range)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Linear:
        """As in [`~transformers.PreTrainedModel.resize_token_embeddings`], for the vocabulary head, which is returned:
        there is no input embedding."""
        num_tokens = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            num_tokens = math.ceil(num_tokens / pad_to_multiple_of) * pad_to_multiple_of
        is_trained = self.head.weight.requires_grad
        self.head = self._get_resized_lm_head(self.head, num_tokens, mean_resizing=mean_resizing)
        self.head.requires_grad_(is_trained)
        self.config.vocab_size = num_tokens
        return self.head

    @can_return_tuple
    def forward(self, hidden_states: torch.Tensor, most_likely: bool = False) -> LDLMTokenDecoderOutput:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, token_hidden_size)`):
                Reconstructed hidden states, or latents for a decoder that was trained on those.
            most_likely: whether to return `token_ids` alone, as [`~LDLMTokenDecoder.most_likely_tokens`] does.
            return_dict: whether to return an [`LDLMTokenDecoderOutput`] instead of a tuple; as the configuration has
                it by default.

        Raises:
            ValueError: the input is not `token_hidden_size` wide.
        """
        hidden_states = self._run_layers(hidden_states)  # (B, L, D)
        if most_likely:
            return LDLMTokenDecoderOutput(token_ids=self._most_likely_words(hidden_states))
        return LDLMTokenDecoderOutput(logits=self.head(hidden_states))

    @torch.no_grad()
    def most_likely_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The token ids (B, L), int64, of the largest logits, without ever holding all logits (B, L, V).

        The vocabulary projection is done for a slice of positions and words at a time, and each position's best word
        so far is kept. Of equal logits the first counts, as with `argmax`.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, token_hidden_size)`):
                As in `forward`.

        Raises:
            ValueError: the input is not `token_hidden_size` wide.
        """
        # by way of `forward`, which is where offloading, wrappers and adapters have their hooks
        return self(hidden_states, most_likely=True, return_dict=True).token_ids

    def _most_likely_words(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the vocabulary head reads, (B, L, D) → token ids (B, L)."""
        projections = self._vocabulary_projections()
        parts = [
            most_likely_words(positions, projections)
            for positions in hidden_states.flatten(0, 1).split(self._positions_at_once)
        ]
        return torch.cat(parts).view(hidden_states.shape[:2])

    def _vocabulary_projections(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Functions (R, D) → (R, some words), which together are the head."""
        head = self.head
        # accelerate's and diffusers' hooks replace the `forward` of a module
        hooked = "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks
        if type(head) is nn.Linear and head.bias is None and not hooked:
            return [partial(F.linear, weight=weight) for weight in head.weight.split(self._words_at_once)]
        # an adapter, a quantised head or an offloaded one knows itself what to do, for all words at once
        return [head]

    def _run_layers(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the vocabulary head reads, (B, L, D)."""
        self.check_outputs()
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.config.token_hidden_size:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)} do not fit this token decoder, which takes "
                f"(batch_size, sequence_length, token_hidden_size={self.config.token_hidden_size})."
            )
        hidden_states = self.proj_in(hidden_states)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = checkpoint_layer(self._gradient_checkpointing_func, layer, hidden_states)
            else:
                hidden_states = layer(hidden_states)
        return self.norm(hidden_states)


def most_likely_words(
    hidden_states: torch.Tensor, projections: list[Callable[[torch.Tensor], torch.Tensor]]
) -> torch.Tensor:
    """Indices (R,) of the largest logits of (R, D) hidden states, whose logits come in slices of the vocabulary."""
    best_logits = hidden_states.new_full(hidden_states.shape[:1], -torch.inf)
    best_words = torch.zeros_like(best_logits, dtype=torch.long)
    first_word = 0
    for project in projections:
        logits = project(hidden_states)  # (R, V of the slice)
        # max finds the index several times faster than argmax on a CPU
        largest, words = logits.max(-1)
        # only a larger logit replaces the best one, so that of equal ones the first stays
        better = largest > best_logits
        best_words = torch.where(better, first_word + words, best_words)
        best_logits = torch.where(better, largest, best_logits)
        first_word += logits.shape[1]
    return best_words
