"""Euler–Maruyama on the reverse variance-preserving SDE with the tangent schedule: the paper's sampler."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from ..loading.checks import check_settings
from .scheduling_tangent import StepWeights, TangentScheduler
from .tangent import alpha_sigma, beta


class TangentEulerMaruyamaScheduler(TangentScheduler):
    r"""
    The explicit Euler–Maruyama solver of section 7, as the paper samples; the noise process and the time grids are
    those of [`TangentScheduler`].

    With `tangent_d=3` beta(0.95) is about 40, so below about 40 steps the solver and not the model limits the quality;
    the other schedulers of the tangent schedule solve its linear part exactly.

    Args:
        tangent_d (`float`, defaults to 3.0): d of the schedule; larger means more noise at every time.
        beta_t_max (`float`, defaults to 0.95): the drift's beta(t) is evaluated at min(t, beta_t_max), since it
            diverges at t = 1.
        t_min (`float`, defaults to 0.05): where the time grid ends.
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
        beta_t_max: float = 0.95,
        t_min: float = 0.05,
        t_max: float = 0.99,
        time_grid: str = "uniform",
        timestep_cdf: list[float] | None = None,
    ):
        check_settings(TangentEulerMaruyamaScheduler.__init__, locals())
        super().__init__(tangent_d, t_min, t_max, time_grid, timestep_cdf)
        if not 0 < beta_t_max < 1:
            raise ValueError(f"beta_t_max={beta_t_max} must lie between 0 and 1; beta diverges at t = 1.")

    def solver_weights(self, grid: torch.Tensor) -> tuple[torch.Tensor, list[StepWeights]]:
        """Euler–Maruyama on dx = (-beta/2 x - beta score) dt + sqrt(beta) dw with dt < 0 and
        score = (alpha x0 - x) / sigma^2; arguments as of [`TangentScheduler.solver_weights`].
        """
        d = self.config.tangent_d
        current, step_sizes = grid[:-1], grid[:-1] - grid[1:]
        alpha, sigma = alpha_sigma(current, d)
        beta_times_step = beta(current.clamp(max=self.config.beta_t_max), d) * step_sizes
        sample_weights = 1 + beta_times_step / 2 - beta_times_step / sigma.square()
        clean_weights = beta_times_step * alpha / sigma.square()
        columns = (sample_weights.tolist(), clean_weights.tolist(), beta_times_step.sqrt().tolist())
        return current, [StepWeights(*row) for row in zip(*columns, strict=True)]
