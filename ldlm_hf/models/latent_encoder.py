"""The trainable latent encoder E: hidden states of the frozen language model → latents (Section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput, can_return_tuple

from ..loading.checks import check_settings
from .conditions import check_attention_mask
from .layers import PerceiverLayer, SelfAttentionLayer, SequenceMapper, initialize_layer
from .pretrained_model import LDLMPreTrainedModel


ARCHITECTURES = ("perceiver", "self_attention", "identity")


class LDLMLatentConfig(PretrainedConfig):
    """What the configurations of latent encoder and latent decoder share; both map one sequence to another.

    Args:
        hidden_size: width of the layers.
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads; must divide `hidden_size`.
        intermediate_size: inner width of the feed-forward.
        sequence_length: tokens L.
        num_latents: latents N; with `architecture="self_attention"` or `"identity"` it must equal `sequence_length`.
        latent_size: width d_z of a latent.
        token_hidden_size: width D of the token encoder's hidden states.
        architecture: `"perceiver"` (Perceiver Resampler), `"self_attention"` (App. B.4) or `"identity"`: the hidden
            states themselves are the latents, and the sizes of layers say nothing. With the token encoder's three
            representations these are the latent spaces of TEncDM (Shabalin et al., 2025: `"hidden"`), SED (Strudel et
            al., 2023: `"embedding"`) and Diffusion-LM (Li et al., 2022: `"scratch"`).
        aligned_queries: start the Perceiver's query i beside its key i (ours; it shortens the first phase of
            training and changes no formula). False starts them independent, as a plain Perceiver Resampler does.
        initializer_range: standard deviation of learned positions and latents at the start.
        standardize_latents: whether latents have zero mean and unit variance in each dimension, by statistics that
            the models hold: of a frozen autoencoder, whose diffusion is trained in a second stage (COSMOS,
            Meshchaninov et al., 2025), or, for the encoder alone, from the first step of joint training on (ours). The
            paper's joint training leaves their scale free.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown architecture.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        sequence_length: int = 1024,
        num_latents: int = 1024,
        latent_size: int = 768,
        token_hidden_size: int = 768,
        architecture: str = "perceiver",
        aligned_queries: bool = True,
        initializer_range: float = 0.02,
        standardize_latents: bool = False,
        **kwargs: Any,
    ):
        check_settings(
            LDLMLatentConfig.__init__,
            locals(),
            hidden_size="[1, inf)",
            num_hidden_layers="[1, inf)",
            num_attention_heads="[1, inf)",
            intermediate_size="[1, inf)",
            sequence_length="[1, inf)",
            num_latents="[1, inf)",
            latent_size="[1, inf)",
            token_hidden_size="[1, inf)",
            initializer_range="[0, inf)",
        )
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture={architecture!r} is unknown; it is one of {', '.join(ARCHITECTURES)}.")
        if architecture != "perceiver" and num_latents != sequence_length:
            raise ValueError(
                f"num_latents={num_latents} with architecture={architecture!r} must equal "
                f"sequence_length={sequence_length}, since it gives one latent a token; or use 'perceiver'."
            )
        if architecture == "identity" and latent_size != token_hidden_size:
            raise ValueError(
                f"latent_size={latent_size} with architecture='identity' must equal token_hidden_size="
                f"{token_hidden_size}, since the hidden states themselves are the latents."
            )
        check_attention_heads(hidden_size, num_attention_heads)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.sequence_length = sequence_length
        self.num_latents = num_latents
        self.latent_size = latent_size
        self.token_hidden_size = token_hidden_size
        self.architecture = architecture
        self.aligned_queries = aligned_queries
        self.initializer_range = initializer_range
        self.standardize_latents = standardize_latents
        super().__init__(**kwargs)


def check_attention_heads(hidden_size: int, num_attention_heads: int) -> None:
    """Raises ValueError unless the width splits evenly into the heads."""
    if hidden_size % num_attention_heads:
        raise ValueError(f"num_attention_heads={num_attention_heads} must divide hidden_size={hidden_size}.")


class LDLMLatentEncoderConfig(LDLMLatentConfig):
    """Configuration of [`LDLMLatentEncoder`]; the fields are those of [`LDLMLatentConfig`]."""

    model_type = "ldlm_latent_encoder"
    # transformers 5 gives a configuration class that has no constructor of its own one without the inherited fields
    __init__ = LDLMLatentConfig.__init__


@dataclass
class LDLMLatentEncoderOutput(ModelOutput):
    """
    Attributes:
        latents (`torch.FloatTensor` of shape `(batch_size, num_latents, latent_size)`): latents of free magnitude.
    """

    latents: torch.Tensor | None = None


