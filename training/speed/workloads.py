"""What is timed, at a geometry of random weights: a step of sampling, the decode, and a step of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import GPT2Config, PreTrainedTokenizerFast

from ldlm_hf import (
    JointObjective,
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMLatentEncoder,
    LDLMLatentEncoderConfig,
    LDLMPipeline,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTokenEncoder,
    LDLMTokenEncoderConfig,
    LDLMTransformer1DModel,
    TangentEulerMaruyamaScheduler,
)
from ldlm_hf.training.components import compile_blocks
from ldlm_hf.training.optimizers import build_optimizers
from ldlm_hf.training.settings import OptimizerSettings


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORKLOADS = ("sampling", "training", "peers")


@dataclass(frozen=True)
class Geometry:
    """Fields that differ from the components' defaults, which are the paper's geometry.

    Attributes:
        latent: of `LDLMLatentEncoderConfig` and `LDLMLatentDecoderConfig`.
        token_decoder: of `LDLMTokenDecoderConfig`.
        transformer: of `LDLMTransformer1DModel`.
        token_transformer: of `TokenDiffusionTransformer`, whose sizes the autoregressive model has too.
        backbone: of `GPT2Config`, whose defaults are GPT-2 small.
    """

    latent: dict[str, int] = field(default_factory=dict)
    token_decoder: dict[str, int] = field(default_factory=dict)
    transformer: dict[str, int] = field(default_factory=dict)
    token_transformer: dict[str, int] = field(default_factory=dict)
    backbone: dict[str, int] = field(default_factory=dict)


TINY_LAYERS = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "token_hidden_size": 32}
GEOMETRIES = {
    # the third-to-last hidden state of GPT-2 small leaves block 10, and the two blocks behind it are not run
    "paper": Geometry(backbone={"n_layer": 10}),
    # ldlm-demo, and mdlm_demo.yaml of the methods that it is compared with
    "demo": Geometry(
        latent={
            "hidden_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 768,
            "latent_size": 32,
            "token_hidden_size": 384,
        },
        token_decoder={"hidden_size": 384, "num_hidden_layers": 0, "token_hidden_size": 384, "vocab_size": 30522},
        transformer={"in_channels": 32, "num_layers": 4, "num_attention_heads": 4},
        token_transformer={"num_layers": 4, "num_attention_heads": 6},
        backbone={"vocab_size": 30522, "n_embd": 384, "n_layer": 4, "n_head": 12},
    ),
    "tiny": Geometry(
        latent=TINY_LAYERS | {"num_hidden_layers": 2, "latent_size": 32},
        token_decoder=TINY_LAYERS | {"num_hidden_layers": 1, "vocab_size": 96},
        transformer={"in_channels": 32, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
        token_transformer={"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
        backbone={"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    ),
}


@dataclass(frozen=True)
class Case:
    """What one fresh process measures.

    Attributes:
        workload: `sampling` (its step and the decode), `training`, or `peers` (sampling and other methods').
        geometry: a name in `GEOMETRIES`.
        length: tokens L, and as many latents.
        batch_size: sequences of a step.
        dtype: `float32` or `bfloat16`.
        repeats: turns of workload and products, or of all methods.
        profile: also list the operators that take the time.
        compile: compile the models' blocks first.
        num_steps: of the other methods' grids, in whose middle their step is taken; 1,024 in the paper's Table 3.
    """

    workload: str
    geometry: str
    length: int
    batch_size: int
    dtype: str
    device: str
    repeats: int
    profile: bool = False
    compile: bool = False
    num_steps: int = 1024

    @property
    def sizes(self) -> Geometry:
        return GEOMETRIES[self.geometry]


@dataclass
class Workload:
    """Something to time.

    Attributes:
        name: what the report calls it.
        run: does it once.
        modules: those that it needs in memory.
    """

    name: str
    run: Callable[[], object]
    modules: list[nn.Module]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for module in self.modules for parameter in module.parameters())

    def compile(self) -> None:
        """Compiles the blocks of all models, as `loop.compile` does in training."""
        for module in self.modules:
            for model in module.modules():
                compile_blocks(model)


def randomize_zero_weights(module: nn.Module) -> None:
    """Gives weights that start at zero (adaLN-zero, the last layer) a spread: a trained model multiplies no zeros."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def build_denoiser(geometry: Geometry, length: int) -> LDLMTransformer1DModel:
    transformer = LDLMTransformer1DModel(sample_size=length, **geometry.transformer)
    randomize_zero_weights(transformer)
    return transformer


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of as many words as the pipeline asks for; nothing that is measured uses it."""
    words = {str(token_id): token_id for token_id in range(vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")))


def sampling_workloads(case: Case) -> list[Workload]:
    """One denoising step, and the decoding at the end, as [`LDLMPipeline`] does them."""
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    lengths = {"sequence_length": case.length, "num_latents": case.length}
    token_decoder = LDLMTokenDecoder(LDLMTokenDecoderConfig(**case.sizes.token_decoder)).to(dtype).eval()
    pipeline = LDLMPipeline(
        transformer=build_denoiser(case.sizes, case.length).to(dtype).eval(),
        latent_decoder=LDLMLatentDecoder(LDLMLatentDecoderConfig(**lengths, **case.sizes.latent)).to(dtype).eval(),
        token_decoder=token_decoder,
        tokenizer=build_tokenizer(token_decoder.config.vocab_size),
        scheduler=TangentEulerMaruyamaScheduler(),
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    modules = [pipeline.transformer, pipeline.latent_decoder, pipeline.token_decoder]
    latents = pipeline.prepare_latents(case.batch_size, device, None)

    def step() -> None:
        pipeline(batch_size=case.batch_size, num_inference_steps=1, latents=latents, output_type="latent")

    @torch.no_grad()
    def decode() -> None:
        pipeline.decode_to_sequences(latents)

    return [Workload("sampling step", step, modules), Workload("decode", decode, modules)]


def build_objective(geometry: Geometry, length: int) -> JointObjective:
    """All components at one geometry, with a GPT-2-shaped token encoder of random weights."""
    lengths = {"sequence_length": length, "num_latents": length}
    # a token before the text, as in training
    backbone = GPT2Config(use_cache=False, n_positions=length + 1, **geometry.backbone)
    token_encoder = LDLMTokenEncoder(
        LDLMTokenEncoderConfig(
            backbone_config=backbone,
            representation="hidden",
            vocab_size=backbone.vocab_size,
            hidden_size=backbone.hidden_size,
            prefix_token_id=0,
            # statistics of zero mean and unit deviation, which random weights come close to
            num_statistics_tokens=1,
        )
    )
    return JointObjective(
        token_encoder=token_encoder,
        latent_encoder=LDLMLatentEncoder(LDLMLatentEncoderConfig(**lengths, **geometry.latent)),
        latent_decoder=LDLMLatentDecoder(LDLMLatentDecoderConfig(**lengths, **geometry.latent)),
        token_decoder=LDLMTokenDecoder(LDLMTokenDecoderConfig(**geometry.token_decoder)),
        transformer=build_denoiser(geometry, length),
        scheduler=TangentEulerMaruyamaScheduler(),
    )


def training_workloads(case: Case) -> list[Workload]:
    """One joint training step with open gate, as `train_joint.py` does it."""
    device = torch.device(case.device)
    settings = OptimizerSettings()
    objective = build_objective(case.sizes, case.length).to(device).train()
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    (optimizer,) = build_optimizers(objective, settings)
    average = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    vocab_size = objective.token_encoder.config.vocab_size
    input_ids = torch.randint(vocab_size, (case.batch_size, case.length), device=device)
    timesteps = torch.rand(case.batch_size, device=device)

    def step() -> None:
        # the same self-conditioning coins each time, so that every step executes the same products
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.dtype == "bfloat16"):
            losses = objective(input_ids, timesteps, generator=generator)
        losses.total.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        average.step(parameters)
        optimizer.zero_grad(set_to_none=True)

    return [Workload("training step", step, [objective])]
