"""Builds a run's tokenizer, models and objective from its settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..loading.pretrained_sources import resolve_pretrained_source
from ..models.latent_decoder import LDLMLatentDecoder, LDLMLatentDecoderConfig
from ..models.latent_encoder import LDLMLatentEncoder, LDLMLatentEncoderConfig
from ..models.token_decoder import LDLMTokenDecoder, LDLMTokenDecoderConfig
from ..models.token_encoder import LDLMTokenEncoder
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..objective import ConsistencySettings, JointObjective
from ..pipelines.pipeline_ldlm import LDLMPipeline
from ..schedulers.scheduling_tangent_euler_maruyama import TangentEulerMaruyamaScheduler
from .settings import ModelSettings, RunSettings


# parts of a pipeline's folder, in the order in which text passes through them
PARTS: dict[str, Any] = {
    "token_encoder": LDLMTokenEncoder,
    "latent_encoder": LDLMLatentEncoder,
    "latent_decoder": LDLMLatentDecoder,
    "token_decoder": LDLMTokenDecoder,
    "transformer": LDLMTransformer1DModel,
    "scheduler": TangentEulerMaruyamaScheduler,
}
AUTOENCODER = ("token_encoder", "latent_encoder", "latent_decoder", "token_decoder")


def load_part(source: str, name: str) -> Any:
    """A part of a pipeline, or of what a run has left that trained no whole one: folder or Hub id. Weights that are
    stored in half precision are trained in float32."""
    part_class = PARTS[name]
    if name == "scheduler":
        # whichever the pipeline has: one of diffusers', where ours are registered too
        part_class = getattr(diffusers, part_class.load_config(source, subfolder=name)["_class_name"])
    part = part_class.from_pretrained(source, subfolder=name)
    return part.float() if isinstance(part, nn.Module) else part


def load_pipeline_settings(source: str) -> dict[str, Any]:
    """What a pipeline keeps beside its components; nothing of what a run has left that trained no whole one."""
    try:
        config = LDLMPipeline.load_config(source)
    except OSError:
        return {}
    return without_nones({name: config.get(name) for name in LDLMPipeline.saved_settings})


def without_nones(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are set."""
    return {name: value for name, value in values.items() if value is not None}


