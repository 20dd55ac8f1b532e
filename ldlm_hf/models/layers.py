"""The building blocks of the four trainable models: attention, feed-forward, adaptive norms and the two layer stacks.

Plain modules on `torch.nn.functional.scaled_dot_product_attention`, or on another kernel of the user's choice. The
paper gives sizes and parameter counts (App. C), from which the layouts follow. B batch, L tokens, N latents, D width,
C context length, H heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn


def split_heads(hidden_states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, L, D) → (B, H, L, D/H)"""
    batch_size, length, width = hidden_states.shape
    return hidden_states.view(batch_size, length, num_heads, width // num_heads).transpose(1, 2)


# of attention's scores that are computed at once on the CPU: 2 MiB of bfloat16 stay in a core's cache
SCORES_AT_ONCE = 2**20


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    backend: AttentionBackendName | None = None,
) -> torch.Tensor:
    """Bidirectional attention of (B, H, L, D/H) queries over (B, H, C, D/H) keys, heads merged again: (B, L, D).

    Args:
        query: queries.
        key: keys.
        value: values of the same shape.
        mask: bool (B, L, C), which keys each query attends to, at least one; None stands for all of them.
        backend: one of diffusers'; None stands for torch's fused attention, or what is faster than that.
    """
    if mask is not None:
        mask = mask[:, None]  # (B, 1, L, C)
    if backend is not None:
        # diffusers' dispatcher has the heads behind the tokens
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend).flatten(2)
    on_cpu_in_bfloat16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if on_cpu_in_bfloat16 and not torch.compiler.is_compiling() and products_beat_fused_attention():
        attended = attend_by_products(query, key, value, mask)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, mask)
    return attended.transpose(1, 2).flatten(2)


@functools.cache
def products_beat_fused_attention() -> bool:
    """Whether plain products in bfloat16 are faster on this CPU than torch's fused attention (torch 2.13).

    They are with AVX512-BF16 alone, where they are not emulated and the fused kernel's are. With AMX the fused kernel
    uses the matrix unit, and without bfloat16 instructions (AVX2) its emulated products are the faster ones. It is
    asked of the processor and not measured, so that a run that is resumed computes what it would have computed.
    """
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The same attention as plain products, for a few heads at a time, with a mask (B, 1, L, C): (B, H, L, D/H).

    Scores are rounded to bfloat16; with gradients, all of them are kept for the backward pass.
    """
    batch_size, num_heads, length, width = query.shape
    group = max(1, SCORES_AT_ONCE // (length * key.shape[2]))
    heads = ((query * width**-0.5).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))  # each (B H, ., D/H)
    parts = list(zip(*(h.split(group) for h in heads), strict=True))
    hidden: list[torch.Tensor | None] = [None] * len(parts)
    if mask is not None:
        hidden = list((~mask).expand(-1, num_heads, -1, -1).flatten(0, 1).split(group))  # each (., L, C)
    attended = []
    for (q, k, v), hidden_keys in zip(parts, hidden, strict=True):
        scores = torch.bmm(q, k.mT)
        if hidden_keys is not None:
            scores = scores.masked_fill(hidden_keys, -torch.inf)
        attended.append(torch.bmm(torch.softmax(scores, -1), v))
    return torch.cat(attended).view(batch_size, num_heads, length, width)


@functools.cache
def transposed_weights_are_faster() -> bool:
    """Whether products in bfloat16 are faster on this CPU with a weight that lies in memory as (in, out).

    They are with AMX, whose products read a matrix of that layout as it lies and else arrange the weight anew at each
    call. Without AMX the transposed one is slower.
    """
    return torch.cpu._is_amx_tile_supported()


class Linear(nn.Linear):
    """A linear layer whose weight lies in memory as the processor multiplies it fastest.

    Where that is transposed, the first call without gradients lays it out so: its shape, (out, in), and its values
    stay, only its strides change.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._may_lie_transposed():
            self.weight.data = self.weight.data.t().contiguous().t()
        return super().forward(hidden_states)

    def _may_lie_transposed(self) -> bool:
        weight = self.weight
        # a plain one: what quantises or shards weights has a layout of its own
        in_bfloat16 = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16
        return in_bfloat16 and weight.is_contiguous() and weight.is_cpu and transposed_weights_are_faster()


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a learned scale, its type given by the input, so that autocast has no say in it."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


