"""Training of a token decoder of any depth on frozen components (Section 4.1, App. B.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import nn
from transformers import AutoTokenizer

from ...data import DataSettings
from ...loading.checks import check_settings
from ...loading.settings_reader import arguments_of
from ...models.conditions import Conditions
from ...models.latent_decoder import LDLMLatentDecoder
from ...models.latent_encoder import LDLMLatentEncoder
from ...models.token_decoder import LDLMTokenDecoder, LDLMTokenDecoderConfig
from ...models.token_encoder import LDLMTokenEncoder
from ...models.transformer_ldlm import LDLMTransformer1DModel
from ...objective.base import Objective
from ...objective.diffusion import denoise
from ...objective.draws import Generators, normal_like
from ...objective.reconstruction import token_cross_entropy
from ...pipelines.pipeline_ldlm import LDLMPipeline
from ...schedulers.scheduling_tangent import TangentScheduler
from ..components import build_pipeline, build_token_decoder, load_part, load_pipeline_settings
from ..randomness import RowRandomness
from ..recipe import Evaluation, PipelineRecipe, StepLosses
from ..settings import EvaluationSettings, LoopSettings, OptimizerSettings, check_decay, check_shifts


READS = ("hidden_states", "latents")


@dataclass
class TokenDecoderSettings:
    """All settings of `train_token_decoder.py`.

    Attributes:
        components: folder or Hub id of a pipeline with encoders, or what `train_joint.py` left with
            `train_token_decoder=false`.
        reads: `hidden_states` (reconstructed by the latent decoder) or `latents`, which leaves the latent decoder out
            of the pipeline (App. B.2).
        decoder_noise: delta; that of joint training.
        denoised_from: the token decoder reads what the denoiser makes, in one pass, of latents with noise of times
            that are uniform in [0, this], so that it learns to repair the denoiser's errors (ours); 0 leaves the
            denoiser out.
        token_decoder: fields of `LDLMTokenDecoderConfig`.
        head_from: language model whose token embeddings, their common mean taken off, the vocabulary head starts from
            (ours; see `model.token_decoder_head_from_backbone` of joint training).
    """

    components: str = ""
    reads: str = "hidden_states"
    decoder_noise: float = 3.0
    denoised_from: float = 0.0
    token_decoder: dict[str, Any] = arguments_of(LDLMTokenDecoderConfig.__init__)
    head_from: str | None = None
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(output_dir="runs/token-decoder", max_steps=200_000)
    )
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        check_settings(type(self).__init__, vars(self), reads=READS, decoder_noise="[0, inf)", denoised_from="[0, 1]")
        check_decay(self.optimizer, self.loop)
        check_shifts(self.data, self.loop)


class TokenDecoderLosses(NamedTuple):
    """Mean cross-entropy in nats a token, and accuracy."""

    total: torch.Tensor
    accuracy: torch.Tensor


class TokenDecoderObjective(Objective):
    """Token loss (Eq. 3) of a token decoder on frozen encoders' noisy latents, denoised or not, decoded to hidden
    states or not.
    """

    def __init__(
        self,
        token_encoder: LDLMTokenEncoder,
        latent_encoder: LDLMLatentEncoder,
        latent_decoder: LDLMLatentDecoder | None,
        token_decoder: LDLMTokenDecoder,
        decoder_noise: float,
        transformer: LDLMTransformer1DModel | None = None,
        scheduler: TangentScheduler | None = None,
    ):
        super().__init__()
        self.token_encoder = token_encoder.requires_grad_(False)
        self.latent_encoder = latent_encoder.requires_grad_(False)
        self.latent_decoder = None if latent_decoder is None else latent_decoder.requires_grad_(False)
        self.token_decoder = token_decoder
        self.decoder_noise = decoder_noise
        self.transformer = None if transformer is None else transformer.requires_grad_(False)
        self.scheduler = scheduler

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Any]:
        """Arguments of `forward` for a batch of no particular text, to count what a pass costs."""
        timesteps = None if self.transformer is None else torch.full((batch_size,), 0.5)
        return {"input_ids": torch.zeros(batch_size, sequence_length, dtype=torch.long), "timesteps": timesteps}

    def forward(
        self,
        input_ids: torch.Tensor,
        decoder_noise: float | None = None,
        generator: Generators = None,
        timesteps: torch.Tensor | None = None,
        given: torch.Tensor | None = None,
    ) -> TokenDecoderLosses:
        """Loss and accuracy on token ids (B, L), at the decoder noise of training or another; with `timesteps` (B,) on
        latents that were noised to these times and denoised; `given` (B, L) says which tokens of pairs are a source's.
        """
        noise_level = self.decoder_noise if decoder_noise is None else decoder_noise
        conditions = None if given is None else Conditions(given)
        mask = None if conditions is None else conditions.attention_mask()
        with torch.no_grad():
            hidden_states = self.token_encoder(input_ids, attention_mask=mask, return_dict=True).hidden_states
            latents = self.latent_encoder(hidden_states, attention_mask=mask, return_dict=True).latents.float()
            if timesteps is not None:
                latents = self.denoised(latents, timesteps, generator, conditions)
            if noise_level:
                latents = latents + noise_level * normal_like(latents, generator)
            decoded = latents
            if self.latent_decoder is not None:
                decoded = self.latent_decoder(latents, return_dict=True).hidden_states
        logits = self.token_decoder(decoded, return_dict=True).logits
        return TokenDecoderLosses(*token_cross_entropy(logits, input_ids))

    def denoised(
        self, latents: torch.Tensor, timesteps: torch.Tensor, generator: Generators, conditions: Conditions | None
    ) -> torch.Tensor:
        """The denoiser's prediction (B, N, d_z), from its own first estimate where it is used to that."""
        assert self.transformer is not None and self.scheduler is not None
        self_conditioned = [True] * len(latents) if self.transformer.config.self_conditioning else None
        noise = normal_like(latents, generator)
        given = None if conditions is None else conditions.of_denoiser(latents)
        denoised = denoise(self.transformer, self.scheduler, latents, timesteps, noise, self_conditioned, given=given)
        return denoised.clean_latents.float()


