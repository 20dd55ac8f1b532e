"""What the samplers of token-level diffusion share: grids, steps, randomness and settings, as diffusers schedulers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..loading.checks import check_settings, whole_number
from ..loading.safe_loading import read_json
from .categorical import Generators, row_generators, word_probabilities


@dataclass
class TokenSchedulerOutput(BaseOutput):
    """
    Attributes:
        prev_sample: the sample at the next, cleaner time: the model's next input.
    """

    prev_sample: Any


class TokenScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The base of the samplers of token-level diffusion. A sampler draws its start ([`~TokenScheduler.start`]), says what
    the network is given ([`~TokenScheduler.model_inputs`]), goes to the next time ([`~TokenScheduler.step`]), and
    reads the words of a sample ([`~TokenScheduler.words`]).

    `timesteps` holds the times at which the network is evaluated, float64, and each step costs one evaluation.

    Every sampler has these settings:
        temperature: that logits are divided by, not negative; 0 takes the most likely word.
        top_p: probability, in (0, 1], of the most likely words that are drawn from.
        keep_crossing: whether the word whose probability crosses `top_p` is among them.

    Attributes:
        process: the noise that it reverses, which the network must have been trained with (`config.process`).
        takes_given: whether some words of a text may be given.

    Args:
        ranges: of the settings that a sampler adds to these, as for `check_settings`.

    Raises:
        ValueError: settings outside of their ranges.
    """

    process: ClassVar[str]
    takes_given: ClassVar[bool] = False
    order = 1

    def __init__(self, **ranges: str | tuple[Any, ...]):
        shared: dict[str, str | tuple[Any, ...]] = {"temperature": "[0, inf)", "top_p": "(0, 1]"}
        ranges = {**{name: allowed for name, allowed in shared.items() if name in self.config}, **ranges}
        check_settings(type(self).__init__, self.config, **ranges)
        self.num_inference_steps: int | None = None
        self.grid: list[float] = []
        self.timesteps = torch.empty(0, dtype=torch.float64)
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @classmethod
    def _dict_from_json_file(cls, json_file: Any, **kwargs: Any) -> dict[str, Any]:
        # diffusers before 0.42 adds an argument, for archives
        return read_json(json_file)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def step_index(self) -> int | None:
        """Number of steps taken on the present grid; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Place on the grid of the first step; None where its time is looked up."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says where on the grid the first step begins; it is looked up otherwise, which waits for the device."""
        self._begin_index = begin_index

    def time_grid(self, num_steps: int) -> torch.Tensor:
        """`num_steps + 1` times of monotone order, float64, from noise to data."""
        raise NotImplementedError

    def evaluation_times(self) -> list[float]:
        """At which times of the grid the network is evaluated: all of them, the last for the words that remain."""
        return self.grid

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the grid of so many transitions.

        Raises:
            ValueError: no positive integer.
        """
        num_steps = whole_number(num_inference_steps)
        if num_steps is None or num_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer of at least 1.")
        self.num_inference_steps = num_steps
        self.grid = self.time_grid(num_steps).tolist()
        self.timesteps = torch.tensor(self.evaluation_times(), dtype=torch.float64, device=device)
        self._begin_index = self._step_index = None

    def index_of(self, timestep: float | torch.Tensor) -> int:
        """Place on the grid: of `begin_index` or a time before the first step, and from there on one after the other.

        Raises:
            ValueError: `set_timesteps` was not called, a time that is not on the grid, or a grid at its end.
        """
        if self.num_inference_steps is None:
            raise ValueError("step needs a time grid; call set_timesteps(num_inference_steps) first.")
        if self._step_index is None and self._begin_index is not None:
            return self._begin_index
        if self._step_index is None:
            places = [i for i, time in enumerate(self.grid) if math.isclose(time, float(timestep), abs_tol=1e-6)]
            if not places:
                raise ValueError(f"timestep={float(timestep)} is not one of the {len(self)} times of `timesteps`.")
            return places[0]
        if self._step_index >= len(self.timesteps):
            raise ValueError("All steps of the grid are taken; call set_timesteps again for a new sample.")
        return self._step_index

    def start(self, token_ids: torch.Tensor, vocab_size: int, generator: Any, embeddings: torch.Tensor) -> Any:
        """The sample at the grid's beginning.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): of any value; gives the shape.
            vocab_size: words K.
            generator: source of the noise, or a list of one for each text.
            embeddings (`torch.Tensor` of shape `(vocab_size, width)`): of the words, for samplers that need them.
        """
        raise NotImplementedError

    def give(self, sample: Any, token_ids: torch.Tensor, given: torch.Tensor) -> Any:
        """The sample with words in the places where `given`, bool (B, L); ValueError for a sampler that takes none."""
        raise ValueError(
            f"{type(self).__name__} writes whole texts, and neither continues prompts nor fills gaps. Models of the "
            "processes 'masked' and 'candi' do."
        )

    def model_inputs(self, sample: Any, timestep: float | torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of the network at one of `timesteps`."""
        raise NotImplementedError

    def words(self, sample: Any) -> torch.Tensor:
        """Token ids (B, L) of a sample."""
        return sample

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What words are drawn from, by logits (..., K): of the same shape, float32 at least."""
        config = self.config
        return word_probabilities(logits, config.temperature, config.top_p, config.keep_crossing)

    def take_step(self, logits: torch.Tensor, index: int, sample: Any, generators: Generators, **inputs: Any) -> Any:
        """The sample after the step from `grid[index]`, the last of which ends in words."""
        raise NotImplementedError

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: Any,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **inputs: Any,
    ) -> TokenSchedulerOutput | tuple[Any]:
        """Goes from one time of the grid to the next.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): logits of the words;
                log-probabilities are logits, too.
            timestep: the time of `sample`; looked up at the first step only, since steps follow one another, and not
                after [`~TokenScheduler.set_begin_index`].
            sample: at that time; its type is the sampler's.
            generator: source of all draws; a list gives each text its own stream.
            return_dict: whether to return a [`TokenSchedulerOutput`] instead of a tuple.
            inputs: what a sampler needs beside these.

        Raises:
            ValueError: as of [`~TokenScheduler.index_of`], or a list of generators of another length than the batch.
        """
        index = self.index_of(timestep)
        generators = row_generators(generator, len(model_output))
        prev_sample = self.take_step(model_output, index, sample, generators, **inputs)
        self._step_index = index + 1
        return TokenSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
