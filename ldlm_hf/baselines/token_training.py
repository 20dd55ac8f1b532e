"""What the token-level diffusion models share in training: settings, objective and recipe."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer

from ..data import DataSettings
from ..evaluation.samplers import OWN
from ..loading.checks import check_settings
from ..loading.pretrained_sources import resolve_pretrained_source
from ..objective.base import Objective
from ..training.randomness import RowRandomness
from ..training.recipe import Evaluation, PipelineRecipe, StepLosses
from ..training.settings import EvaluationSettings, LoopSettings, OptimizerSettings, check_decay, check_shifts
from .backbone_embeddings import start_from_backbone
from .categorical import Generators, row_generators
from .noise_schedule import stratified_times
from .pipeline_token_diffusion import TokenDiffusionPipeline
from .token_scheduler import TokenScheduler
from .token_transformer import TokenDiffusionTransformer


# 1. Settings


@dataclass
class TokenModelSettings:
    """The network.

    Attributes:
        backbone: model whose tokenizer it has: Hub id, folder, or `package:NAME/FOLDER`.
        sequence_length: tokens L.
        embeddings_from_backbone: start the word embeddings from the backbone's, which have to be as wide.
        hidden_size, num_layers, num_attention_heads: of the blocks.
        condition_size: width of the embedded time.
        dropout: of what attention and feed-forward give.
    """

    backbone: str = "openai-community/gpt2"
    sequence_length: int = 1024
    embeddings_from_backbone: bool = False
    hidden_size: int = 768
    num_layers: int = 12
    num_attention_heads: int = 12
    condition_size: int = 128
    dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = ("sequence_length", "hidden_size", "num_layers", "num_attention_heads", "condition_size")
        check_settings(type(self).__init__, vars(self), **dict.fromkeys(sizes, "[1, inf)"), dropout="[0, 1)")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} is no even multiple of num_attention_heads="
                f"{self.num_attention_heads}, which rotary positions need."
            )


def papers_optimizer() -> OptimizerSettings:
    """Theirs, with a constant learning rate after the warmup."""
    return OptimizerSettings(
        learning_rate=3e-4, lr_warmup_steps=2500, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8
    )


@dataclass
class TokenRunSettings:
    """Settings of a run, with the papers' values of its optimiser."""

    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=papers_optimizer)
    loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(output_dir="runs/token-diffusion", max_steps=1_000_000)
    )
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        check_decay(self.optimizer, self.loop)
        check_shifts(self.data, self.loop)
        if self.data.source_column is not None:
            raise ValueError(
                f"data.source_column={self.data.source_column!r}: pairs are for latent diffusion models; leave it out."
            )
        if self.evaluation.sampler != OWN:
            raise ValueError(
                f"evaluation.sampler={self.evaluation.sampler!r}: samplers named there are of latent diffusion; leave "
                "it out, and give the finished pipeline another scheduler."
            )


@dataclass
class TokenDiffusionSettings(TokenRunSettings):
    """Settings of `train_baseline.py` for any of these methods."""

    model: TokenModelSettings = field(default_factory=TokenModelSettings)


# 2. Objective


class TokenDiffusionLosses(NamedTuple):
    """Mean loss in nats a token."""

    total: torch.Tensor


class TokenDiffusionObjective(Objective):
    """The loss of one method, the mean over all tokens of a batch."""

    def __init__(self, transformer: TokenDiffusionTransformer):
        super().__init__()
        self.transformer = transformer

    @property
    def vocab_size(self) -> int:
        """Words K."""
        return self.transformer.config.vocab_size

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Any]:
        """Arguments of `forward` for a batch of no particular text, to count what a pass costs."""
        input_ids = torch.zeros(batch_size, sequence_length, dtype=torch.long)
        return {"input_ids": input_ids, "uniforms": [0.5] * batch_size}

    @abstractmethod
    def token_losses(self, input_ids: torch.Tensor, uniforms: torch.Tensor, generators: Generators) -> torch.Tensor:
        """Losses (B, L) of token ids (B, L), at times that numbers (B,) in [0, 1), float64 on the CPU, stand for."""

    def forward(
        self,
        input_ids: torch.Tensor,
        uniforms: Sequence[float],
        generator: list[torch.Generator] | None = None,
        **phase: Any,
    ) -> TokenDiffusionLosses:
        """The loss of token ids (B, L).

        Args:
            input_ids: clean words.
            uniforms: a number in [0, 1) for each row, which its time is made of.
            generator: source of noise for each row.
            phase: what a method's recipe says of the step.
        """
        generators = row_generators(generator, len(input_ids))
        times = torch.tensor(uniforms, dtype=torch.float64, device="cpu")
        return TokenDiffusionLosses(self.token_losses(input_ids, times, generators, **phase).mean())