class LDLMAttnProcessor:
    """How [`SelfAttention`] attends, in diffusers' form, so that `set_attention_backend` knows it."""

    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __call__(
        self, attention: SelfAttention, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, L, D) → (B, L, D), with a mask as that of [`attend`]."""
        projected = attention.to_qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (split_heads(part, attention.heads) for part in projected)
        query, key = attention.norm_q(query), attention.norm_k(key)
        return attention.to_out(attend(query, key, value, attention_mask, self._attention_backend))


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Bidirectional multi-head self-attention with one fused projection for queries, keys and values.

    Args:
        hidden_size: width D.
        num_heads: heads H; D/H wide each.
        bias: whether the two projections have biases.
        qk_norm: whether queries and keys are RMS-normed per head, which keeps the logits bounded.
    """

    _default_processor_cls = LDLMAttnProcessor
    _available_processors = [LDLMAttnProcessor]
    # as of diffusers' own with one projection: `fuse_qkv_projections` leaves them as they are
    _supports_qkv_fusion = False
    is_cross_attention = False

    def __init__(self, hidden_size: int, num_heads: int, bias: bool, qk_norm: bool = False):
        super().__init__()
        # diffusers' names
        self.heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.use_bias = bias
        self.to_qkv = Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.norm_q = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.to_out = Linear(hidden_size, hidden_size, bias=bias)
        self.processor = LDLMAttnProcessor()

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.processor(self, hidden_states, attention_mask)


class PerceiverAttention(nn.Module):
    """Cross-attention of the latents over context and latents together (Perceiver Resampler, Section 6).

    Context and latents have key and value projections of their own, concatenated along the sequence.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.norm_latents = RMSNorm(hidden_size)
        self.norm_context = RMSNorm(hidden_size)
        # one matrix for everything that reads the latents: queries, keys and values
        self.latents_to_qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.context_to_kv = Linear(hidden_size, 2 * hidden_size, bias=False)
        self.norm_q = RMSNorm(head_dim)
        self.norm_k = RMSNorm(head_dim)
        self.to_out = Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, latents: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, N, D) → (B, N, D); a mask (B, N, N), for as many latents as context, holds for both."""
        query, latent_key, latent_value = self.latents_to_qkv(self.norm_latents(latents)).chunk(3, dim=-1)
        context_key, context_value = self.context_to_kv(self.norm_context(context)).chunk(2, dim=-1)
        key = torch.cat([context_key, latent_key], dim=1)  # (B, C + N, D)
        value = torch.cat([context_value, latent_value], dim=1)
        query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask], dim=-1)  # (B, N, C + N)
        return self.to_out(attend(self.norm_q(query), self.norm_k(key), value, attention_mask))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.linear_in = Linear(hidden_size, intermediate_size)
        self.linear_out = Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_out(F.gelu(self.linear_in(hidden_states)))


