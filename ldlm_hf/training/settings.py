"""Settings of a training run. The merged settings are printed and saved with the run.

Each section's defaults live beside the component that it configures (`loading/settings_reader.py` says how they are
merged with a file and the command line).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from ..data import DataSettings
from ..evaluation.machine import multiplies_in_bfloat16
from ..evaluation.samplers import GUIDANCE, OWN, Sampler
from ..loading.checks import check_settings
from ..loading.settings_reader import added, arguments_of
from ..models.latent_decoder import LDLMLatentDecoderConfig
from ..models.latent_encoder import LDLMLatentEncoderConfig
from ..models.token_decoder import LDLMTokenDecoderConfig
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..objective import (
    ConditioningSettings,
    ConsistencySettings,
    JointObjectiveSettings,
    TimestepSamplerSettings,
)
from ..pipelines.pipeline_ldlm import LDLMPipeline
from ..schedulers.scheduling_tangent_euler_maruyama import TangentEulerMaruyamaScheduler


OPTIMIZERS = ("adamw", "muon")


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
        prefix: whether the backbone reads a token before the text (the tokenizer's BOS, CLS or end-of-text), without
            which its hidden state of the first token says nothing of it (ours).
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
    prefix: bool = added(True, before=False)
    statistics_sequences: int = 2048
    sequence_length: int = 1024
    num_latents: int | None = None
    latent_size: int | None = None
    latent_encoder: dict[str, Any] = arguments_of(LDLMLatentEncoderConfig.__init__)
    latent_decoder: dict[str, Any] = arguments_of(LDLMLatentDecoderConfig.__init__)
    token_decoder: dict[str, Any] = arguments_of(LDLMTokenDecoderConfig.__init__)
    token_decoder_head_from_backbone: bool = False
    transformer: dict[str, Any] = arguments_of(LDLMTransformer1DModel.__init__)
    scheduler: dict[str, Any] = arguments_of(TangentEulerMaruyamaScheduler.__init__)

    def __post_init__(self) -> None:
        sizes = ("statistics_sequences", "sequence_length", "num_latents", "latent_size")
        check_settings(type(self).__init__, vars(self), **dict.fromkeys(sizes, "[1, inf)"))


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
        name: `adamw`, or `muon`: Muon (Jordan et al., 2024) for the matrices of layers and AdamW for everything else,
            both with this learning rate and weight decay.
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
        ema_decay: of the EMA weights, which are evaluated and saved (the paper does not mention any).
    """

    name: str = "adamw"
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
        ranges = dict.fromkeys(("learning_rate", "initial_learning_rate", "eps", "max_grad_norm"), "(0, inf)")
        ranges |= dict.fromkeys(("lr_warmup_steps", "lr_decay_steps", "weight_decay"), "[0, inf)")
        ranges |= dict.fromkeys(("beta1", "beta2", "ema_decay"), "[0, 1)")
        check_settings(type(self).__init__, vars(self), name=OPTIMIZERS, **ranges)
        if self.name == "muon" and not hasattr(torch.optim, "Muon"):
            raise ValueError(f"name='muon' needs torch 2.9 or later, and this is torch {torch.__version__}.")


