"""How latents are denoised: what a call asks for, and what the denoiser is told of each step."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..loading.checks import whole_number


StepCallback: TypeAlias = (
    Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
)


@dataclass(frozen=True)
class DenoisingStep:
    """What the denoiser is told of a step, beside the latents.

    Attributes:
        timestep: what the scheduler calls it.
        time: in [0, 1], of shape ().
        self_condition_weight: w of the prediction of the step before.
        guidance_scale: w of what is given.
        guidance_rescale: how far guidance keeps its prediction's standard deviation.
        conditions: further arguments of the transformer.
    """

    timestep: torch.Tensor
    time: torch.Tensor
    self_condition_weight: float
    guidance_scale: float
    guidance_rescale: float
    conditions: dict[str, torch.Tensor | None]

    @property
    def num_function_evaluations(self) -> int:
        """How often the transformer sees each sample."""
        return 1 + (self.self_condition_weight not in (0, 1)) + (self.guidance_scale != 1)


@dataclass
class Sampling:
    """How latents are denoised: the arguments of [`LDLMPipeline.__call__`] of these names."""

    num_inference_steps: int = 128
    timesteps: list[float] | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    self_condition_scale: float | None = None
    self_condition_decay: float = 0.0
    guidance_rescale: float | None = None
    guidance_scale: float | None = None
    guidance_interval: Sequence[float] = (0.0, 1.0)
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: list[str] | None = None

    @classmethod
    def of(cls, caller: str, arguments: dict[str, Any]) -> Sampling:
        """The arguments of a method; TypeError, as Python's own, for those that it does not take."""
        names = [field.name for field in fields(cls)]
        for name in arguments.keys() - set(names):
            raise TypeError(
                f"{caller}() got an unexpected argument {name!r}. Of the call's it takes {', '.join(names)}."
            )
        return cls(**arguments)

    @property
    def callback_tensors(self) -> list[str]:
        """Which tensors the callback is given."""
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            return self.callback_on_step_end.tensor_inputs
        names = self.callback_on_step_end_tensor_inputs
        return ["latents"] if names is None else names


def check_counts(**counts: Any) -> None:
    """Raises ValueError unless each is a positive integer."""
    for name, value in counts.items():
        whole = whole_number(value)
        if whole is None or whole < 1:
            hint = ""
            if name == "batch_size" and isinstance(value, (str, list, tuple)):
                hint = " A text to be continued goes first: pipe(text) or pipe(prompt=text)."
            raise ValueError(f"`{name}` must be a positive integer, got {reprlib.repr(value)}.{hint}")


def check_number(name: str, number: Any, highest: float = math.inf, above_zero: bool = False) -> None:
    """Raises ValueError unless an argument is a finite number in [0, highest], or (0, highest]."""
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not (is_number and math.isfinite(number) and 0 <= number <= highest) or (above_zero and number == 0):
        interval = f"{'(' if above_zero else '['}0, {highest:g}]"
        bound = "finite number that is not negative" if highest == math.inf else f"number in {interval}"
        raise ValueError(f"`{name}` must be a {bound}, got {number!r}.")
