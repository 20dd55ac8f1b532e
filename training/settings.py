"""Settings of a training run: dataclasses ← YAML file ← dotted overrides (`section.key=value`).

Each section's defaults live beside the component that it configures. An unknown key is an error that names the nearest
known one. A text is taken as it is typed, whatever it would be in YAML; `null` is None. The merged settings are
printed and saved with the run.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldlm_hf import (
    DataSettings,
    JointObjectiveSettings,
    LDLMLatentDecoderConfig,
    LDLMLatentEncoderConfig,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
    TangentEulerMaruyamaScheduler,
    TimestepSamplerSettings,
)
from ldlm_hf.hub.safe_loading import check_settings
from ldlm_hf.objective.joint import STAGES
from samplers import OWN, Sampler
from typed_yaml import MERGE, NULL, as_typed, is_text, parse, parse_value, to_config, under


@dataclass
class ModelSettings:
    """The components. Sizes that follow from others (vocabulary, widths, lengths) are filled in when they are built.

    Attributes:
        backbone: language model of the frozen token encoder: Hub id, folder, `package:NAME/FOLDER` or
            `package:NAME/FILE.gguf`.
        tokenizer: the same for the tokenizer; the backbone's own by default.
        layer: index into the backbone's hidden states (the paper's "third-to-last").
        representation: `hidden`, `embedding` or `scratch`.
        normalize_embeddings: scale embeddings from scratch to the norm sqrt(D).
        statistics_sequences: training sequences that the hidden states' mean and standard deviation are computed
            over (the paper does not say how many); in the stage `diffusion` those of the latents.
        sequence_length: tokens L.
        num_latents: latents N; L by default.
        latent_size: width d_z of a latent; the width of the latent encoder by default, or of the hidden states where
            those are the latents (`latent_encoder.architecture=identity`).
        latent_encoder: fields of `LDLMLatentEncoderConfig`.
        latent_decoder: fields of `LDLMLatentDecoderConfig`.
        token_decoder: fields of `LDLMTokenDecoderConfig`.
        token_decoder_head_from_backbone: start the vocabulary head from the backbone's token embeddings, their common
            mean taken off (ours; a shortcut for small runs). Needs a head as wide as those.
        transformer: arguments of `LDLMTransformer1DModel`.
        scheduler: arguments of `TangentEulerMaruyamaScheduler`.
    """

    backbone: str = "openai-community/gpt2"
    tokenizer: str | None = None
    layer: int = -3
    representation: str = "hidden"
    normalize_embeddings: bool = False
    statistics_sequences: int = 2048
    sequence_length: int = 1024
    num_latents: int | None = None
    latent_size: int | None = None
    latent_encoder: dict[str, Any] = field(default_factory=dict)
    latent_decoder: dict[str, Any] = field(default_factory=dict)
    token_decoder: dict[str, Any] = field(default_factory=dict)
    token_decoder_head_from_backbone: bool = False
    transformer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            statistics_sequences="[1, inf)",
            sequence_length="[1, inf)",
            num_latents="[1, inf)",
            latent_size="[1, inf)",
        )


@dataclass
class WarmupSettings:
    """Diffusion-to-encoder warmup (Eq. 28–30).

    Attributes:
        steps: S_wu; 0 opens the gate at once.
        midpoint: c, as a share of the warmup.
        steepness: k.
    """

    steps: int = 10_000
    midpoint: float = 0.8
    steepness: float = 10.0

    def __post_init__(self) -> None:
        check_settings(type(self).__init__, vars(self), steps="[0, inf)", midpoint="[0, 1]", steepness="(0, inf)")


@dataclass
class OptimizerSettings:
    """AdamW with linear warmup, then constant (App. C; configs/README.md says where each value comes from).

    Attributes:
        learning_rate: after the warmup.
        initial_learning_rate: at the first step.
        lr_warmup_steps: steps from one to the other.
        lr_decay_steps: last steps of the run, over which the learning rate falls in a straight line to zero; the paper
            has none.
        weight_decay: decoupled, on all trained parameters.
        beta1: decay of the gradient's mean.
        beta2: decay of the gradient's square.
        eps: added to the denominator.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: of the averaged weights that are evaluated and saved (the paper does not mention an average).
    """

    learning_rate: float = 2e-4
    initial_learning_rate: float = 1e-8
    lr_warmup_steps: int = 5_000
    lr_decay_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            learning_rate="(0, inf)",
            initial_learning_rate="(0, inf)",
            lr_warmup_steps="[0, inf)",
            lr_decay_steps="[0, inf)",
            weight_decay="[0, inf)",
            beta1="[0, 1)",
            beta2="[0, 1)",
            eps="(0, inf)",
            max_grad_norm="(0, inf)",
            ema_decay="[0, 1)",
        )


@dataclass
class LoopSettings:
    """The loop.

    Attributes:
        output_dir: folder of the run.
        seed: of everything random.
        max_steps: optimiser steps.
        batch_size: sequences of one optimiser step, over all devices and accumulated passes.
        device_batch_size: sequences of one pass on one device; batch_size when smaller.
        mixed_precision: `no` or `bf16`.
        compile: `torch.compile` the repeated blocks of the trained models.
        gradient_checkpointing: compute activations again in the backward pass.
        dataloader_workers: processes that read the data, for each device.
        logging_steps: steps between two lines of the log.
        checkpointing_steps: steps between two checkpoints.
        checkpoints_total_limit: how many are kept; None keeps all.
        max_nonfinite_steps: the run stops after so many steps in a row whose loss or gradient is not finite.
        trackers: trackers of accelerate that the log goes to, beside `metrics.jsonl`: `tensorboard`, `wandb`,
            `trackio`.
        peak_tflops: peak of one device in TFLOP/s, which the model FLOPs utilisation is a share of; None looks it up
            or measures it.
    """

    output_dir: str = "runs/ldlm"
    seed: int = 0
    max_steps: int = 500_000
    batch_size: int = 512
    device_batch_size: int = 512
    mixed_precision: str = "bf16"
    compile: bool = False
    gradient_checkpointing: bool = False
    dataloader_workers: int = 0
    logging_steps: int = 50
    checkpointing_steps: int = 10_000
    checkpoints_total_limit: int | None = 3
    max_nonfinite_steps: int = 20
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            seed=f"[0, {2**32})",  # what numpy takes
            max_steps="[1, inf)",
            batch_size="[1, inf)",
            device_batch_size="[1, inf)",
            dataloader_workers="[0, inf)",
            logging_steps="[1, inf)",
            checkpointing_steps="[1, inf)",
            checkpoints_total_limit="[1, inf)",
            max_nonfinite_steps="[1, inf)",
            peak_tflops="(0, inf)",
        )
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"mixed_precision={self.mixed_precision!r} must be 'no' or 'bf16'; float16's range does not hold the "
                "gradients of a loss whose scale the latents set."
            )


@dataclass
class EvaluationSettings:
    """Evaluation of the averaged weights on held-out text, during the run and at its end.

    Attributes:
        every: steps between two evaluations; 0 evaluates at the end only.
        num_sequences: held-out sequences for reconstruction and diffusion loss.
        grid_size: times of the fixed grid that the diffusion loss is measured on.
        batch_size: sequences of one evaluation pass.
        num_samples: texts sampled at the end, and scored.
        num_preview_samples: texts sampled at each evaluation before that.
        num_inference_steps: sampling steps.
        sampler: scheduler of the finished pipeline, which its final samples come from, named as for `evaluate.py`;
            `own` leaves it the one it is trained with, which all samples before the end come from.
        judge: causal language model for generative perplexity and MAUVE; None leaves both out.
        judge_batch_size: texts of one pass of the judge.
    """

    every: int = 10_000
    num_sequences: int = 512
    grid_size: int = 20
    batch_size: int = 32
    num_samples: int = 256
    num_preview_samples: int = 4
    num_inference_steps: int = 128
    sampler: str = OWN
    judge: str | None = "openai-community/gpt2-large"
    judge_batch_size: int = 8

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            every="[0, inf)",
            num_sequences="[1, inf)",
            grid_size="[1, inf)",
            batch_size="[1, inf)",
            num_samples="[0, inf)",
            num_preview_samples="[0, inf)",
            num_inference_steps="[1, inf)",
            judge_batch_size="[1, inf)",
        )
        if arguments := Sampler.parse(self.sampler).arguments:
            raise ValueError(
                f"sampler={self.sampler!r}: {', '.join(name for name, _ in arguments)} goes with the pipeline's "
                "call, and no saved pipeline keeps it."
            )


@dataclass
class RunSettings:
    """All settings of `train_joint.py`.

    Attributes:
        train_token_decoder: train the token decoder jointly, behind a stop-gradient. False leaves it out, for
            `train_token_decoder.py` to train one afterwards (Section 4.1, B.2).
        stage: `joint`, or for latent spaces of two stages (Section 7) `autoencoder`, which trains no denoiser, and
            then `diffusion`, which trains a denoiser alone on the frozen autoencoder in `components`, its latents
            standardised.
        components: folder or Hub id of the frozen components; with `stage=diffusion` only. Sections that describe
            these components (all of `model` but `transformer`, `scheduler` and `statistics_sequences`) are not read.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objective: JointObjectiveSettings = field(default_factory=JointObjectiveSettings)
    timestep_sampler: TimestepSamplerSettings = field(default_factory=TimestepSamplerSettings)
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    train_token_decoder: bool = True
    stage: str = "joint"
    components: str = ""

    def __post_init__(self) -> None:
        check_decay(self.optimizer, self.loop)
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r} is unknown; it is one of {', '.join(STAGES)}.")
        if (self.stage == "diffusion") != bool(self.components):
            raise ValueError(
                f"components={self.components!r} with stage={self.stage!r}: the stage 'diffusion' trains on the "
                "frozen components that components=RUN/pipeline names, and no other stage does."
            )
        if self.stage != "autoencoder" and Sampler.parse(self.evaluation.sampler).needs_cdf:
            self.check_learned_times()

    def check_learned_times(self) -> None:
        """Raises ValueError where `evaluation.sampler` needs times that the run does not learn."""
        learns, needs = self.timestep_sampler, f"evaluation.sampler={self.evaluation.sampler!r} needs the times that "
        if not learns.adaptive:
            raise ValueError(
                f"{needs}timestep_sampler.adaptive=true learns; take another time grid, or let it learn them."
            )
        if self.loop.max_steps < learns.update_every:
            raise ValueError(
                f"{needs}are learned every timestep_sampler.update_every={learns.update_every} steps, and "
                f"loop.max_steps={self.loop.max_steps}; take another time grid, or learn them more often."
            )