class SwiGLU(nn.Module):
    """Gated feed-forward without biases: out(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.linear_in = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.linear_out = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.linear_in(hidden_states).chunk(2, dim=-1)
        return self.linear_out(F.silu(gate) * up)


class PerceiverLayer(nn.Module):
    """Pre-norm Perceiver Resampler layer: attention over context and latents, then feed-forward."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.attention = PerceiverAttention(hidden_size, num_heads)
        self.norm = nn.LayerNorm(hidden_size)
        self.feed_forward = FeedForward(hidden_size, intermediate_size)

    def forward(
        self, latents: torch.Tensor, context: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        latents = latents + self.attention(latents, context, attention_mask)
        return latents + self.feed_forward(self.norm(latents))


class SelfAttentionLayer(nn.Module):
    """Pre-norm bidirectional layer with the parts of [`PerceiverLayer`] and no context (App. B.4)."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.norm_attention = RMSNorm(hidden_size)
        self.attention = SelfAttention(hidden_size, num_heads, bias=False, qk_norm=True)
        self.norm = nn.LayerNorm(hidden_size)
        self.feed_forward = FeedForward(hidden_size, intermediate_size)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.norm_attention(hidden_states), attention_mask)
        return hidden_states + self.feed_forward(self.norm(hidden_states))


class SequenceMapper(nn.Module):
    """Maps one sequence of vectors to another of the same width: the body of latent encoder and latent decoder.

    `"perceiver"` gives `output_length` vectors whatever the input's length; `"self_attention"` one for each input.
    It ends without a norm, so the magnitude of what comes out is free.

    Args:
        architecture: `"perceiver"` or `"self_attention"`.
        hidden_size: width D.
        num_layers: number of layers.
        num_heads: attention heads.
        intermediate_size: inner width of the feed-forward.
        input_length: longest input, which is how many positions are learned.
        output_length: number of learned latents (perceiver).
        aligned_queries: start query i beside key i; see [`SequenceMapper.align_queries_with_context`].
    """

    def __init__(
        self,
        architecture: str,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        input_length: int,
        output_length: int,
        aligned_queries: bool,
    ):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(input_length, hidden_size))
        self.aligned_queries = aligned_queries
        layer_class: type[nn.Module]
        if architecture == "perceiver":
            layer_class = PerceiverLayer
            self.latents = nn.Parameter(torch.empty(output_length, hidden_size))
        else:
            layer_class = SelfAttentionLayer
            self.register_parameter("latents", None)
        self.layers = nn.ModuleList(
            [layer_class(hidden_size, num_heads, intermediate_size) for _ in range(num_layers)]
        )

    def align_queries_with_context(self) -> None:
        """Starts the learned latents and the context's positions from the same vectors, and keys from queries.

        A Perceiver whose latents and positions start independent has nothing that ties output i to input i, and must
        find it by chance first. Here query i begins near key i: both start from the same unit-scale vector, and in
        each layer the context's key projection starts as a copy of the query projection. With more positions than
        latents, or fewer, they are matched evenly along the sequence.
        """
        nn.init.normal_(self.positions)
        with torch.no_grad():
            matching = torch.linspace(0, self.positions.shape[0] - 1, self.latents.shape[0]).round().long()
            self.latents.copy_(self.positions[matching.to(self.positions.device)])
            width = self.positions.shape[1]
            for attention in self.modules():
                if isinstance(attention, PerceiverAttention):
                    attention.context_to_kv.weight[:width] = attention.latents_to_qkv.weight[:width]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        checkpoint_function: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """(B, C, D) → (B, N, D) for the perceiver, (B, C, D) for self-attention.

        Args:
            hidden_states: input of C vectors, at most `input_length`.
            attention_mask: which inputs, and outputs beside them, each output attends to, bool (B, N, C) with N = C;
                None stands for all.
            checkpoint_function: runs a layer so that its activations are computed again in the backward pass.
        """
        context = hidden_states + self.positions[: hidden_states.shape[1]]
        if self.latents is None:
            arguments: tuple[torch.Tensor | None, ...] = (attention_mask,)
            output = context
        else:
            arguments = (context, attention_mask)
            latents = F.rms_norm(self.latents, self.latents.shape[-1:])
            output = latents.to(context.dtype).expand(hidden_states.shape[0], -1, -1)  # (B, N, D)
        for layer in self.layers:
            if checkpoint_function is not None and torch.is_grad_enabled():
                output = checkpoint_layer(checkpoint_function, layer, output, *arguments)
            else:
                output = layer(output, *arguments)
        return output


class AdaLayerNormModulation(nn.Module):
    """Turns a time embedding into `num_parts` modulation vectors of width D (adaLN-zero: they all start at 0).

    Input (R, D), R being B, or 1 where the whole batch shares its time; output `num_parts` tensors (R, 1, D).
    """

    def __init__(self, hidden_size: int, num_parts: int):
        super().__init__()
        self.num_parts = num_parts
        self.linear = Linear(hidden_size, num_parts * hidden_size)

    def forward(self, time_embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(F.silu(time_embedding))[:, None].chunk(self.num_parts, dim=-1)


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without learned scale, then (1 + scale) x + shift; (B, N, D) with shift and scale (R, 1, D)."""
    if shift.shape[0] == 1 and shift.dtype == hidden_states.dtype:
        # one row for the whole batch is an affine norm, which passes over the latents once instead of twice (autocast
        # makes rows of another type than the latents', which the kernel for the CPU does not take)
        return F.layer_norm(hidden_states, hidden_states.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps=1e-6)
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale)


