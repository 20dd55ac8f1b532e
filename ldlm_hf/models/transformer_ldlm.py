"""The denoiser: a diffusion transformer (DiT) over latents, conditioned on time and on its own last estimate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..loading.checks import check_settings
from ..loading.lora import LoraModelMixin
from ..loading.safe_loading import SafeLoadingMixin
from .layers import (
    AdaLayerNormModulation,
    DiffusionTransformerBlock,
    checkpoint_layer,
    initialize_layer,
    modulate,
)


@dataclass
class LDLMTransformer1DModelOutput(BaseOutput):
    """
    Attributes:
        sample (`torch.Tensor` of shape `(batch_size, num_latents, in_channels)`): prediction of the clean latents.
    """

    sample: torch.Tensor


class LDLMTransformer1DModel(SafeLoadingMixin, LoraModelMixin, AttentionMixin, ModelMixin, ConfigMixin):
    r"""
    The denoiser of LDLM (Section 4.2 of the paper, sizes in App. C): DiT blocks with adaLN-zero over the
    noisy latents, which enter together with the self-condition through one linear layer.

    Parameters:
        in_channels (`int`, defaults to 768): width d_z of a latent.
        num_layers (`int`, defaults to 12): number of blocks.
        num_attention_heads (`int`, defaults to 12): attention heads of a block.
        attention_head_dim (`int`, defaults to 64): width of a head; the blocks are heads times this wide.
        sample_size (`int`, defaults to 1024): number N of latents, each with a learned position.
        mlp_ratio (`float`, defaults to 4.0): inner width of the feed-forward over the width of the blocks.
        frequency_embedding_size (`int`, defaults to 256): width of the sinusoidal time embedding.
        self_conditioning (`bool`, defaults to `True`):
            Whether the model was trained with a self-condition; the pipeline gives it none where it was not.
        next_timestep_conditioning (`bool`, defaults to `False`):
            Whether the model is also told the time that a step goes to, and predicts the mean of the clean latents on
            the way there (see `ldlm_hf/objective/flow_map.py`). Where the two times are one, it is the model without
            this.
        guidance_embeds (`bool`, defaults to `False`):
            Whether the model is also told a weight of its self-condition, and predicts what guidance by it would give
            (see [`guided_target`]).
        role_embeds (`bool`, defaults to `False`):
            Whether the model is also told which latents are given, and writes the others around them (ours; see
            `docs/conditioning.md`).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = [DiffusionTransformerBlock.__name__]
    _repeated_blocks = [DiffusionTransformerBlock.__name__]
    _skip_layerwise_casting_patterns = ["time_proj", "time_embedder", "guidance_embedder", "positions", "modulation"]
    # a row is 6 num_layers + 2 vectors, 227 KB at the paper's size in float32: 64 of them read the modulations'
    # weights once instead of 64 times, and are small beside the activations of one sample
    _times_modulated_at_once = 64

    @register_to_config
    def __init__(
        self,
        in_channels: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        sample_size: int = 1024,
        mlp_ratio: float = 4.0,
        frequency_embedding_size: int = 256,
        self_conditioning: bool = True,
        next_timestep_conditioning: bool = False,
        guidance_embeds: bool = False,
        role_embeds: bool = False,
    ):
        check_settings(
            LDLMTransformer1DModel.__init__,
            locals(),
            in_channels="[1, inf)",
            num_layers="[1, inf)",
            num_attention_heads="[1, inf)",
            attention_head_dim="[1, inf)",
            sample_size="[1, inf)",
            mlp_ratio="(0, inf)",
            frequency_embedding_size="[1, inf)",
        )
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.proj_in = nn.Linear(2 * in_channels, width)
        self.positions = nn.Parameter(torch.empty(sample_size, width))
        # t in [0, 1] is scaled to the 0..1000 that the sinusoids' frequencies are made for
        self.time_proj = Timesteps(frequency_embedding_size, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.time_embedder = TimestepEmbedding(frequency_embedding_size, width)
        self.next_time_embedder = None
        if next_timestep_conditioning:
            self.next_time_embedder = TimestepEmbedding(frequency_embedding_size, width)
        self.guidance_embedder = None
        if guidance_embeds:
            self.guidance_embedder = TimestepEmbedding(frequency_embedding_size, width)
        # what is added to given latents, and nothing to those that are written
        self.register_parameter("given_embedding", nn.Parameter(torch.empty(width)) if role_embeds else None)
        self.blocks = nn.ModuleList(
            [DiffusionTransformerBlock(width, num_attention_heads, int(width * mlp_ratio)) for _ in range(num_layers)]
        )
        self.modulation_out = AdaLayerNormModulation(width, 2)
        self.proj_out = nn.Linear(width, in_channels)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's start: every block is the identity, and the prediction is zero; second time, guidance and roles change
        nothing."""
        self.apply(lambda module: initialize_layer(module, initializer_range=0.02))
        nn.init.normal_(self.positions, std=0.02)
        nn.init.zeros_(self.proj_out.weight)
        for embedder in (self.next_time_embedder, self.guidance_embedder):
            if embedder is not None:
                nn.init.zeros_(embedder.linear_2.weight)
        if self.given_embedding is not None:
            nn.init.zeros_(self.given_embedding)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        self_condition: torch.Tensor | None = None,
        return_dict: bool = True,
        next_timestep: torch.Tensor | float | None = None,
        modulation: torch.Tensor | None = None,
        guidance: torch.Tensor | float | None = None,
        given: torch.Tensor | None = None,
        given_latents: torch.Tensor | None = None,
    ) -> LDLMTransformer1DModelOutput | tuple[torch.Tensor]:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sample_size, in_channels)`): noisy latents z_t.
            timestep (`float` or `torch.Tensor` of shape `(batch_size,)`):
                Time in [0, 1]: 0 is clean, 1 is noise; on any device. One value, a number or of shape `(1,)` or
                `()`, holds for the whole batch and its modulation is computed once.
            self_condition (`torch.Tensor` of shape `(batch_size, sample_size, in_channels)`, *optional*):
                An earlier prediction of the clean latents; `None` stands for zeros.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`LDLMTransformer1DModelOutput`] instead of a tuple.
            next_timestep (as `timestep`, *optional*):
                Time that the step goes to, for a model with `next_timestep_conditioning`; `None` stands for
                `timestep` itself, where the prediction is that of the clean latents at one time.
            modulation (`torch.Tensor` of shape `(1, 6 * num_layers + 2, width)`, *optional*):
                What [`~LDLMTransformer1DModel.modulations`] gave for these times, which are then not read.
            guidance (as `timestep`, *optional*):
                Weight of the self-condition, for a model with `guidance_embeds`; `None` stands for 1, the prediction
                without guidance.
            given (`torch.BoolTensor` of shape `(batch_size, sample_size)`, *optional*):
                Which latents are given, for a model with `role_embeds`; `None` stands for none of them.
            given_latents (`torch.Tensor` of shape `(batch_size, sample_size, in_channels)`, *optional*):
                Their clean values, which stand there in place of the noisy latents, of the self-condition and of the
                prediction; zeros where the model is not told them.

        Raises:
            ValueError: shapes that do not fit the model or each other.
        """
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        if next_timestep is not None:
            next_timestep = torch.as_tensor(next_timestep, device=hidden_states.device)
        if guidance is not None:
            guidance = torch.as_tensor(guidance, device=hidden_states.device)
        self._check_shapes(hidden_states, timestep, self_condition, modulation)
        time_embedding: torch.Tensor | None = None  # (R, D), R = B or 1
        of_blocks: list[torch.Tensor | None] = [None] * len(self.blocks)
        if modulation is None:
            time_embedding = self._embed_times(timestep, next_timestep, guidance, hidden_states.dtype)
            shift, scale = self.modulation_out(time_embedding)
        else:
            *of_blocks, shift, scale = modulation.split([6] * len(self.blocks) + [1, 1], dim=1)

        if self_condition is None:
            self_condition = torch.zeros_like(hidden_states)
        if given is not None:
            given_latents = self._check_given(hidden_states, given, given_latents)
            given = given[..., None]  # (B, N, 1)
            hidden_states = torch.where(given, given_latents, hidden_states)
            self_condition = torch.where(given, given_latents, self_condition)
        hidden_states = self.proj_in(torch.cat([hidden_states, self_condition], dim=-1)) + self.positions  # (B, N, D)
        if given is not None:
            hidden_states = hidden_states + given * self.given_embedding
        elif self.given_embedding is not None and torch.is_grad_enabled():
            # DDP waits for a gradient of each parameter
            hidden_states = hidden_states + 0 * self.given_embedding
        for block, of_block in zip(self.blocks, of_blocks, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = checkpoint_layer(
                    self._gradient_checkpointing_func, block, hidden_states, time_embedding, of_block
                )
            else:
                hidden_states = block(hidden_states, time_embedding, of_block)
        hidden_states = modulate(hidden_states, shift, scale)
        sample = self.proj_out(hidden_states)  # (B, N, d_z)
        if given is not None and given_latents is not None:
            sample = torch.where(given, given_latents, sample)
        return LDLMTransformer1DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed_times(
        self,
        timesteps: torch.Tensor,
        next_timesteps: torch.Tensor | None,
        guidance: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Embeddings (R, D) of R times, which may have any shape, or of both ends of steps, and of R or 1 weights.

        Of two ends e(s) + f(t) - f(s), which is e(s) for t = s.

        Raises:
            ValueError: second times or weights for a model that knows none, or not as many as first times.
        """
        # the embedder may be cast to half precision; the sinusoids are not
        frequencies = self.time_proj(timesteps.reshape(-1).float()).to(dtype)
        embedding = self.time_embedder(frequencies)
        if self.guidance_embedder is not None:
            weights = torch.ones_like(timesteps) if guidance is None else guidance
            embedding = embedding + self.guidance_embedder(self.time_proj(weights.reshape(-1).float()).to(dtype))
        elif guidance is not None:
            raise ValueError("guidance is for a model with guidance_embeds=True; leave it out.")
        if next_timesteps is None:
            return embedding
        if self.next_time_embedder is None:
            raise ValueError(
                "next_timestep is for a model with next_timestep_conditioning=True, as training/distill.py trains it; "
                "leave it out."
            )
        if next_timesteps.numel() != timesteps.numel():
            raise ValueError(
                f"next_timestep of shape {tuple(next_timesteps.shape)} must have the shape of timestep, "
                f"{tuple(timesteps.shape)}."
            )
        next_frequencies = self.time_proj(next_timesteps.reshape(-1).float()).to(dtype)
        return embedding + self.next_time_embedder(next_frequencies) - self.next_time_embedder(frequencies)

    def modulations(
        self,
        timesteps: torch.Tensor,
        next_timesteps: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor | None]:
        """All that `forward` derives from the time, for each of a grid of times, of which every sample shares one.

        They are computed many times at once and ahead of the steps, each of which would read all of the modulations'
        weights (a third of the model) for a single row. Pass them on to `forward` as `modulation`.

        Args:
            timesteps (`torch.Tensor` of shape `(num_steps,)`): times in [0, 1].
            next_timesteps (`torch.Tensor` of the same shape, *optional*): where each step goes, for a flow map.
            guidance (`torch.Tensor` of the same shape, *optional*): weights, for a model with `guidance_embeds`.

        Returns:
            An iterator over one tensor of shape `(1, 6 * num_layers + 2, width)` a time; over `None`, with which
            `forward` computes it itself, where group offloading has a block's weights at hand in its own turn only.
        """
        for first in range(0, len(timesteps), self._times_modulated_at_once):
            some = slice(first, first + self._times_modulated_at_once)
            ends = None if next_timesteps is None else next_timesteps[some]
            weights = None if guidance is None else guidance[some]
            if any(map(is_group_offloaded, self.blocks.modules())):
                yield from [None] * len(timesteps[some])
            else:
                yield from self._modulate_times(timesteps[some], ends, weights).split(1)

    @apply_forward_hook
    def _modulate_times(
        self, timesteps: torch.Tensor, next_timesteps: torch.Tensor | None, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        """Modulations (S, 6 num_layers + 2, D) of S times, or of the two ends of S steps, and of S weights."""
        time_embedding = self._embed_times(timesteps, next_timesteps, guidance, self.dtype)
        layers = [*(block.get_submodule("modulation") for block in self.blocks), self.modulation_out]
        return torch.cat([part for layer in layers for part in layer(time_embedding)], dim=1)

    def _check_given(
        self, hidden_states: torch.Tensor, given: torch.Tensor, given_latents: torch.Tensor | None
    ) -> torch.Tensor:
        """The given latents, of the noisy ones' type; ValueError unless they fit these."""
        if self.given_embedding is None:
            raise ValueError(
                "given is for a model with role_embeds=True, as training with conditioning.prefix_share or "
                "conditioning.gaps_share makes it; leave it out."
            )
        shape = tuple(hidden_states.shape)
        found = None if given_latents is None else tuple(given_latents.shape)
        if given_latents is None or found != shape or given.dtype != torch.bool or tuple(given.shape) != shape[:2]:
            raise ValueError(
                f"given must be bool of shape {shape[:2]} and given_latents of shape {shape}; got {given.dtype} of "
                f"shape {tuple(given.shape)} and {found}."
            )
        return given_latents.to(hidden_states.dtype)

    def _check_shapes(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        self_condition: torch.Tensor | None,
        modulation: torch.Tensor | None,
    ) -> None:
        expected = (self.config.sample_size, self.config.in_channels)
        if hidden_states.ndim != 3 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)} do not fit this denoiser, which was built for "
                f"(batch_size, sample_size={expected[0]}, in_channels={expected[1]})."
            )
        if timestep.numel() not in (1, hidden_states.shape[0]):
            raise ValueError(
                f"timestep of shape {tuple(timestep.shape)} must hold one time, or one for each of the "
                f"{hidden_states.shape[0]} samples."
            )
        if self_condition is not None and self_condition.shape != hidden_states.shape:
            raise ValueError(
                f"self_condition of shape {tuple(self_condition.shape)} must have the shape of hidden_states, "
                f"{tuple(hidden_states.shape)}."
            )
        expected_modulation = (1, 6 * len(self.blocks) + 2, self.positions.shape[1])
        if modulation is not None and modulation.shape != expected_modulation:
            raise ValueError(
                f"modulation of shape {tuple(modulation.shape)} must be one of those that this denoiser's "
                f"`modulations` gives, of shape {expected_modulation}."
            )


def is_group_offloaded(module: nn.Module) -> bool:
    """Whether a module's weights are at hand in its own turn only."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("group_offloading") is not None
