"""Euler–Maruyama on the reverse variance-preserving SDE with the tangent schedule: the paper's sampler."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from .scheduling_tangent import StepWeights, TangentScheduler, step_weights
from .tangent import alpha_sigma, beta


class TangentEulerMaruyamaScheduler(TangentScheduler):
    r"""
    The explicit Euler–Maruyama solver of section 7, as the paper samples; the noise process and the time grids are
    those of [`TangentScheduler`].

    With `tangent_d=3` beta(0.95) is about 40, so below about 40 steps the solver and not the model limits the quality;
    the other schedulers of the tangent schedule solve its linear part exactly.

    Args:
        beta_t_max (`float`, defaults to 0.95): the drift's beta(t) is evaluated at min(t, beta_t_max), since it
            diverges at t = 1.
        tangent_d, t_min, t_max, time_grid, timestep_cdf: as for every solver, see [`TangentScheduler`].

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
        super().__init__(beta_t_max="(0, 1)")

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
        return current, step_weights(sample_weights, clean_weights, beta_times_step.sqrt())
