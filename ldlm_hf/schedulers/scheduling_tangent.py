"""What all schedulers of the tangent schedule share: the noise process, the time grids, and how a step is taken.

Every solver here is linear in what it knows: a step of it is five weights (`StepWeights`), computed once in float64
for the whole grid, so a solver is a function from a grid to weights and nothing more.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..loading.checks import check_settings, whole_number
from ..loading.safe_loading import read_json
from . import DIFFUSERS_SCHEDULERS, SCHEDULERS
from .tangent import alpha_sigma, learned_time_grid, log_snr_time_grid, uniform_time_grid


TIME_GRIDS = ("uniform", "log_snr", "learned")


@dataclass
class TangentSchedulerOutput(BaseOutput):
    """
    Attributes:
        prev_sample (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`):
            Noisy latents at the next, earlier time: the model's next input.
        pred_original_sample (`torch.Tensor` of the same shape):
            Prediction of the clean latents at this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


@dataclass(frozen=True)
class StepWeights:
    """One step of a solver: the next sample is the sum of these weights times what they are named after.

    Attributes:
        sample: of the present sample.
        clean: of the present prediction of the clean latents.
        noise: of new standard normal noise; 0 where the step is deterministic.
        previous_clean: of the prediction of the step before.
        previous_noise: of the noise that the step before has drawn.
    """

    sample: float
    clean: float
    noise: float = 0.0
    previous_clean: float = 0.0
    previous_noise: float = 0.0


def step_weights(*columns: torch.Tensor) -> list[StepWeights]:
    """Weights of each step from columns (num_steps,) in the order of [`StepWeights`]."""
    return [StepWeights(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


class TangentScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The noise process of LDLM, in training ([`~TangentScheduler.add_noise`]) and in sampling
    ([`~TangentScheduler.step`]), on the tangent schedule (App. C). Time is continuous in [0, 1], 0 = clean and
    1 = noise; the model predicts the clean latents. The base of the solvers, each of which says by
    [`~TangentScheduler.solver_weights`] how it goes from one time to the next.

    The solvers are swapped by `pipe.scheduler = TangentDDIMScheduler.from_config(pipe.scheduler.config)`; settings
    that only one of them knows survive the way there and back. A step costs one evaluation of the model in each of
    them.

    Every solver has these settings:
        tangent_d: d of the schedule; larger means more noise at every time.
        t_min: where the time grid ends.
        t_max: where a grid that is even in log-SNR begins; it cannot begin at 1, where the log-SNR is -inf.
        time_grid: `"uniform"`, even in t (the paper's); `"log_snr"`, even in log-SNR; `"learned"`, even in the warped
            time F(t) of the adaptive timestep sampler (Section 5.3), so that between two times the loss that the
            model was trained with differs by the same amount.
        timestep_cdf: F at evenly spaced times from 0 to 1, as training saves it.

    Args:
        ranges: of the settings that a solver adds to these, as for `check_settings`.

    Raises:
        ValueError: values outside of their ranges, or a learned grid without `timestep_cdf`.
    """

    _compatibles = [*SCHEDULERS, *DIFFUSERS_SCHEDULERS]
    # evaluations of the model in a step
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, **ranges: str | tuple[Any, ...]):
        config = self.config
        check_settings(
            type(self).__init__,
            config,
            tangent_d="(0, inf)",
            t_min="[0, 1)",
            t_max=f"({config.t_min}, 1)",
            time_grid=TIME_GRIDS,
            **ranges,
        )
        if config.time_grid == "log_snr" and config.t_min == 0:
            raise ValueError("time_grid='log_snr' with t_min=0: the log-SNR is infinite there; set a positive t_min.")
        if config.time_grid == "learned" and config.timestep_cdf is None:
            raise ValueError(
                "time_grid='learned' needs timestep_cdf, the distribution of times that a run with "
                "timestep_sampler.adaptive=true learns every timestep_sampler.update_every steps: lower that for a "
                "shorter run, use 'uniform' or 'log_snr', or pass timestep_cdf."
            )
        if config.timestep_cdf is not None:
            cdf = torch.tensor(config.timestep_cdf, dtype=torch.float64)
            if len(cdf) < 2 or cdf[0] != 0 or cdf[-1] != 1 or not torch.all(cdf[:-1] <= cdf[1:]):
                raise ValueError(
                    f"timestep_cdf={reprlib.repr(config.timestep_cdf)} must hold two or more numbers that rise from 0 "
                    "to 1: F at evenly spaced times."
                )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self.step_weights: list[StepWeights] = []
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._previous_clean: torch.Tensor | None = None
        self._previous_noise: torch.Tensor | None = None

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
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
        """Where on the grid sampling starts, if the pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the place on the grid that sampling starts at, so that no step has to look its time up."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Returns the sample as it is: a variance-preserving process needs no scaling."""
        return sample

    def marginal(self, timesteps: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha(t) and sigma(t) of z_t = alpha z + sigma eps, in the floating-point type of `timesteps`.

        Computed in float64 and cast once: exactly (1, 0) at t = 0 and (0, 1) at t = 1.
        """
        timesteps = torch.as_tensor(timesteps)
        if not timesteps.is_floating_point():
            timesteps = timesteps.to(torch.get_default_dtype())
        alpha, sigma = alpha_sigma(timesteps, self.config.tangent_d)
        return alpha.to(timesteps.dtype), sigma.to(timesteps.dtype)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha_t z + sigma_t eps (Eq. 1).

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`): clean latents z.
            noise (`torch.Tensor` of the same shape): standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch_size,)`):
                Times in [0, 1]. One value, of shape `(1,)` or `()`, holds for the whole batch.

        Raises:
            ValueError: neither one time nor one for each sample.
        """
        if timesteps.shape not in ((), (1,), original_samples.shape[:1]):
            raise ValueError(
                f"timesteps of shape {tuple(timesteps.shape)} must hold one time in [0, 1], or one for each of the "
                f"{original_samples.shape[0]} samples."
            )
        coefficient_shape = (-1,) + (1,) * (original_samples.ndim - 1)
        alpha, sigma = alpha_sigma(timesteps.to(original_samples.device), self.config.tangent_d)
        alpha = alpha.to(original_samples.dtype).view(coefficient_shape)
        sigma = sigma.to(original_samples.dtype).view(coefficient_shape)
        return alpha * original_samples + sigma * noise

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Sets the times at which the model is evaluated, and the weights of each step.

        Args:
            num_inference_steps: number of model evaluations on the grid that `time_grid` names.
            device: where `timesteps` shall lie.
            timesteps: explicit times instead, strictly decreasing in (t_min, 1]; the last step ends at `t_min`.

        Raises:
            ValueError: not exactly one of both given, fewer steps than the solver needs, or times that do not
                decrease within their range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give exactly one of num_inference_steps and timesteps.")
        if timesteps is None:
            num_steps = whole_number(num_inference_steps)
            if num_steps is None or num_steps < 1:
                raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer of at least 1.")
            grid = self.make_time_grid(num_steps)
        else:
            t_min = torch.tensor([self.config.t_min], dtype=torch.float64)
            grid = torch.cat([torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").flatten(), t_min])
            if len(grid) < 2 or grid[0] > 1 or not torch.all(grid[1:] < grid[:-1]):
                raise ValueError(
                    f"timesteps={timesteps!r} must be one or more times that strictly decrease within "
                    f"({self.config.t_min}, 1]; the scheduler's t_min={self.config.t_min} ends the last step."
                )
        evaluation_times, self.step_weights = self.solver_weights(grid)
        self.num_inference_steps = len(grid) - 1
        self.timesteps = evaluation_times.float().to(device)
        self._step_index = None
        self._begin_index = None
        self._previous_clean = self._previous_noise = None

    def make_time_grid(self, num_steps: int) -> torch.Tensor:
        """`num_steps + 1` times in float64, from the first evaluation's down to `t_min`, as `time_grid` says."""
        config = self.config
        if config.time_grid == "log_snr":
            return log_snr_time_grid(num_steps, config.t_max, config.t_min, config.tangent_d)
        if config.time_grid == "learned":
            return learned_time_grid(num_steps, config.t_min, config.timestep_cdf)
        return uniform_time_grid(num_steps, config.t_min)

    def solver_weights(self, grid: torch.Tensor) -> tuple[torch.Tensor, list[StepWeights]]:
        """The solver.

        Args:
            grid (`torch.Tensor` of shape `(num_steps + 1,)`): times in float64, strictly decreasing.

        Returns:
            The times that the model is evaluated at, of shape `(num_steps,)`, and the weights of each step.

        Raises:
            ValueError: fewer steps than the solver needs.
        """
        raise NotImplementedError

    def _index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Place of a time on the present grid; ValueError if it is not there."""
        distances = (self.timesteps.cpu().double() - float(timestep)).abs()
        index = int(distances.argmin())
        if not math.isclose(float(distances[index]), 0.0, abs_tol=1e-6):
            raise ValueError(f"timestep={float(timestep)} is not one of the {len(self)} times of `timesteps`.")
        return index

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> TangentSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Goes from one time of the grid to the next, earlier one.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`): predicted clean latents.
            timestep: the time of `sample`; looked up on the grid at the first step only, since steps follow one
                another.
            sample (`torch.Tensor` of the same shape): noisy latents at that time.
            generator: source of the noise, which only steps with noise draw from; a list gives each sample its own
                stream.
            return_dict: whether to return a [`TangentSchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: `set_timesteps` was not called, the grid is at its end, or sampling began inside of the grid at
                a step that needs the noise of the one before.
        """
        if self.num_inference_steps is None:
            raise ValueError("step needs a time grid; call set_timesteps(num_inference_steps) first.")
        if self._step_index is None:
            self._step_index = self._index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= self.num_inference_steps:
            raise ValueError(
                f"All {self.num_inference_steps} steps of the grid are taken; call set_timesteps again for a new "
                "sample."
            )
        weights = self.step_weights[self._step_index]
        clean_latents = model_output.to(sample.dtype)
        # summed in memory of its own: a callback may hold the samples
        prev_sample = (weights.sample * sample).add_(clean_latents, alpha=weights.clean)
        if weights.previous_clean:
            # where sampling begins, no earlier prediction: with the present one in its place the step is of order 1
            previous_clean = clean_latents if self._previous_clean is None else self._previous_clean
            prev_sample.add_(previous_clean, alpha=weights.previous_clean)
        if weights.previous_noise:
            if self._previous_noise is None:
                raise ValueError(
                    f"Step {self._step_index} takes back the noise that the step before it has added; begin at the "
                    "first step of the grid."
                )
            prev_sample.add_(self._previous_noise, alpha=weights.previous_noise)
        noise = None
        if weights.noise:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            prev_sample.add_(noise, alpha=weights.noise)
        self._step_index += 1
        # of a step is kept what the next one has a weight for
        upcoming = self.step_weights[self._step_index : self._step_index + 1]
        self._previous_clean = clean_latents if any(one.previous_clean for one in upcoming) else None
        self._previous_noise = noise if any(one.previous_noise for one in upcoming) else None
        if not return_dict:
            return prev_sample, clean_latents
        return TangentSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean_latents)

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with other rows of the batch: keeps these of what the last step has left for the next one.

        Args:
            rows (`torch.LongTensor` of shape `(batch_size,)`): indices of rows, any of them once, more often or never.
        """
        if self._previous_clean is not None:
            self._previous_clean = self._previous_clean[rows]
        if self._previous_noise is not None:
            self._previous_noise = self._previous_noise[rows]
