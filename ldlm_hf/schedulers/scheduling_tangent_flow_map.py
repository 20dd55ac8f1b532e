"""Sampling with a distilled denoiser that knows both ends of a step, on the tangent schedule."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from .scheduling_tangent import StepWeights, TangentScheduler, step_weights
from .scheduling_tangent_ddim import ddim_coefficients
from .tangent import alpha_sigma, log_snr, timesteps_from_log_snr


class TangentFlowMapScheduler(TangentScheduler):
    r"""
    Steps of any length with a model that predicts D(z; s, t), the mean of the clean predictions on the way from time s
    to an earlier t (`LDLMTransformer1DModel` with `next_timestep_conditioning`, as `training/distill.py` trains it):
    x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) D. The noise process and the time grids are those of
    [`TangentScheduler`]. Exact where the model is, for one step as for many.

    With `gamma` a step lands at an earlier time than that of the grid, where the noise level sigma / alpha is
    sqrt(1 - gamma^2) of it, and fresh noise takes it back from there (the gamma-sampling of Kim et al., 2024, written
    there for the variance-exploding process). 0 is the probability-flow ODE; with 1 every step lands at the clean
    latents, as consistency models sample. Where the model is exact, all of them have the marginals of the process.

    `next_timesteps` holds where the steps land beside `timesteps`, their beginnings; the pipeline gives the model
    both.

    Args:
        gamma (`float`, defaults to 0.0): share of a step's noise, as a standard deviation, that is fresh, in [0, 1].
        tangent_d, t_min, t_max, time_grid, timestep_cdf: as for every solver, see [`TangentScheduler`].

    Raises:
        ValueError: values outside of their ranges, or a learned grid without `timestep_cdf`.
    """

    @register_to_config
    def __init__(
        self,
        tangent_d: float = 3.0,
        gamma: float = 0.0,
        t_min: float = 0.0,
        t_max: float = 0.99,
        time_grid: str = "uniform",
        timestep_cdf: list[float] | None = None,
    ):
        super().__init__(gamma="[0, 1]")
        self.landing_times = torch.empty(0)

    @property
    def next_timesteps(self) -> torch.Tensor:
        """Where each step of the model lands, of the shape and on the device of `timesteps`."""
        return self.landing_times.to(self.timesteps)

    def solver_weights(self, grid: torch.Tensor) -> tuple[torch.Tensor, list[StepWeights]]:
        """DDIM to the landing time, and noise from there to the grid's: r = alpha' / alpha_landing takes the sample
        to the grid's signal level, and gamma sigma' is the noise that is missing then; none after the last step.

        Arguments as of [`TangentScheduler.solver_weights`].
        """
        d, gamma = self.config.tangent_d, self.config.gamma
        begins, ends = grid[:-1], grid[1:]
        kept = torch.tensor(1 - gamma**2, dtype=torch.float64)  # of the noise, as a variance over alpha^2
        self.landing_times = timesteps_from_log_snr(log_snr(ends, d) - torch.log(kept), d) if gamma else ends.clone()
        self.landing_times[-1] = ends[-1]
        sample, clean, _ = ddim_coefficients(begins, self.landing_times, d)
        alpha, sigma = alpha_sigma(ends, d)
        ratio = alpha / alpha_sigma(self.landing_times, d)[0]
        noise = gamma * sigma
        noise[-1] = 0
        return begins, step_weights(ratio * sample, ratio * clean, noise)