class DiffusionTransformerBlock(nn.Module):
    """DiT block with adaLN-zero: attention and feed-forward, each shifted, scaled and gated by the time embedding."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.modulation = AdaLayerNormModulation(hidden_size, 6)
        self.attention = SelfAttention(hidden_size, num_heads, bias=True)
        self.feed_forward = FeedForward(hidden_size, intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        time_embedding: torch.Tensor | None,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, N, D) → (B, N, D), with the time's embedding (R, D), or its modulation (R, 6, D) computed ahead."""
        parts = self.modulation(time_embedding) if modulation is None else modulation.chunk(6, dim=1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = parts
        attended = self.attention(modulate(hidden_states, shift_attn, scale_attn))
        hidden_states = torch.addcmul(hidden_states, gate_attn, attended)
        fed_forward = self.feed_forward(modulate(hidden_states, shift_ff, scale_ff))
        return torch.addcmul(hidden_states, gate_ff, fed_forward)


class TokenDecoderLayer(nn.Module):
    """Pre-norm bidirectional layer with RMSNorm and SwiGLU, no biases and no positions."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.norm_attention = RMSNorm(hidden_size)
        self.attention = SelfAttention(hidden_size, num_heads, bias=False)
        self.norm_feed_forward = RMSNorm(hidden_size)
        self.feed_forward = SwiGLU(hidden_size, intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.norm_attention(hidden_states))
        return hidden_states + self.feed_forward(self.norm_feed_forward(hidden_states))


def checkpoint_layer(
    checkpoint_function: Callable[..., Any], layer: nn.Module, hidden_states: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    """Runs a layer so that its activations are computed again in the backward pass.

    `checkpoint_function` may be reentrant, and then gives a layer's parameters a gradient only where one of its inputs
    needs one: here the hidden states always do.
    """
    if not hidden_states.requires_grad:
        hidden_states = hidden_states.detach().requires_grad_()
    return checkpoint_function(layer, hidden_states, *arguments)


def initialize_layer(module: nn.Module, initializer_range: float) -> None:
    """The one place where parameters get their first values (ours; the paper's text gives none).

    Linear layers are Xavier-uniform with zero biases, norms are the identity, adaLN modulations are zero, learned
    positions and latents are normal with `initializer_range`.
    """
    if isinstance(module, AdaLayerNormModulation):
        nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(module.linear.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm):
        nn.init.ones_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, SequenceMapper):
        nn.init.normal_(module.positions, std=initializer_range)
        if module.latents is not None:
            nn.init.normal_(module.latents, std=initializer_range)
            # weights that came from a checkpoint are left alone, and what it lacked is not aligned with them
            loaded = any(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())
            if module.aligned_queries and not loaded:
                module.align_queries_with_context()
