"""What is trained, as the training loop and the training scripts see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..evaluation.real_text import held_out_rows
from .randomness import RowRandomness
from .settings import TrainingSettings


@dataclass
class StepLosses:
    """What a recipe computes on one batch: the loss that is minimised, scalars for the log, and tensors that
    `Recipe.observe` is given, gathered from all ranks: of shape (n,), n the same in each pass, in the batch's order.
    """

    total: torch.Tensor
    values: dict[str, torch.Tensor]
    observations: tuple[torch.Tensor, ...] = ()


@dataclass
class Evaluation:
    """What a recipe has measured on held-out text: numbers for the log, of which those with a `/` in their names are
    left out of the printed summary, a few samples, and pairs of t and the diffusion loss there.
    """

    values: dict[str, float]
    texts: list[str] = field(default_factory=list)
    loss_over_time: list[tuple[float, float]] = field(default_factory=list)


class Recipe(ABC):
    """What [`TrainingLoop`] trains: one module with one `forward`, and how a batch becomes a loss.

    Attributes:
        module: holds all trained parameters. accelerate wraps it, so the loop hands it to `losses`.
    """

    module: nn.Module

    @abstractmethod
    def losses(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        step: int,
        randomness: RowRandomness,
        given: torch.Tensor | None = None,
    ) -> StepLosses:
        """Losses of one batch of token ids (B, L); `module` is `self.module` as accelerate has prepared it, and
        `given`, bool (B, L), of text in pairs alone, says which tokens are a source's.

        All that is random comes from `randomness`, and nothing here may wait for the device.
        """

    @abstractmethod
    def evaluate(self, snapshot: nn.Module, step: int) -> Evaluation:
        """Evaluates a copy of the module that holds the EMA weights; draws from generators of its own only."""

    def complete(self, snapshot: nn.Module) -> None:
        """Measures anew what depends on the weights, on the main process's copy that was given the EMA weights."""

    def use_ema_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Takes the EMA weights of this rank by the names of the module's trained parameters; they are kept up to date
        in place."""

    def observe(self, *observations: torch.Tensor) -> None:
        """Takes in what one optimiser step has shown: observations of the whole batch, in its order, on the CPU."""

    def steps_until_observation(self) -> int | None:
        """How many steps may be taken before `observe` has to have seen the last of them; None: any number."""
        return None

    def log_values(self, step: int) -> dict[str, float]:
        """Further numbers for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State beside the module's weights that a resumed run needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads such a state."""


class PipelineRecipe(Recipe):
    """A recipe that [`launch.run`] makes from its settings, and whose trained module becomes a pipeline.

    `load` does what needs no text, `build` the rest; between the two, a dry run ends.

    Args:
        settings: of `settings_class`.
        accelerator: of the run.

    The `module` has `example_inputs` to count its FLOPs with ([`flops.count_flops`]). What [`samples.load_pipeline`]
    says of a pipeline that generates texts, the finished one has.

    Attributes:
        settings_class: what the script's file and command line are read as.
        result_folder: of the run's folder, where `save` writes to.
        tokenizer: of the text; set by `load`, as `module` and the next one.
        sequence_length: tokens L of the text's chunks.
        held_out: held-out sequences that are evaluated on, (n, L); set by `build`.
        held_out_given: which of their tokens are a source's, bool (n, L); None of text that is not in pairs.
    """

    settings_class: ClassVar[type]
    result_folder: ClassVar[str] = "pipeline"
    tokenizer: PreTrainedTokenizerBase
    sequence_length: int
    held_out: torch.Tensor
    held_out_given: torch.Tensor | None = None

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator):
        self.settings = settings
        self.accelerator = accelerator
        self.device = accelerator.device

    @abstractmethod
    def load(self) -> None:
        """Loads tokenizer and frozen components, and builds the module.

        Raises:
            ValueError, OSError: they are not there, or do not fit the settings.
        """

    def build(self, train: Dataset[dict[str, torch.Tensor]], held_out: Dataset[dict[str, torch.Tensor]]) -> None:
        """Completes the module, with what is measured on the training text, and chooses the held-out sequences."""
        rows = held_out_rows(held_out, self.settings.evaluation.num_sequences)
        self.held_out, self.held_out_given = rows["input_ids"], rows.get("given")

    def expected_scheduler(self) -> SchedulerMixin | None:
        """A scheduler with the settings of the finished pipeline's; None where there will be none."""
        return None

    @abstractmethod
    def pipeline(self, snapshot: Any) -> DiffusionPipeline | None:
        """The pipeline of a trained module, on the run's device; None where another run has to complete it."""

    def save(self, snapshot: nn.Module, folder: Path) -> None:
        """Saves the pipeline of a trained module, or the components that there are."""
        pipeline = self.pipeline(snapshot)
        assert pipeline is not None, "a recipe without a pipeline saves its components itself"
        pipeline.save_pretrained(folder)

    def next_command(self, folder: Path) -> str:
        """What to run next, for recipes that end without a pipeline."""
        raise NotImplementedError
