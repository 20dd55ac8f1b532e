"""Sampling with a distilled denoiser that knows both ends of a step, on the tangent schedule."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from ..hub.safe_loading import check_settings
from .scheduling_tangent import StepWeights, TangentScheduler
from .scheduling_tangent_ddim import ddim_weights


class TangentFlowMapScheduler(TangentScheduler):
    r"""
    Steps of any length with a model that predicts D(z; s, t), the mean of the clean predictions on the way from time s
    to an earlier t (`LDLMTransformer1DModel` with `next_timestep_conditioning`, as `training/distill.py` trains it):
    x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) D. The noise process and the time grids are those of
    [`TangentScheduler`]. Exact where the model is, for one step as for many.

    `next_timesteps` holds the ends of the steps beside `timesteps`, their beginnings; the pipeline gives the model
    both.

    Args:
        tangent_d (`float`, defaults to 3.0): d of the schedule; larger means more noise at every time.
        t_min (`float`, defaults to 0.0): where the time grid ends: at the clean latents themselves.
        t_max (`float`, defaults to 0.99): where a grid with `time_grid="log_snr"` begins.
        time_grid (`str`, defaults to `"uniform"`): `"uniform"`, `"log_snr"` or `"learned"`.
        timestep_cdf (`list[float]`, *optional*): F at evenly spaced times from 0 to 1, for `time_grid="learned"`.

    Raises:
        ValueError: values outside of their ranges, or a learned grid without `timestep_cdf`.
    """

    @register_to_config
    def __init__(
        self,
        tangent_d: float = 3.0,
        t_min: float = 0.0,
        t_max: float = 0.99,
        time_grid: str = "uniform",
        timestep_cdf: list[float] | None = None,
    ):
        check_settings(TangentFlowMapScheduler.__init__, locals())
        super().__init__(tangent_d, t_min, t_max, time_grid, timestep_cdf)

    @property
    def next_timesteps(self) -> torch.Tensor:
        """The end of each step, of the shape and on the device of `timesteps`."""
        return torch.cat([self.timesteps[1:], self.timesteps.new_tensor([self.config.t_min])])

    def solver_weights(self, grid: torch.Tensor) -> tuple[torch.Tensor, list[StepWeights]]:
        """[`ddim_weights`]; arguments as of [`TangentScheduler.solver_weights`]."""
        return grid[:-1], ddim_weights(grid, self.config.tangent_d)
