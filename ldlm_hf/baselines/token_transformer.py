"""The network of all token-level diffusion models: a diffusion transformer from noisy words to clean ones' logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..loading.checks import check_settings
from ..loading.lora import LoraModelMixin
from ..loading.safe_loading import SafeLoadingMixin
from ..models.layers import (
    AdaLayerNormModulation,
    DiffusionTransformerBlock,
    FeedForward,
    LDLMAttnProcessor,
    Linear,
    SelfAttention,
    attend,
    checkpoint_layer,
    initialize_layer,
    modulate,
    split_heads,
)


# masked: words become a mask; uniform: any other word; candi: a part of them stays, the others get Gaussian noise;
# flow: all get Gaussian noise
PROCESSES = ("masked", "uniform", "candi", "flow")
ROTARY_BASE = 10_000.0


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap tanh(logits / cap)"""
    return cap * torch.tanh(logits / cap)


def rotate(hidden_states: torch.Tensor) -> torch.Tensor:
    """Rotary positions of queries or keys (B, H, L, D/H): pairs of a channel and the one half the width further,
    turned by an angle that is the position times 10,000^(-2k / width) for the k-th pair (Su et al., 2021)."""
    length, half = hidden_states.shape[-2], hidden_states.shape[-1] // 2
    device = hidden_states.device
    frequencies = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies  # (L, D/2H)
    cosine, sine = angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)
    first, second = hidden_states.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def attend_with_cap(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cap: float) -> torch.Tensor:
    """Attention whose scores are softly capped, of (B, H, L, D/H) each, heads merged again: (B, L, D)."""
    scores = soft_cap(query @ key.mT * query.shape[-1] ** -0.5, cap)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


class RotaryAttnProcessor(LDLMAttnProcessor):
    """How the blocks attend: with rotary positions, perhaps with capped scores, and dropout of what comes out."""

    def __init__(self, logit_cap: float | None, dropout: float):
        self.logit_cap = logit_cap
        self.dropout = dropout

    def __call__(
        self, attention: SelfAttention, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, L, D) → (B, L, D)"""
        projected = attention.to_qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (split_heads(part, attention.heads) for part in projected)
        query, key = rotate(query), rotate(key)
        if self.logit_cap is None:
            attended = attend(query, key, value, attention_mask, self._attention_backend)
        else:
            attended = attend_with_cap(query, key, value, self.logit_cap)
        return F.dropout(attention.to_out(attended), self.dropout, attention.training)


class ConditionModulation(AdaLayerNormModulation):
    """adaLN-zero from a condition of another width than the blocks'."""

    def __init__(self, condition_size: int, hidden_size: int, num_parts: int):
        nn.Module.__init__(self)
        self.num_parts = num_parts
        self.linear = Linear(condition_size, num_parts * hidden_size)


class FeedForwardWithDropout(FeedForward):
    """Feed-forward with dropout of what comes out."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float):
        super().__init__(hidden_size, intermediate_size)
        self.dropout = dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(hidden_states), self.dropout, self.training)


class RotaryTransformerBlock(DiffusionTransformerBlock):
    """The denoiser's block with rotary positions, a narrow condition, and dropout before both gates."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        condition_size: int,
        dropout: float,
        attention_logit_cap: float | None,
    ):
        super().__init__(hidden_size, num_heads, intermediate_size)
        self.modulation = ConditionModulation(condition_size, hidden_size, 6)
        self.attention.processor = RotaryAttnProcessor(attention_logit_cap, dropout)
        self.feed_forward = FeedForwardWithDropout(hidden_size, intermediate_size, dropout)


@dataclass
class TokenDiffusionTransformerOutput(BaseOutput):
    """
    Attributes:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): of the clean words.
    """

    logits: torch.Tensor