@dataclass
class DataSection:
    """The settings of a script that reads a run's text and nothing else of its settings."""

    data: DataSettings = field(default_factory=DataSettings)


# sections whose keys are the arguments of a class, and that class
ARGUMENT_SECTIONS: dict[str, Callable[..., Any]] = {
    "model.latent_encoder": LDLMLatentEncoderConfig.__init__,
    "model.latent_decoder": LDLMLatentDecoderConfig.__init__,
    "model.token_decoder": LDLMTokenDecoderConfig.__init__,
    "model.transformer": LDLMTransformer1DModel.__init__,
    "model.scheduler": TangentEulerMaruyamaScheduler.__init__,
}


def load_settings(
    settings_class: type, config: str | None, overrides: Sequence[str], ignore_other_sections: bool = False
) -> Any:
    """Merges a dataclass's defaults, a YAML file and dotted overrides, in this order.

    Args:
        settings_class: the dataclass.
        config: the YAML file, if any.
        overrides: `section.key=value`.
        ignore_other_sections: read no section of the file that the dataclass does not have, instead of refusing it.

    Raises:
        OSError: the file is not there.
        ValueError: an unknown key, a value of a wrong type, or an override that is not `key=value`.
    """
    layers: list[tuple[str, DictConfig]] = []
    if config is not None:
        if not Path(config).is_file():
            raise OSError(f"--config {config!r}: there is no such file.")
        node = parse(Path(config).read_text(encoding="utf-8"), config)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"--config {config!r} must hold sections of keys and values.")
        if ignore_other_sections:
            known = known_keys(settings_class, "")
            node.value = [(key, section) for key, section in node.value if key.value in known]
        layers.append((config, to_config(keep_texts(node, settings_class), config)))
    for override in overrides:
        layers.append((override, to_config(override_node(override, settings_class), override)))

    merged = OmegaConf.structured(settings_class)
    for origin, layer in layers:
        check_keys(OmegaConf.to_container(layer), settings_class, origin)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ValueError(f"{origin}: {str(error).splitlines()[0]} ({error.full_key}).") from error
    values = {}
    for key in merged:
        try:
            values[key] = OmegaConf.to_object(merged[key]) if OmegaConf.is_config(merged[key]) else merged[key]
        except ValueError as error:
            # a section checks itself, and does not know its place
            raise ValueError(f"{key}.{error}") from error
    return settings_class(**values)