@dataclass
class LoopSettings:
    """The loop.

    Attributes:
        output_dir: folder of the run.
        seed: of everything random.
        max_steps: optimiser steps.
        batch_size: sequences of one optimiser step, over all devices and accumulated passes.
        device_batch_size: sequences of one pass on one device; batch_size when smaller.
        shift_chunks: cut the text at other places in each epoch, so that a small corpus is not learned in the same
            pieces over and over (ours); a stream has no epochs.
        mixed_precision: `no` or `bf16`; `auto` becomes `bf16` where this machine multiplies in bfloat16, else `no`.
        compile: `torch.compile` the repeated blocks of our models, frozen ones included.
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
    shift_chunks: bool = False
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
        sizes = ("max_steps", "batch_size", "device_batch_size")
        frequencies = ("logging_steps", "checkpointing_steps", "checkpoints_total_limit", "max_nonfinite_steps")
        ranges = dict.fromkeys(sizes + frequencies, "[1, inf)")
        # seeds are what numpy takes
        ranges |= {"seed": f"[0, {2**32})", "dataloader_workers": "[0, inf)", "peak_tflops": "(0, inf)"}
        check_settings(type(self).__init__, vars(self), **ranges)
        if self.mixed_precision not in ("no", "bf16", "auto"):
            raise ValueError(
                f"mixed_precision={self.mixed_precision!r} must be 'no', 'bf16' or 'auto'; float16's range does not "
                "hold the gradients of a loss whose scale the latents set."
            )
        if self.mixed_precision == "auto":
            self.mixed_precision = "bf16" if multiplies_in_bfloat16() else "no"


@dataclass
class EvaluationSettings:
    """Evaluation of the EMA weights on held-out text, during the run and at its end.

    Attributes:
        every: steps between two evaluations; 0 evaluates at the end only.
        num_sequences: held-out sequences for reconstruction and diffusion loss.
        grid_size: times of the fixed grid that the diffusion loss is measured on.
        batch_size: sequences of one evaluation pass.
        num_samples: texts sampled at the end, and scored.
        num_preview_samples: texts sampled at each evaluation before that.
        num_inference_steps: sampling steps.
        sampler: scheduler of the finished pipeline, which all samples come from, named as for `evaluate.py`; `own`
            leaves it the one it is trained with. With a `self_condition_scale` the finished pipeline is guided by
            default. Until the run has seen every time, the learned grid is even in t.
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
        positive = ("num_sequences", "grid_size", "batch_size", "num_inference_steps", "judge_batch_size")
        ranges = dict.fromkeys(positive, "[1, inf)")
        ranges |= dict.fromkeys(("every", "num_samples", "num_preview_samples"), "[0, inf)")
        check_settings(type(self).__init__, vars(self), **ranges)
        for name, _ in Sampler.parse(self.sampler).arguments:
            if name not in LDLMPipeline.saved_settings:
                raise ValueError(
                    f"sampler={self.sampler!r}: {name} goes with the pipeline's call, and no saved pipeline keeps it."
                )