class TokenDiffusionTransformer(SafeLoadingMixin, LoraModelMixin, AttentionMixin, ModelMixin, ConfigMixin):
    r"""
    The backbone that MDLM, Duo, CANDI and FLM share: DiT blocks with rotary positions between a word embedding and a
    vocabulary head. At the defaults and `vocab_size=50257` it has the 169.6M parameters of their papers, to 0.02%:
    unlike theirs, attention has biases, layer norms have no scale of their own, and GELU is not approximated.

    It starts as a uniform distribution over the words: blocks are the identity, and the head is zero.

    Parameters:
        vocab_size (`int`): words K that it reads and predicts.
        process (`str`, defaults to `"masked"`):
            The noise on its input: `"masked"`, with one more row of the embedding for the mask, whose id is K, and
            without a time; `"uniform"`; `"candi"`, with a learned vector that marks noisy words; `"flow"`.
        num_layers (`int`, defaults to 12): number of blocks.
        num_attention_heads (`int`, defaults to 12): attention heads of a block.
        attention_head_dim (`int`, defaults to 64): width of a head, an even number.
        sample_size (`int`, defaults to 1024): tokens L of a text.
        mlp_ratio (`float`, defaults to 4.0): inner width of the feed-forward over the width of the blocks.
        condition_size (`int`, defaults to 128): width of the embedded time.
        frequency_embedding_size (`int`, defaults to 256): width of the sinusoids of the time.
        dropout (`float`, defaults to 0.1): of what attention and feed-forward give, in training.
        logit_cap (`float`, *optional*): c of c tanh(logits / c); 30 in FLM.
        attention_logit_cap (`float`, *optional*): the same of attention's scores; 50 in FLM.
        next_timestep_conditioning (`bool`, defaults to `False`):
            Whether it is also told the time that a step goes to (FMLM). At its start this changes nothing.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = [RotaryTransformerBlock.__name__]
    _repeated_blocks = [RotaryTransformerBlock.__name__]
    _skip_layerwise_casting_patterns = ["time_proj", "time_embedder", "embedding", "modulation"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        process: str = "masked",
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        sample_size: int = 1024,
        mlp_ratio: float = 4.0,
        condition_size: int = 128,
        frequency_embedding_size: int = 256,
        dropout: float = 0.1,
        logit_cap: float | None = None,
        attention_logit_cap: float | None = None,
        next_timestep_conditioning: bool = False,
    ):
        sizes = ("num_layers", "num_attention_heads", "sample_size", "condition_size", "frequency_embedding_size")
        check_settings(
            TokenDiffusionTransformer.__init__,
            locals(),
            **dict.fromkeys(sizes, "[1, inf)"),
            vocab_size="[2, inf)",
            process=PROCESSES,
            mlp_ratio="(0, inf)",
            dropout="[0, 1)",
            logit_cap="(0, inf)",
            attention_logit_cap="(0, inf)",
        )
        if attention_head_dim < 2 or attention_head_dim % 2:
            raise ValueError(f"attention_head_dim={attention_head_dim} must be even: rotary positions turn pairs.")
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.embedding = nn.Embedding(vocab_size + (process == "masked"), width)
        self.register_parameter("noise_embedding", nn.Parameter(torch.empty(width)) if process == "candi" else None)
        self.time_proj = Timesteps(frequency_embedding_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(frequency_embedding_size, condition_size)
        self.next_time_embedder = None
        if next_timestep_conditioning:
            self.next_time_embedder = TimestepEmbedding(frequency_embedding_size, condition_size)
        self.blocks = nn.ModuleList(
            [
                RotaryTransformerBlock(
                    width, num_attention_heads, int(width * mlp_ratio), condition_size, dropout, attention_logit_cap
                )
                for _ in range(num_layers)
            ]
        )
        self.modulation_out = ConditionModulation(condition_size, width, 2)
        self.head = nn.Linear(width, vocab_size)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The papers' start: embeddings Kaiming-uniform with a = sqrt 5, modulations and head zero."""
        self.apply(lambda module: initialize_layer(module, initializer_range=0.02))
        nn.init.kaiming_uniform_(self.embedding.weight, a=math.sqrt(5))
        nn.init.zeros_(self.head.weight)
        if self.noise_embedding is not None:
            nn.init.normal_(self.noise_embedding, std=0.02)
        if self.next_time_embedder is not None:
            nn.init.zeros_(self.next_time_embedder.linear_2.weight)

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask, behind those of the words; None for other processes than the masked one."""
        return self.config.vocab_size if self.config.process == "masked" else None

    @property
    def word_embeddings(self) -> torch.Tensor:
        """Embeddings (K, D) of the words, of length 1 for CANDI."""
        words = self.embedding.weight[: self.config.vocab_size]
        return F.normalize(words, dim=-1) if self.config.process == "candi" else words

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        timestep: torch.Tensor | float = 0.0,
        next_timestep: torch.Tensor | float | None = None,
        weights: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        noisy: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> TokenDiffusionTransformerOutput | tuple[torch.Tensor]:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): noisy words.
            timestep (`float` or `torch.Tensor` of shape `(batch_size,)`, defaults to 0.0):
                What the method tells of the time: -log alpha_t for uniform noise and CANDI, tau for a flow, and 0 for
                masks. One value holds for the whole batch.
            next_timestep (as `timestep`, *optional*):
                tau at the end of the step, for FMLM; `None` stands for `timestep` itself.
            weights (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
                Weights of the words' embeddings, in the place of `input_ids`.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, width)`, *optional*):
                Embeddings, in the place of both; for CANDI those of noisy words, scaled to about length 1.
            noisy (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                For CANDI: which words are noisy; of the others it reads `input_ids`.
            return_dict (`bool`, defaults to `True`): whether to return a [`TokenDiffusionTransformerOutput`].

        Raises:
            ValueError: a second time for a model that knows none.
        """
        hidden_states = self.embed(input_ids, weights, inputs_embeds, noisy)
        condition = self.embed_time(timestep, next_timestep, hidden_states)
        shift, scale = self.modulation_out(condition)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = checkpoint_layer(self._gradient_checkpointing_func, block, hidden_states, condition)
            else:
                hidden_states = block(hidden_states, condition)
        logits = self.head(modulate(hidden_states, shift, scale))
        if self.config.logit_cap is not None:
            logits = soft_cap(logits, self.config.logit_cap)
        return TokenDiffusionTransformerOutput(logits=logits) if return_dict else (logits,)

    def embed(
        self,
        input_ids: torch.Tensor | None,
        weights: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        noisy: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the first block reads, (B, L, D)."""
        if weights is not None:
            return weights.to(self.embedding.weight.dtype) @ self.word_embeddings
        if noisy is not None and inputs_embeds is not None:
            # CANDI: half of a noisy word's input says that it is one (Pynadath et al., 2025)
            mark = F.normalize(self.noise_embedding, dim=-1)
            clean = F.normalize(self.embedding(input_ids), dim=-1)
            return torch.where(noisy[..., None], 0.5 * (mark + inputs_embeds.to(mark.dtype)), clean)
        return self.embedding(input_ids) if inputs_embeds is None else inputs_embeds.to(self.embedding.weight.dtype)

    def embed_time(
        self,
        timestep: torch.Tensor | float,
        next_timestep: torch.Tensor | float | None,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Embedded times (R, C), R = B or 1, of one time or of both ends of a step; ValueError for a second time that
        the model does not know."""
        embedding = self.time_embedder(self.frequencies(timestep, hidden_states))
        if self.next_time_embedder is not None:
            end = timestep if next_timestep is None else next_timestep
            return embedding + self.next_time_embedder(self.frequencies(end, hidden_states))
        if next_timestep is not None:
            raise ValueError(
                "next_timestep is for a model with next_timestep_conditioning=True (FMLM); leave it out, or use the "
                "scheduler that this model was trained for."
            )
        return embedding

    def frequencies(self, timestep: torch.Tensor | float, hidden_states: torch.Tensor) -> torch.Tensor:
        """Cosines and sines of a time, computed in float32: in bfloat16 those near 1 would fall together."""
        timestep = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1).float()
        return self.time_proj(timestep).to(hidden_states.dtype)