def override_node(override: str, settings_class: type) -> yaml.Node:
    """`section.key=value` as the nodes of its YAML; ValueError for what is none."""
    name, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"{override!r} is no override; write section.key=value.")
    hint = type_of(settings_class, name)
    node = parse_value(value, hint, override)
    if not is_text(hint):
        node = keep_texts(node, hint, name)
    for key in reversed(name.split(".")):
        node = under(key, node)
    return node


def type_of(settings_class: type, name: str) -> Any:
    """Annotated type of the setting of a dotted name; None where there is no such setting, or anything may stand."""
    keys, hint = name.split("."), settings_class
    for place, key in enumerate(keys):
        hint = value_types(hint, ".".join(keys[:place])).get(key)
    return hint


def keep_texts(node: yaml.Node, hint: Any, name: str = "") -> yaml.Node:
    """The nodes of a value of an annotated type, or of a section, the texts in it as they were typed."""
    if isinstance(node, yaml.MappingNode):
        types = value_types(hint, name)
        pairs = []
        for key, value in node.value:
            if key.tag == MERGE:
                pairs.append((key, keep_texts(value, hint, name)))
            else:
                pairs.append((key, keep_texts(value, types.get(key.value), f"{name}.{key.value}".lstrip("."))))
        return yaml.MappingNode(node.tag, pairs)
    if isinstance(node, yaml.SequenceNode):
        item_hint = next(iter(get_args(hint)), hint)
        return yaml.SequenceNode(node.tag, [keep_texts(item, item_hint, name) for item in node.value])
    return as_typed(node) if is_text(hint) and node.tag != NULL else node


