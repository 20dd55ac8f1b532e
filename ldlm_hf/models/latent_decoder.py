"""The trainable latent decoder D: latents → hidden states of the frozen language model (Section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput, can_return_tuple

from .latent_encoder import LDLMLatentConfig, LDLMLatentPreTrainedModel


class LDLMLatentDecoderConfig(LDLMLatentConfig):
    """Configuration of [`LDLMLatentDecoder`]; the fields are those of [`LDLMLatentConfig`]."""

    model_type = "ldlm_latent_decoder"
    # transformers 5 gives a configuration class that has no constructor of its own one without the inherited fields
    __init__ = LDLMLatentConfig.__init__


@dataclass
class LDLMLatentDecoderOutput(ModelOutput):
    """
    Attributes:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, token_hidden_size)`):
            Reconstruction of the token encoder's standardised hidden states.
    """

    hidden_states: torch.Tensor | None = None


class LDLMLatentDecoder(LDLMLatentPreTrainedModel):
    r"""
    The latent decoder D of LDLM: maps latents (noisy ones in training, clean ones in sampling) back to the
    standardised hidden states of the frozen token encoder (Eq. 2).
    """

    config_class = LDLMLatentDecoderConfig
    main_input_name = "latents"

    def __init__(self, config: LDLMLatentDecoderConfig):
        super().__init__(
            config, config.latent_size, config.num_latents, config.token_hidden_size, config.sequence_length
        )

    @can_return_tuple
    def forward(self, latents: torch.Tensor) -> LDLMLatentDecoderOutput:
        """
        Args:
            latents (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`): latents, clean or noisy.
            return_dict: whether to return an [`LDLMLatentDecoderOutput`] instead of a tuple; as the configuration has
                it by default.

        Raises:
            ValueError: the latents are not as many or as wide as those the model was trained on.
        """
        config = self.config
        if latents.ndim != 3 or tuple(latents.shape[1:]) != (config.num_latents, config.latent_size):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} do not fit this latent decoder, which was built for "
                f"(batch_size, num_latents={config.num_latents}, latent_size={config.latent_size})."
            )
        if config.standardize_latents:
            latents = (latents.float() * self.latents_std + self.latents_mean).to(latents.dtype)
        hidden_states = self.map_sequence(latents)  # (B, L, D)
        return LDLMLatentDecoderOutput(hidden_states=hidden_states)