def build_tokenizer(settings: RunSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of the frozen components, the one that the settings name, or the backbone's own."""
    if settings.components:
        return AutoTokenizer.from_pretrained(settings.components, subfolder="tokenizer")
    model = settings.model
    source = resolve_pretrained_source(model.tokenizer or model.backbone)
    return AutoTokenizer.from_pretrained(source.name_or_path, **source.kwargs)


def build_token_encoder(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> LDLMTokenEncoder:
    """The frozen token encoder, not fitted yet; ValueError where the tokenizer does not fit the backbone."""
    token_encoder = LDLMTokenEncoder.from_backbone(
        settings.backbone,
        layer=settings.layer,
        representation=settings.representation,
        normalize_embeddings=settings.normalize_embeddings,
        prefix=settings.prefix,
        tokenizer=tokenizer,
    )
    config = token_encoder.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer, {tokenizer.name_or_path!r}, has {len(tokenizer)} tokens, but model.backbone="
            f"{settings.backbone!r} knows {config.vocab_size}; they have to be of one language model."
        )
    return token_encoder


def build_models(settings: RunSettings, token_encoder: LDLMTokenEncoder) -> dict[str, Any]:
    """The trained components by the pipeline's names; sizes that others determine are filled in."""
    model = settings.model
    if model.latent_encoder.get("architecture") == "identity":
        encoder_width = token_encoder.config.hidden_size
    else:
        encoder_width = model.latent_encoder.get("hidden_size", LDLMLatentEncoderConfig().hidden_size)
    geometry = {
        "sequence_length": model.sequence_length,
        "num_latents": model.num_latents or model.sequence_length,
        "latent_size": model.latent_size or encoder_width,
        "token_hidden_size": token_encoder.config.hidden_size,
    }
    denoiser_geometry = {
        "in_channels": geometry["latent_size"],
        "sample_size": geometry["num_latents"],
        **role_arguments(settings),
    }
    decoder_geometry = {
        "vocab_size": token_encoder.config.vocab_size,
        "token_hidden_size": token_encoder.config.hidden_size,
    }
    for section, derived in (
        ("latent_encoder", geometry),
        ("latent_decoder", geometry),
        ("token_decoder", decoder_geometry),
        ("transformer", denoiser_geometry),
    ):
        for key in derived.keys() & getattr(model, section).keys():
            raise ValueError(
                f"model.{section}.{key} follows from the other components ({derived[key]} here); set "
                "model.sequence_length, model.num_latents, model.latent_size, model.backbone or conditioning instead."
            )
    token_decoder = None
    if settings.train_token_decoder:
        head_from = model.backbone if model.token_decoder_head_from_backbone else None
        token_decoder = build_token_decoder(decoder_geometry | model.token_decoder, head_from)
    return {
        "latent_encoder": LDLMLatentEncoder(LDLMLatentEncoderConfig(**geometry, **model.latent_encoder)),
        "latent_decoder": LDLMLatentDecoder(LDLMLatentDecoderConfig(**geometry, **model.latent_decoder)),
        "token_decoder": token_decoder,
        "transformer": None
        if settings.stage == "autoencoder"
        else LDLMTransformer1DModel(**denoiser_geometry, **model.transformer),
        "scheduler": TangentEulerMaruyamaScheduler(**model.scheduler),
    }


def role_arguments(settings: RunSettings) -> dict[str, bool]:
    """What makes a denoiser one that is told what is given, where a run gives anything."""
    return {"role_embeds": True} if settings.gives_texts else {}


def build_token_decoder(arguments: dict[str, Any], head_from: str | None = None) -> LDLMTokenDecoder:
    """A new token decoder; its head may start from the token embeddings of a language model, their mean taken off."""
    token_decoder = LDLMTokenDecoder(LDLMTokenDecoderConfig(**arguments))
    if head_from is None:
        return token_decoder
    embeddings = LDLMTokenEncoder.from_backbone(head_from, representation="embedding").embedding.weight
    head = token_decoder.head.weight
    if embeddings.shape != head.shape:
        raise ValueError(
            f"The vocabulary head is to start from the token embeddings of {head_from!r}, of shape "
            f"{tuple(embeddings.shape)}, but has the shape {tuple(head.shape)}: set the token decoder's hidden_size="
            f"{embeddings.shape[1]}."
        )
    with torch.no_grad():
        # what all embeddings share tells no token from another
        head.copy_(embeddings - embeddings.mean(0))
    return token_decoder


def build_objective(
    settings: RunSettings, token_encoder: LDLMTokenEncoder, tokenizer: PreTrainedTokenizerBase | None = None
) -> JointObjective:
    """The joint objective over new models and a token encoder; the tokenizer says which token is the mask."""
    variant = settings.objective
    if variant.token_masking and variant.mask_token_id is None and tokenizer is not None:
        mask_token_id = tokenizer.eos_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        variant = replace(variant, mask_token_id=mask_token_id)
    models = build_models(settings, token_encoder)
    averaged_transformer = build_averaged_transformer(models["transformer"], settings.consistency)
    return JointObjective(
        token_encoder,
        **models,
        settings=variant,
        stage=settings.stage,
        averaged_transformer=averaged_transformer,
    )


def build_averaged_transformer(
    transformer: LDLMTransformer1DModel | None, settings: ConsistencySettings
) -> LDLMTransformer1DModel | None:
    """A copy of the denoiser that will hold its EMA weights, where the consistency loss needs one."""
    return copy.deepcopy(transformer).requires_grad_(False) if transformer is not None and settings.weight else None


def load_autoencoder(settings: RunSettings) -> dict[str, Any]:
    """The parts of `components` but denoiser and scheduler; ValueError unless their length is that of the settings."""
    autoencoder = {name: load_part(settings.components, name) for name in AUTOENCODER if name != "token_encoder"}
    autoencoder["token_encoder"] = load_token_encoder(settings)
    length = autoencoder["latent_encoder"].config.sequence_length
    if settings.model.sequence_length != length:
        raise ValueError(
            f"model.sequence_length={settings.model.sequence_length} is not that of "
            f"components={settings.components!r}, {length}."
        )
    return autoencoder


def load_token_encoder(settings: RunSettings) -> LDLMTokenEncoder:
    """That of `components`, or where their pipeline has none, a new one from `model.backbone`, not fitted yet."""
    try:
        is_missing = LDLMPipeline.load_config(settings.components).get("token_encoder") in ([None, None], None)
    except OSError:  # what a run has left that trained no whole pipeline
        is_missing = False
    if is_missing:
        return build_token_encoder(settings.model, build_tokenizer(settings))
    return load_part(settings.components, "token_encoder")


def load_denoiser(source: str, changes: dict[str, Any]) -> LDLMTransformer1DModel:
    """A pipeline's denoiser with other arguments, which may add parts to it; what the pipeline lacks is new."""
    pretrained = load_part(source, "transformer")
    transformer = LDLMTransformer1DModel.from_config(pretrained.config, **changes)
    try:
        lost = transformer.load_state_dict(pretrained.state_dict(), strict=False).unexpected_keys
    except RuntimeError as error:
        other = {name: pretrained.config[name] for name in changes if pretrained.config.get(name) != changes[name]}
        raise ValueError(
            f"model.transformer={changes} does not fit components={source!r}, whose denoiser has {other}: use the "
            "configuration that it was trained by, or set these."
        ) from error
    if lost:
        raise ValueError(f"model.transformer={changes} has no place for {', '.join(lost)} of components={source!r}.")
    return transformer


def build_finetuning_objective(settings: RunSettings) -> JointObjective:
    """The joint objective over all parts of a trained pipeline."""
    transformer = load_denoiser(settings.components, role_arguments(settings) | settings.model.transformer)
    tangent_d = load_part(settings.components, "scheduler").config.tangent_d
    return JointObjective(
        **load_autoencoder(settings),
        transformer=transformer,
        scheduler=TangentEulerMaruyamaScheduler(**{"tangent_d": tangent_d} | settings.model.scheduler),
        settings=settings.objective,
        averaged_transformer=build_averaged_transformer(transformer, settings.consistency),
    )


def build_diffusion_objective(settings: RunSettings) -> JointObjective:
    """The objective of a new denoiser on the latents of a frozen autoencoder of the same sequence length."""
    autoencoder, model = load_autoencoder(settings), settings.model
    config = autoencoder["latent_encoder"].config
    transformer = LDLMTransformer1DModel(
        in_channels=config.latent_size,
        sample_size=config.num_latents,
        **role_arguments(settings) | model.transformer,
    )
    scheduler = TangentEulerMaruyamaScheduler(**model.scheduler)
    return JointObjective(
        **autoencoder,
        transformer=transformer,
        scheduler=scheduler,
        settings=settings.objective,
        stage="diffusion",
        averaged_transformer=build_averaged_transformer(transformer, settings.consistency),
    )


def build_pipeline(objective: nn.Module, **others: Any) -> LDLMPipeline:
    """The pipeline, encoders included, of an objective's components and of others by name."""
    parts = {name: getattr(objective, name) for name in PARTS if name not in others}
    return LDLMPipeline(**parts, **others)


def save_components(objective: JointObjective, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves the parts that there are in a pipeline's layout; there is no `model_index.json` yet."""
    for name in PARTS:
        part = getattr(objective, name)
        if part is not None:
            part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")


def trained_components(objective: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of an objective's components that have trained parameters."""
    for name, module in objective.named_children():
        if any(parameter.requires_grad for parameter in module.parameters()):
            yield name, module


def count_parameters(module: nn.Module, trained_only: bool = False) -> int:
    """Number of a module's parameters, or of those that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained_only)


def compile_blocks(model: nn.Module, batch_sizes_vary: bool = False, **kwargs: Any) -> None:
    """Compiles the repeated blocks of a model, which share a graph, with arguments of `torch.compile` if need be."""
    for block in model.modules():
        if type(block).__name__ in getattr(model, "_repeated_blocks", ()):
            # a graph break shall not go unnoticed; graphs of one size are the faster ones
            block.compile(fullgraph=True, dynamic=None if batch_sizes_vary else False, **kwargs)