def value_types(owner: Any, section: str) -> dict[str, Any]:
    """Annotated types of a section's keys: a dataclass's fields, or arguments of the class that it is handed to."""
    if is_dataclass(owner):
        return get_type_hints(owner)
    return get_type_hints(ARGUMENT_SECTIONS[section]) if section in ARGUMENT_SECTIONS else {}


def load_data_settings(config: str | None, overrides: Sequence[str]) -> DataSettings:
    """The section `data` of a run's YAML file, whatever else the file holds, and over it `data.key=value`.

    Raises: as `load_settings`.
    """
    return load_settings(DataSection, config, overrides, ignore_other_sections=True).data


def known_keys(owner: Any, section: str) -> list[str]:
    """Keys that a section takes: a dataclass's fields, or the arguments of the class that it is handed to."""
    if is_dataclass(owner):
        return [item.name for item in fields(owner)]
    parameters = inspect.signature(ARGUMENT_SECTIONS[section]).parameters.values()
    return [item.name for item in parameters if item.name != "self" and item.kind is not item.VAR_KEYWORD]


def check_keys(values: Any, settings_class: type, origin: str) -> None:
    """Raises ValueError for a key that no section has, and names the nearest one that there is."""
    defaults = settings_class()

    def visit(node: Any, owner: Any, prefix: str) -> None:
        if not isinstance(node, dict):
            raise ValueError(f"{origin}: {prefix.rstrip('.') or 'the settings'} must be a section of keys and values.")
        keys = known_keys(owner, prefix.rstrip("."))
        for key, value in node.items():
            name = f"{prefix}{key}"
            if key not in keys:
                # a slip of the pen, or the right key in the wrong section
                everywhere = list(flatten(asdict(defaults)))
                nearest = [f"{prefix}{match}" for match in difflib.get_close_matches(str(key), keys, n=1)]
                nearest += [known for known in everywhere if known.split(".")[-1] == key]
                nearest += difflib.get_close_matches(name, everywhere, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known here: {', '.join(keys)}."
                raise ValueError(f"{origin}: unknown setting {name!r}; {hint}")
            child = getattr(owner, str(key), None)
            if is_dataclass(child) or name in ARGUMENT_SECTIONS:
                visit(value, child, f"{name}.")

    visit(values, defaults, "")


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def check_decay(optimizer: OptimizerSettings, loop: LoopSettings) -> None:
    """Raises ValueError for a decay of the learning rate that is longer than the run."""
    if optimizer.lr_decay_steps > loop.max_steps:
        raise ValueError(
            f"optimizer.lr_decay_steps={optimizer.lr_decay_steps} is more than loop.max_steps={loop.max_steps}."
        )


def to_yaml(settings: Any) -> str:
    """Settings as YAML text."""
    return yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True)


def with_defaults(settings_class: type, sections: dict[str, Any]) -> dict[str, Any]:
    """Saved sections of settings, and the default of each setting that was added later than they were saved."""
    defaults = asdict(settings_class())
    return defaults | {
        key: defaults[key] | value if isinstance(value, dict) and isinstance(defaults.get(key), dict) else value
        for key, value in sections.items()
    }


def differences(settings: Any, others: str) -> list[str]:
    """Dotted keys in which settings differ from those of a saved YAML text.

    A setting that the text does not have was added later than it was saved, and had its default then.
    """
    mine = flatten(asdict(settings))
    theirs = flatten(with_defaults(type(settings), yaml.safe_load(others)))
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def human_count(number: float) -> str:
    """1234567 → '1.2M'"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return re.sub(r"\.0$", "", f"{number / size:.1f}") + unit
    return f"{number:g}"
