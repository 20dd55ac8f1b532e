"""Euler–Maruyama on the reverse variance-preserving SDE with the tangent schedule: the paper's sampler."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..hub.safe_loading import check_settings, read_json
from . import tangent


@dataclass
class TangentEulerMaruyamaSchedulerOutput(BaseOutput):
    """
    Attributes:
        prev_sample (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`):
            Noisy latents at the next, earlier time: the model's next input.
        pred_original_sample (`torch.Tensor` of the same shape):
            Prediction of the clean latents at this step.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class TangentEulerMaruyamaScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The noise process of LDLM, in training ([`~TangentEulerMaruyamaScheduler.add_noise`]) and in sampling
    ([`~TangentEulerMaruyamaScheduler.step`]): the tangent schedule (App. C) and the explicit
    Euler–Maruyama solver of section 7. Time is continuous in [0, 1], 0 = clean and 1 = noise; the model predicts the
    clean latents.

    With `tangent_d=3` beta(0.95) is about 40, so below about 40 steps the solver and not the model limits the quality.

    Args:
        tangent_d (`float`, defaults to 3.0): d of the schedule; larger means more noise at every time.
        beta_t_max (`float`, defaults to 0.95): the drift's beta(t) is evaluated at min(t, beta_t_max), since it
            diverges at t = 1.
        t_min (`float`, defaults to 0.05): where the time grid ends.

    Raises:
        ValueError: values outside of their ranges.
    """

    _compatibles = ["TangentEulerMaruyamaScheduler"]
    order = 1

    @register_to_config
    def __init__(self, tangent_d: float = 3.0, beta_t_max: float = 0.95, t_min: float = 0.05):
        check_settings(TangentEulerMaruyamaScheduler.__init__, locals())
        if not tangent_d > 0:
            raise ValueError(f"tangent_d={tangent_d} must be positive.")
        if not 0 < beta_t_max < 1:
            raise ValueError(f"beta_t_max={beta_t_max} must lie between 0 and 1; beta diverges at t = 1.")
        if not 0 <= t_min < 1:
            raise ValueError(f"t_min={t_min} must lie in [0, 1).")
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)
        self._begin_index: int | None = None
        self._step_index: int | None = None

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
        alpha, sigma = tangent.alpha_sigma(timesteps, self.config.tangent_d)
        return alpha.to(timesteps.dtype), sigma.to(timesteps.dtype)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """alpha_t z + sigma_t eps (Eq. 1).

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`): clean latents z.
            noise (`torch.Tensor` of the same shape): standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch_size,)`): times in [0, 1].
        """
        if timesteps.shape != original_samples.shape[:1]:
            raise ValueError(
                f"timesteps of shape {tuple(timesteps.shape)} must hold one time in [0, 1] for each of the "
                f"{original_samples.shape[0]} samples."
            )
        coefficient_shape = (-1,) + (1,) * (original_samples.ndim - 1)
        alpha, sigma = tangent.alpha_sigma(timesteps.to(original_samples.device), self.config.tangent_d)
        alpha = alpha.to(original_samples.dtype).view(coefficient_shape)
        sigma = sigma.to(original_samples.dtype).view(coefficient_shape)
        return alpha * original_samples + sigma * noise

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Sets the times at which the model is evaluated, and the coefficients of each step.

        Args:
            num_inference_steps: number of model evaluations on the paper's grid, evenly spaced from 1 to `t_min`.
            device: where `timesteps` shall lie.
            timesteps: explicit times instead, strictly decreasing in (t_min, 1]; the last step ends at `t_min`.

        Raises:
            ValueError: not exactly one of both given, no steps, or times that do not decrease within their range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give exactly one of num_inference_steps and timesteps.")
        if timesteps is None:
            if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
                raise ValueError(f"num_inference_steps={num_inference_steps!r} must be an integer.")
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1.")
            grid = tangent.uniform_time_grid(num_inference_steps, self.config.t_min)
        else:
            t_min = torch.tensor([self.config.t_min], dtype=torch.float64)
            grid = torch.cat([torch.as_tensor(timesteps, dtype=torch.float64, device="cpu").flatten(), t_min])
            if len(grid) < 2 or grid[0] > 1 or not torch.all(grid[1:] < grid[:-1]):
                raise ValueError(
                    f"timesteps={timesteps!r} must be one or more times that strictly decrease within "
                    f"({self.config.t_min}, 1]; the scheduler's t_min={self.config.t_min} ends the last step."
                )
        self.num_inference_steps = len(grid) - 1
        self.timesteps = grid[:-1].float().to(device)
        self._coefficients = self._step_coefficients(grid)
        self._step_index = None
        self._begin_index = None

    def _step_coefficients(self, grid: torch.Tensor) -> list[tuple[float, float, float]]:
        """Weights of (sample, predicted clean latents, noise) for each step of the float64 grid, as Python floats.

        Euler–Maruyama on dx = (-beta/2 x - beta score) dt + sqrt(beta) dw with dt < 0 and
        score = (alpha x0 - x) / sigma^2 is linear in the three.
        """
        d = self.config.tangent_d
        current, step_sizes = grid[:-1], grid[:-1] - grid[1:]
        alpha, sigma = tangent.alpha_sigma(current, d)
        beta_times_step = tangent.beta(current.clamp(max=self.config.beta_t_max), d) * step_sizes
        sample_weight = 1 + beta_times_step / 2 - beta_times_step / sigma.square()
        clean_weight = beta_times_step * alpha / sigma.square()
        return list(zip(sample_weight.tolist(), clean_weight.tolist(), beta_times_step.sqrt().tolist(), strict=True))

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
    ) -> TangentEulerMaruyamaSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Goes from one time of the grid to the next, earlier one.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, num_latents, latent_size)`): predicted clean latents.
            timestep: the time of `sample`; looked up on the grid at the first step only, since steps follow one
                another.
            sample (`torch.Tensor` of the same shape): noisy latents at that time.
            generator: source of the noise; a list gives each sample its own stream.
            return_dict: whether to return a [`TangentEulerMaruyamaSchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: `set_timesteps` was not called, or the grid is at its end.
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
        sample_weight, clean_weight, noise_weight = self._coefficients[self._step_index]
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        clean_latents = model_output.to(sample.dtype)
        # summed in the noise's own memory: nobody else holds it, whereas a callback may hold the samples
        prev_sample = noise.mul_(noise_weight)
        prev_sample.add_(sample, alpha=sample_weight).add_(clean_latents, alpha=clean_weight)
        self._step_index += 1
        if not return_dict:
            return prev_sample, clean_latents
        return TangentEulerMaruyamaSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean_latents)