class LoopRunSettings(Protocol):
    """What the loop reads of the settings of a run, which are a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    optimizer: OptimizerSettings
    loop: LoopSettings
    evaluation: EvaluationSettings


class TrainingSettings(LoopRunSettings, Protocol):
    """What the settings of every recipe have that [`launch.run`] runs."""

    data: DataSettings


@dataclass
class RunSettings:
    """All settings of `train_joint.py`.

    Attributes:
        train_token_decoder: train the token decoder jointly, behind a stop-gradient. False leaves it out, for
            `train_token_decoder.py` to train one afterwards (Section 4.1, B.2).
        stage: `joint`, or for latent spaces of two stages (Section 7) `autoencoder`, which trains no denoiser, and
            then `diffusion`, which trains a denoiser alone on the frozen autoencoder in `components`, its latents
            standardised.
        components: folder or Hub id of a pipeline. With `stage=diffusion` its autoencoder is the frozen one; with
            `stage=joint` all its parts are trained further; `model.transformer` and `model.scheduler` then change
            arguments of its denoiser and scheduler, such as `guidance_embeds`. Settings that describe the components
            otherwise (of `model` all but these, `sequence_length` and `statistics_sequences`) are not read; but of a
            pipeline without its token encoder, `model.backbone` and what belongs to it make a new one, whose
            statistics are those of the new text.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objective: JointObjectiveSettings = field(default_factory=JointObjectiveSettings)
    timestep_sampler: TimestepSamplerSettings = field(default_factory=TimestepSamplerSettings)
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    consistency: ConsistencySettings = field(default_factory=ConsistencySettings)
    conditioning: ConditioningSettings = field(default_factory=ConditioningSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    train_token_decoder: bool = True
    stage: str = "joint"
    components: str = ""

    def __post_init__(self) -> None:
        check_decay(self.optimizer, self.loop)
        check_guidance(
            self.evaluation, self.model.transformer.get("self_conditioning", True), takes_prompts=self.gives_texts
        )
        check_shifts(self.data, self.loop)
        num_latents, length = self.model.num_latents, self.model.sequence_length
        self.data.text_lengths(length)
        if self.data.has_pairs and self.conditioning.gives_texts:
            raise ValueError(
                f"data.source_column={self.data.source_column!r} with conditioning.prefix_share="
                f"{self.conditioning.prefix_share} and conditioning.gaps_share={self.conditioning.gaps_share}: of a "
                "pair the source is given, and nothing else; set both shares to 0."
            )
        if self.conditioning.gives_texts and self.conditioning.start_step >= self.loop.max_steps:
            raise ValueError(
                f"conditioning.start_step={self.conditioning.start_step} with loop.max_steps={self.loop.max_steps}: "
                "no text would be given in part; lower the first, or set conditioning's shares to 0."
            )
        if self.gives_texts and num_latents not in (None, length):
            raise ValueError(
                f"model.num_latents={num_latents} with model.sequence_length={length}: no latent belongs to a token, "
                "so no part of a text can be given; set conditioning's shares to 0 and data.source_column to null, or "
                "model.num_latents to null."
            )
        self.check_stage()

    def check_stage(self) -> None:
        """Raises ValueError for a stage that does not go with what there is to train on."""
        if self.stage == ("autoencoder" if self.components else "diffusion"):
            raise ValueError(
                f"components={self.components!r} with stage={self.stage!r}: the stage 'diffusion' trains on the "
                "frozen components that components=RUN/pipeline names, and the stage 'autoencoder' on none."
            )

    @property
    def gives_texts(self) -> bool:
        """Whether any part of any text is given: its source, or what `conditioning` draws."""
        return self.data.has_pairs or self.conditioning.gives_texts


def check_shifts(data: DataSettings, loop: LoopSettings) -> None:
    """Raises ValueError where documents that are a chunk each are to be cut elsewhere."""
    if loop.shift_chunks and data.is_separate:
        which = f"data.source_column={data.source_column!r}" if data.has_pairs else "data.documents='separate'"
        raise ValueError(
            f"loop.shift_chunks=true with {which}: chunks of one document each begin where it begins. Set "
            "loop.shift_chunks=false."
        )


def check_guidance(evaluation: EvaluationSettings, has_self_condition: bool, takes_prompts: bool = False) -> None:
    """Raises ValueError for a finished pipeline that is to be guided by what it is not told."""
    for name, _ in Sampler.parse(evaluation.sampler).arguments:
        if name not in GUIDANCE:
            raise ValueError(
                f"evaluation.sampler={evaluation.sampler!r}: {name} is for autoregressive pipelines; leave it out."
            )
        if name == "guidance_scale" and not takes_prompts:
            raise ValueError(
                f"evaluation.sampler={evaluation.sampler!r}: guidance_scale is the weight of prompts, which this run "
                "does not train; set conditioning.prefix_share or gaps_share, or leave it out."
            )
        if name != "guidance_scale" and not has_self_condition:
            raise ValueError(
                f"evaluation.sampler={evaluation.sampler!r}: this denoiser is trained without a self-condition."
            )


def check_decay(optimizer: OptimizerSettings, loop: LoopSettings) -> None:
    """Raises ValueError for a decay of the learning rate that is longer than the run."""
    if optimizer.lr_decay_steps > loop.max_steps:
        raise ValueError(
            f"optimizer.lr_decay_steps={optimizer.lr_decay_steps} is more than loop.max_steps={loop.max_steps}; lower "
            "the first."
        )


# settings that say where the machine keeps files, and nothing of the model
MACHINE_SETTINGS = ("data.cache_dir", "loop.output_dir")
