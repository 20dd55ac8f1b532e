"""The joint objective of LDLM: one batch of token ids → named losses (Eq. 1–4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..loading.checks import check_settings
from ..models.conditions import Conditions
from ..models.latent_decoder import LDLMLatentDecoder
from ..models.latent_encoder import LDLMLatentEncoder
from ..models.token_decoder import LDLMTokenDecoder
from ..models.token_encoder import LDLMTokenEncoder
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers.scheduling_tangent_euler_maruyama import TangentEulerMaruyamaScheduler
from .augmentations import AUGMENTATIONS, add_feature_noise, drop_latents, mask_tokens
from .base import Objective, squared_errors
from .consistency import consistency_losses
from .diffusion import Denoised, denoise, example_errors, guided_target
from .draws import Generators, draw_examples, normal_like, systematic_sample
from .reconstruction import ReconstructionLosses, token_cross_entropy
from .warmup import scale_gradient


RECONSTRUCTION_LOSSES = ("hidden", "token", "hidden+token")
STAGES = ("joint", "autoencoder", "diffusion")


@dataclass
class JointObjectiveSettings:
    """Settings of [`JointObjective`]; every variant of the paper's ablations is one of them.

    Attributes:
        reconstruction: which reconstruction loss shapes the latents: `"hidden"` (the paper's: mean squared error of
            hidden states), `"token"` (cross-entropy alone) or `"hidden+token"`. With either of the last two the
            stop-gradient between latent decoder and token decoder is lifted (Section 6).
        decoder_noise: delta, the standard deviation of the noise on the latent decoder's input (Section 5.4). 3.0 is a
            third party's transcription of the paper's; far too large for a small run, see training/configs/README.md.
        self_conditioning_probability: probability with which an example's denoiser sees its own first estimate; the
            examples of a batch are drawn systematically, so that their number is always the same to within one.
        noise_levels: times K at which each text's latents are denoised in a step (1 in the paper); more of them give
            the denoiser a larger share of the compute.
        guidance_range: lowest and highest weight w of the self-condition that a denoiser with `guidance_embeds` is
            trained for, evenly in log w (see [`guided_target`]); None trains none.
        diffusion_weight: weight of the diffusion loss (the paper's weights are all 1).
        hidden_weight: weight of the hidden-state loss.
        token_weight: weight of the token loss.
        token_share: share of a batch's examples that the token loss is taken on (1.0 in the paper). Less is still
            an unbiased estimate, and saves vocabulary projections where those are most of the cost.
        token_masking: probability with which a token is masked before it is encoded. This and the next two make the
            latents of an autoencoder robust that is trained before the diffusion (COSMOS, Meshchaninov et al., 2025:
            0.3, sqrt(1 - 0.7^2) and 0.4); they go with `stage="autoencoder"` only.
        mask_token_id: what stands for a masked token; the training scripts take the tokenizer's mask token, or its
            end-of-text token where it has none (ours).
        feature_noise: standard deviation n of noise on the hidden states that are encoded, which are scaled by
            sqrt(1 - n^2) so that their variance stays 1.
        latent_dropout: probability with which an entry of the latents is zeroed before they are decoded.
    """

    reconstruction: str = "hidden"
    decoder_noise: float = 3.0
    self_conditioning_probability: float = 0.5
    noise_levels: int = 1
    guidance_range: list[float] | None = None
    diffusion_weight: float = 1.0
    hidden_weight: float = 1.0
    token_weight: float = 1.0
    token_share: float = 1.0
    token_masking: float = 0.0
    mask_token_id: int | None = None
    feature_noise: float = 0.0
    latent_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            reconstruction=RECONSTRUCTION_LOSSES,
            decoder_noise="[0, inf)",
            self_conditioning_probability="[0, 1]",
            noise_levels="[1, inf)",
            diffusion_weight="[0, inf)",
            hidden_weight="[0, inf)",
            token_weight="[0, inf)",
            token_share="(0, 1]",
            token_masking="[0, 1]",
            mask_token_id="[0, inf)",
            feature_noise="[0, 1]",
            latent_dropout="[0, 1)",
        )
        weights = self.guidance_range
        if weights is not None and not (len(weights) == 2 and 0 < weights[0] <= weights[1] < math.inf):
            raise ValueError(f"guidance_range={weights} must be two weights, the lower one first: [0.5, 5].")


@dataclass
class JointLosses:
    """What [`JointObjective`] measures on one batch; the scalars are means over everything they run over.

    The four losses carry their graphs; `total` is the one to call `backward` on. What the stage leaves out is 0.

    Attributes:
        total: the weighted sum that is minimised (Eq. 4).
        hidden: mean squared error of the reconstructed hidden states (Eq. 2).
        token: cross-entropy in nats a token (Eq. 3); 0 without a token decoder.
        diffusion: mean squared error of the predicted clean latents (Eq. 1).
        diffusion_per_example: the same for each example and time, of the shape of the times, for the timestep sampler.
        consistency: how far predictions are from those after the next step; 0 where that is not trained.
        token_accuracy: share of tokens decoded right from the noisy latents; NaN where none are decoded.
        latent_std: standard deviation of the latents' entries.
    """

    total: torch.Tensor
    hidden: torch.Tensor
    token: torch.Tensor
    diffusion: torch.Tensor
    diffusion_per_example: torch.Tensor
    consistency: torch.Tensor
    token_accuracy: torch.Tensor
    latent_std: torch.Tensor


class JointObjective(Objective):
    r"""
    Trains latent encoder, latent decoder, token decoder and denoiser together.

    Latent spaces of two stages (Section 7) train with the same parts: `stage="autoencoder"` has no denoiser and no
    diffusion loss, and `stage="diffusion"` trains a denoiser alone, on the latents of a frozen autoencoder.

    Args:
        token_encoder: frozen (or trained from scratch); fitted before the first batch.
        latent_encoder: E.
        latent_decoder: D.
        token_decoder: trained behind a stop-gradient; `None` leaves it out of joint training (Section 4.1).
        transformer: the denoiser; `None` with `stage="autoencoder"`.
        scheduler: the noise process.
        settings: variants and weights.
        stage: `"joint"`, `"autoencoder"` or `"diffusion"`.
        averaged_transformer: the denoiser with its EMA weights, for the consistency loss.

    Raises:
        ValueError: sizes of components that do not fit each other, or a variant that needs what is not there.
    """

    def __init__(
        self,
        token_encoder: LDLMTokenEncoder,
        latent_encoder: LDLMLatentEncoder,
        latent_decoder: LDLMLatentDecoder,
        token_decoder: LDLMTokenDecoder | None,
        transformer: LDLMTransformer1DModel | None,
        scheduler: TangentEulerMaruyamaScheduler,
        settings: JointObjectiveSettings | None = None,
        stage: str = "joint",
        averaged_transformer: LDLMTransformer1DModel | None = None,
    ):
        super().__init__()
        self.token_encoder = token_encoder
        self.latent_encoder = latent_encoder
        self.latent_decoder = latent_decoder
        self.token_decoder = token_decoder
        self.transformer = transformer
        self.averaged_transformer = averaged_transformer
        self.scheduler = scheduler
        self.settings = settings or JointObjectiveSettings()
        self.stage = stage
        self._check_stage()
        self._check_components()
        if stage == "diffusion":
            for part in (token_encoder, latent_encoder, latent_decoder, token_decoder):
                if part is not None:
                    part.requires_grad_(False)

    def _check_stage(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r} is unknown; it is one of {', '.join(STAGES)}.")
        if (self.transformer is None) != (self.stage == "autoencoder"):
            raise ValueError(
                f"stage={self.stage!r} {'needs a' if self.transformer is None else 'has no'} transformer: there is no "
                "denoiser in the stage 'autoencoder', and one in every other."
            )
        settings = self.settings
        for name in AUGMENTATIONS:
            if getattr(settings, name) and self.stage != "autoencoder":
                raise ValueError(
                    f"{name}={getattr(settings, name)} goes with stage='autoencoder' only, not {self.stage!r}: the "
                    "diffusion loss is taken on latents of undisturbed text."
                )
        if settings.token_masking and settings.mask_token_id is None:
            raise ValueError(f"token_masking={settings.token_masking} needs a mask_token_id.")

    def _check_components(self) -> None:
        reconstruction = self.settings.reconstruction
        if self.token_encoder.config.representation == "scratch" and "hidden" in reconstruction:
            raise ValueError(
                f"reconstruction={reconstruction!r} with representation='scratch' collapses: embeddings that are "
                "trained are a target that moves. Use reconstruction='token'."
            )
        if self.token_decoder is None and "token" in reconstruction:
            raise ValueError(f"reconstruction={reconstruction!r} needs a token decoder in joint training.")
        has_guidance = self.transformer is not None and self.transformer.config.guidance_embeds
        if self.settings.guidance_range is not None and not has_guidance:
            raise ValueError(
                f"guidance_range={self.settings.guidance_range} needs a denoiser that is told the weight: "
                "guidance_embeds=True (model.transformer.guidance_embeds=true in training)."
            )
        encoder, decoder = self.latent_encoder.config, self.latent_decoder.config
        pairs = [
            ("token encoder hidden_size", self.token_encoder.config.hidden_size),
            ("latent encoder token_hidden_size", encoder.token_hidden_size),
            ("latent decoder token_hidden_size", decoder.token_hidden_size),
        ]
        if self.token_decoder is not None:
            pairs.append(("token decoder token_hidden_size", self.token_decoder.config.token_hidden_size))
            check_equal(
                ("token encoder vocab_size", self.token_encoder.config.vocab_size),
                ("token decoder vocab_size", self.token_decoder.config.vocab_size),
            )
        check_equal(*pairs)
        check_equal(
            ("latent encoder sequence_length", encoder.sequence_length),
            ("latent decoder sequence_length", decoder.sequence_length),
        )
        longest = self.token_encoder.config.max_position_embeddings
        if longest is not None and encoder.sequence_length > longest:
            raise ValueError(
                f"sequence_length={encoder.sequence_length} is longer than the token encoder's language model takes, "
                f"max_position_embeddings={longest}; use shorter sequences or another backbone."
            )
        for name, of_denoiser in (("num_latents", "sample_size"), ("latent_size", "in_channels")):
            sizes = [
                (f"latent encoder {name}", getattr(encoder, name)),
                (f"latent decoder {name}", getattr(decoder, name)),
            ]
            if self.transformer is not None:
                sizes.append((f"transformer {of_denoiser}", getattr(self.transformer.config, of_denoiser)))
            check_equal(*sizes)

    def forward(
        self,
        input_ids: torch.Tensor,
        timesteps: torch.Tensor,
        gate: float | torch.Tensor = 1.0,
        generator: Generators = None,
        self_conditioned: Sequence[bool] | None = None,
        guidance: torch.Tensor | None = None,
        next_timesteps: torch.Tensor | None = None,
        consistency_weight: float = 0.0,
        conditions: Conditions | None = None,
    ) -> JointLosses:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): token ids.
            timesteps (`torch.Tensor` of shape `(B,)` or `(B, K)`):
                Times in [0, 1] of the diffusion loss, one or K for each example.
            gate: gamma in [0, 1], the share of the diffusion loss's gradient that reaches the latents (Eq. 28).
            generator:
                Source of all noise; the global one by default. A list gives each example a stream of its own, so that
                its losses do not depend on the batch that it is in.
            self_conditioned (`Sequence[bool]` of length `B` or `B K`):
                Which examples, at which times, are denoised with their own first estimate; drawn by default. No
                tensor: what DDP moves to an accelerator cannot be looked at without waiting for it.
            guidance (as `timesteps`, *optional*):
                Weights of the self-condition that the denoiser is told, whether or not there is one.
            next_timesteps (as `timesteps`, *optional*):
                Where steps from these times lead, for the consistency loss; `None` leaves it out.
            consistency_weight: of that loss.
            conditions: which tokens are given; the losses of the denoiser are those of the others. A denoiser that is
                trained with conditions has to be given some in each pass, if only of no token, or DDP misses a
                parameter.
        """
        mask = None if conditions is None else conditions.attention_mask()  # (B, L, L)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "diffusion"):
            # losses and noise are float32 whatever autocast makes of the layers
            encoded_tokens = self.token_encoder(input_ids, attention_mask=mask, return_dict=True)
            hidden_states = encoded_tokens.hidden_states.float()  # (B, L, D)
            disturbed = self.disturbed_hidden_states(input_ids, hidden_states, generator, mask)
            # while the encoder learns, those that it holds are of another encoder
            learns = self.stage != "diffusion"
            encoded = self.latent_encoder(disturbed, attention_mask=mask, batch_statistics=learns, return_dict=True)
            latents = encoded.latents.float()  # (B, N, d_z)

        # 1. reconstruction from noisy latents
        reconstruction = ReconstructionLosses.none(input_ids.device)
        if self.stage != "diffusion":
            reconstruction = self.reconstruction_losses(latents, hidden_states, input_ids, generator)
        # 2. diffusion
        diffusion_per_example = torch.zeros(timesteps.shape, device=input_ids.device)
        consistency = diffusion_per_example.new_zeros(())
        if self.stage != "autoencoder":
            diffusion_per_example, consistency = self.denoising_losses(
                scale_gradient(latents, gate),
                timesteps,
                generator,
                self_conditioned,
                guidance,
                next_timesteps,
                conditions,
            )
        diffusion = diffusion_per_example.mean()

        settings = self.settings
        total = settings.diffusion_weight * diffusion + settings.token_weight * reconstruction.token
        total = total + consistency_weight * consistency
        if "hidden" in settings.reconstruction:
            total = total + settings.hidden_weight * reconstruction.hidden
        return JointLosses(
            total=total,
            hidden=reconstruction.hidden,
            token=reconstruction.token,
            diffusion=diffusion,
            diffusion_per_example=diffusion_per_example,
            consistency=consistency,
            token_accuracy=reconstruction.token_accuracy,
            latent_std=latents.detach().std(),
        )

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Any]:
        """Arguments of `forward` for a batch of no particular text, to count what a pass costs."""
        settings = self.settings
        timesteps = torch.full((batch_size, settings.noise_levels), 0.5)
        drawn = systematic_sample(timesteps.numel(), settings.self_conditioning_probability, offset=0.5)
        return {
            "input_ids": torch.zeros(batch_size, sequence_length, dtype=torch.long),
            "timesteps": timesteps,
            "self_conditioned": drawn,
            "guidance": None if settings.guidance_range is None else torch.ones_like(timesteps),
            "next_timesteps": None if self.averaged_transformer is None else timesteps / 2,
        }

    def disturbed_hidden_states(
        self,
        input_ids: torch.Tensor,
        hidden_states: torch.Tensor,
        generator: Generators,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What is encoded (B, L, D): the hidden states, or with augmentations those of a masked text, noised.

        The reconstruction's targets are the hidden states and tokens of the text as it is.
        """
        settings = self.settings
        if settings.token_masking:
            assert settings.mask_token_id is not None  # _check_stage has refused this
            masked_ids = mask_tokens(input_ids, settings.token_masking, settings.mask_token_id, generator)
            encoded = self.token_encoder(masked_ids, attention_mask=mask, return_dict=True)
            hidden_states = encoded.hidden_states.float()
        if settings.feature_noise:
            hidden_states = add_feature_noise(hidden_states, settings.feature_noise, generator)
        return hidden_states

    def reconstruction_losses(
        self,
        latents: torch.Tensor,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        generator: Generators = None,
    ) -> ReconstructionLosses:
        """Hidden-state loss (Eq. 2) and token loss (Eq. 3) from latents (B, N, d_z) with decoder noise."""
        if self.settings.latent_dropout:
            latents = drop_latents(latents, self.settings.latent_dropout, generator)
        noisy_latents = latents + self.settings.decoder_noise * normal_like(latents, generator)
        predicted = self.latent_decoder(noisy_latents, return_dict=True).hidden_states  # (B, L, D)
        hidden = squared_errors(predicted, hidden_states).mean()
        return ReconstructionLosses(hidden, *self.token_losses(predicted, input_ids))

    def token_losses(self, predicted: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy (Eq. 3) and accuracy of the token decoder on reconstructed hidden states (B, L, D)."""
        if self.token_decoder is None:
            return predicted.new_zeros(()), predicted.new_full((), torch.nan)
        if "token" not in self.settings.reconstruction:
            predicted = predicted.detach()
        # examples of a batch come in random order, so its first ones are as good as any
        num_examples = math.ceil(self.settings.token_share * len(input_ids))
        predicted, input_ids = predicted[:num_examples], input_ids[:num_examples]
        return token_cross_entropy(self.token_decoder(predicted, return_dict=True).logits, input_ids)

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        generator: Generators = None,
        self_conditioned: Sequence[bool] | None = None,
        guidance: torch.Tensor | None = None,
        given: dict[str, torch.Tensor] | None = None,
    ) -> Denoised:
        """The denoiser's pass on latents (B, N, d_z) with noise of times (B,)."""
        assert self.transformer is not None, "the stage 'autoencoder' has no diffusion loss"
        noise = normal_like(latents, generator)
        probability = self.settings.self_conditioning_probability
        if self_conditioned is None:
            self_conditioned = draw_examples(len(latents), probability, generator)
        return denoise(
            self.transformer,
            self.scheduler,
            latents,
            timesteps,
            noise,
            self_conditioned if probability else None,
            guidance,
            given,
        )

    def denoising_losses(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        generator: Generators,
        self_conditioned: Sequence[bool] | None,
        guidance: torch.Tensor | None,
        next_timesteps: torch.Tensor | None,
        conditions: Conditions | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What trains the denoiser on latents (B, N, d_z): the diffusion loss of each example at each of its times, of
        their shape, and the consistency loss; arguments as of `forward`."""
        shape, levels = timesteps.shape, timesteps[:1].numel()
        # a view, no copy, for one time of each example
        latents = latents[:, None].expand(-1, levels, -1, -1).flatten(0, 1)
        given: dict[str, torch.Tensor] = {}
        if conditions is not None:
            given = conditions.repeat(levels).of_denoiser(latents)
        timesteps = timesteps.flatten()
        if isinstance(generator, list):
            generator = [one for one in generator for _ in range(levels)]
        if guidance is not None:
            guidance = guidance.flatten()
        denoised = self.denoise(latents, timesteps, generator, self_conditioned, guidance, given)
        target = latents if guidance is None else guided_target(latents, denoised, guidance)
        consistency = latents.new_zeros(())
        if next_timesteps is not None:
            assert self.averaged_transformer is not None, "the consistency loss needs the denoiser's EMA weights"
            consistency = consistency_losses(
                self.averaged_transformer, self.scheduler, denoised, timesteps, next_timesteps.flatten(), given
            ).mean()
        errors = example_errors(denoised.clean_latents, target, given.get("given"))
        return errors.view(shape), consistency


def check_equal(*named_sizes: tuple[str, int]) -> None:
    """Raises ValueError, naming all, unless the sizes agree."""
    if len({size for _, size in named_sizes}) > 1:
        listed = ", ".join(f"{name}={size}" for name, size in named_sizes)
        raise ValueError(f"These must be equal: {listed}.")