class TokenDecoderRecipe(PipelineRecipe):
    """Training of a token decoder alone."""

    settings_class = TokenDecoderSettings
    settings: TokenDecoderSettings
    module: TokenDecoderObjective

    def load(self) -> None:
        components = load_components(self.settings)
        self.sequence_length = components["latent_encoder"].config.sequence_length
        # what the pipeline has beside what is trained
        source = self.settings.components
        self.transformer, self.scheduler = (load_part(source, name) for name in ("transformer", "scheduler"))
        denoiser = {}
        if self.settings.denoised_from:
            denoiser = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.module = TokenDecoderObjective(**components, **denoiser, decoder_noise=self.settings.decoder_noise)
        self.tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
        self.pipeline_settings = load_pipeline_settings(source)
        source_length = self.pipeline_settings.get("source_length")
        if source_length != self.settings.data.source_length:
            raise ValueError(
                f"data.source_length={self.settings.data.source_length}, but components={source!r} have "
                f"source_length={source_length}, which their pipeline keeps: train on text of the same kind."
            )

    def expected_scheduler(self) -> SchedulerMixin:
        return self.scheduler

    def pipeline(self, snapshot: TokenDecoderObjective) -> LDLMPipeline:
        others = {"transformer": self.transformer, "tokenizer": self.tokenizer, "scheduler": self.scheduler}
        return build_pipeline(snapshot, **others, **self.pipeline_settings).to(self.device)

    def losses(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        step: int,
        randomness: RowRandomness,
        given: torch.Tensor | None = None,
    ) -> StepLosses:
        device, timesteps = input_ids.device, None
        if self.settings.denoised_from:
            timesteps = (self.settings.denoised_from * randomness.uniform()).float().to(device, non_blocking=True)
        generators = randomness.generators(device)
        loss, accuracy = module(input_ids, generator=generators, timesteps=timesteps, given=given)
        return StepLosses(total=loss, values={"token_loss": loss, "token_accuracy": accuracy})

    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        loss = correct = 0.0
        for rows in torch.arange(len(self.held_out)).split(self.settings.evaluation.batch_size):
            input_ids = self.held_out[rows].to(self.device)
            given = None if self.held_out_given is None else self.held_out_given[rows].to(self.device)
            token_loss, accuracy = snapshot(input_ids, decoder_noise=0.0, given=given)
            loss += float(token_loss) * len(input_ids)
            correct += float(accuracy) * len(input_ids)
        count = len(self.held_out)
        return Evaluation({"token_loss": loss / count, "reconstruction_accuracy": correct / count})


def load_components(settings: TokenDecoderSettings) -> dict[str, Any]:
    """The frozen components of a pipeline, and a new token decoder that fits them."""
    if not settings.components:
        raise ValueError("components='' names nothing to train on; set components=RUN/pipeline or a Hub id.")
    source = settings.components
    token_encoder, latent_encoder = load_part(source, "token_encoder"), load_part(source, "latent_encoder")
    latent_decoder = None
    input_size = latent_encoder.config.latent_size
    if settings.reads == "hidden_states":
        latent_decoder = load_part(source, "latent_decoder")
        input_size = latent_decoder.config.token_hidden_size
    elif latent_encoder.config.num_latents != latent_encoder.config.sequence_length:
        raise ValueError(
            f"reads='latents' needs a latent for each token, but these components have num_latents="
            f"{latent_encoder.config.num_latents} for sequence_length={latent_encoder.config.sequence_length}; use "
            "reads='hidden_states'."
        )
    derived = {"vocab_size": token_encoder.config.vocab_size, "token_hidden_size": input_size}
    for key in derived.keys() & settings.token_decoder.keys():
        raise ValueError(f"token_decoder.{key} follows from the components ({derived[key]} here); leave it out.")
    return {
        "token_encoder": token_encoder,
        "latent_encoder": latent_encoder,
        "latent_decoder": latent_decoder,
        "token_decoder": build_token_decoder(derived | settings.token_decoder, settings.head_from),
    }