class LDLMLatentPreTrainedModel(LDLMPreTrainedModel):
    """What latent encoder and latent decoder share: projections to and from the layers' width, and the layers."""

    base_model_prefix = "ldlm_latent"
    _no_split_modules = [PerceiverLayer.__name__, SelfAttentionLayer.__name__]
    # the name of diffusers' convention, which `compile_repeated_blocks` reads
    _repeated_blocks = [PerceiverLayer.__name__, SelfAttentionLayer.__name__]
    _keep_in_fp32_modules_strict = ["latents_mean", "latents_std"]

    def __init__(
        self, config: LDLMLatentConfig, input_size: int, input_length: int, output_size: int, output_length: int
    ):
        super().__init__(config)
        width = config.hidden_size
        self.mapper = None
        if config.architecture == "identity":
            # a model of transformers finds its device and its type by a parameter
            self.no_weights = nn.Parameter(torch.empty(0), requires_grad=False)
        else:
            # at the paper's geometry all widths are equal, and there is no projection
            self.proj_in = nn.Identity() if input_size == width else nn.Linear(input_size, width)
            self.mapper = SequenceMapper(
                config.architecture,
                width,
                config.num_hidden_layers,
                config.num_attention_heads,
                config.intermediate_size,
                input_length,
                output_length,
                config.aligned_queries,
            )
            self.proj_out = nn.Identity() if output_size == width else nn.Linear(width, output_size)
        if config.standardize_latents:
            self.set_latent_statistics(torch.zeros(config.latent_size), torch.ones(config.latent_size))
        self.gradient_checkpointing = False
        self.post_init()

    def set_latent_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Makes the mean and standard deviation of each dimension of the latents, (d_z,), part of the weights.

        The latent encoder divides by what the latent decoder multiplies with, so both must be given the same.
        """
        self.config.standardize_latents = True
        self.register_buffer("latents_mean", mean.detach().float().clone())
        self.register_buffer("latents_std", std.detach().float().clone())

    def _init_weights(self, module: nn.Module) -> None:
        initialize_layer(module, self.config.initializer_range)
        if module is self and self.config.standardize_latents:
            nn.init.zeros_(self.latents_mean)
            nn.init.ones_(self.latents_std)

    def map_sequence(self, sequence: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, input_length, input_size) → (B, output_length, output_size)"""
        self.check_outputs()
        if self.mapper is None:
            return sequence
        checkpoint_function = self._gradient_checkpointing_func if self.gradient_checkpointing else None
        return self.proj_out(self.mapper(self.proj_in(sequence), attention_mask, checkpoint_function))


class LDLMLatentEncoder(LDLMLatentPreTrainedModel):
    r"""
    The latent encoder E of LDLM: reshapes the standardised hidden states of the frozen token encoder into latents that
    are easy to denoise and to decode. Its output has no norm: the magnitude of the latents is learned, since decoder
    noise and warmup act through it.

    Example:

    ```python
    >>> import torch
    >>> from ldlm_hf import LDLMLatentEncoder, LDLMLatentEncoderConfig

    >>> config = LDLMLatentEncoderConfig(num_hidden_layers=1, sequence_length=16, num_latents=8)
    >>> LDLMLatentEncoder(config)(torch.randn(2, 16, 768)).latents.shape
    torch.Size([2, 8, 768])
    ```
    """

    config_class = LDLMLatentEncoderConfig
    main_input_name = "hidden_states"

    def __init__(self, config: LDLMLatentEncoderConfig):
        super().__init__(
            config, config.token_hidden_size, config.sequence_length, config.latent_size, config.num_latents
        )

    @can_return_tuple
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        batch_statistics: bool = False,
    ) -> LDLMLatentEncoderOutput:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, token_hidden_size)`):
                Standardised hidden states of [`LDLMTokenEncoder`].
            attention_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length, sequence_length)`, *optional*):
                Whether the latent of token i may attend to token j and its latent; for a model with a latent for each
                token. `None` stands for all.
            batch_statistics: standardise latents by their own batch's mean and standard deviation, through which their
                gradient goes, instead of by those that the model holds: as joint training does, which changes both.
            return_dict: whether to return an [`LDLMLatentEncoderOutput`] instead of a tuple; as the configuration has
                it by default.

        Raises:
            ValueError: the sequence is not as long or as wide as the model was built for, or a mask where no latent
                belongs to a token.
        """
        length, width = hidden_states.shape[-2:]
        config = self.config
        if hidden_states.ndim != 3 or width != config.token_hidden_size or length != config.sequence_length:
            raise ValueError(
                f"hidden_states of shape {tuple(hidden_states.shape)} do not fit this latent encoder, which takes "
                f"(batch_size, {config.sequence_length}, {config.token_hidden_size}): sequence_length="
                f"{config.sequence_length}, token_hidden_size={config.token_hidden_size}."
            )
        if attention_mask is not None and config.num_latents != length:
            raise ValueError(
                f"attention_mask: this latent encoder has num_latents={config.num_latents} for sequence_length="
                f"{length}, so no latent belongs to a token, and texts cannot be given in part."
            )
        if attention_mask is not None:
            check_attention_mask(attention_mask, *hidden_states.shape[:2])
        latents = self.map_sequence(hidden_states, attention_mask)  # (B, N, d_z)
        if config.standardize_latents:
            mean, std = self.latents_mean, self.latents_std
            if batch_statistics:
                std, mean = torch.std_mean(latents.float(), dim=(0, 1), correction=0)
            latents = ((latents.float() - mean) / std).to(latents.dtype)
        return LDLMLatentEncoderOutput(latents=latents)