# 3. Recipe


class TokenRecipe(PipelineRecipe):
    """A recipe that ends with a [`TokenDiffusionPipeline`]."""

    settings: TokenRunSettings
    module: TokenDiffusionObjective

    @abstractmethod
    def scheduler(self) -> TokenScheduler:
        """The method's sampler."""

    def pipeline(self, snapshot: TokenDiffusionObjective) -> TokenDiffusionPipeline:
        return TokenDiffusionPipeline(snapshot.transformer, self.scheduler(), self.tokenizer).to(self.device)

    @torch.no_grad()
    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        """The plain loss, with `evaluation.grid_size` stratified times for each sequence."""
        total, count, size = 0.0, len(self.held_out), self.settings.evaluation.batch_size
        for draw in range(self.settings.evaluation.grid_size):
            for first in range(0, count, size):
                input_ids = self.held_out[first : first + size].to(self.device)
                randomness = RowRandomness(0, draw, range(first, first + len(input_ids)), count)
                total += float(snapshot(input_ids, *draws(randomness, self.device)).total) * len(input_ids)
        return Evaluation({"token_loss": total / count / self.settings.evaluation.grid_size})


class TokenDiffusionRecipe(TokenRecipe):
    """Training of one of the methods, each of which says its process, objective and sampler.

    Attributes:
        process: of the network.
    """

    settings_class = TokenDiffusionSettings
    settings: TokenDiffusionSettings
    process: ClassVar[str]

    def network_arguments(self) -> dict[str, Any]:
        """Arguments of the network that are the method's own."""
        return {}

    @abstractmethod
    def objective(self, transformer: TokenDiffusionTransformer) -> TokenDiffusionObjective:
        """The method's loss."""

    def phase(self, step: int) -> dict[str, bool]:
        """What the objective is told of a step."""
        return {}

    def load(self) -> None:
        settings = self.settings.model
        source = resolve_pretrained_source(settings.backbone)
        self.tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **source.kwargs)
        self.sequence_length = settings.sequence_length
        transformer = TokenDiffusionTransformer(
            vocab_size=len(self.tokenizer),
            process=self.process,
            num_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            attention_head_dim=settings.hidden_size // settings.num_attention_heads,
            sample_size=settings.sequence_length,
            condition_size=settings.condition_size,
            dropout=settings.dropout,
            **self.network_arguments(),
        )
        if settings.embeddings_from_backbone:
            start_from_backbone(transformer.embedding.weight[: len(self.tokenizer)], settings.backbone)
        self.module = self.objective(transformer)

    def losses(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        step: int,
        randomness: RowRandomness,
        given: torch.Tensor | None = None,
    ) -> StepLosses:
        loss = module(input_ids, *draws(randomness, input_ids.device), **self.phase(step)).total
        return StepLosses(total=loss, values={"token_loss": loss})


def draws(randomness: RowRandomness, device: torch.device) -> tuple[list[float], list[torch.Generator]]:
    """Stratified numbers in [0, 1) and sources of noise for some rows of a batch."""
    uniforms = stratified_times(randomness.uniform(), randomness.rows.start, randomness.batch_size)
    return uniforms.tolist(), randomness.generators(device)


def load_teacher(components: str, process: str) -> TokenDiffusionPipeline:
    """The pipeline of a trained model of a process that is distilled, in float32.

    Raises:
        ValueError: none is named, or one of another process, or a flow map.
        OSError: there is none.
    """
    if not components:
        raise ValueError("components='': name the pipeline that is distilled, such as RUN/pipeline.")
    pipeline = TokenDiffusionPipeline.from_pretrained(components)
    config = pipeline.transformer.config
    if config.process != process or config.next_timestep_conditioning:
        raise ValueError(
            f"components={components!r} must be a pipeline of the process {process!r} that was not distilled yet; its "
            f"network has process={config.process!r}, next_timestep_conditioning={config.next_timestep_conditioning}."
        )
    pipeline.transformer.float()
    return pipeline
