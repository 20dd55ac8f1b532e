"""DDIM and ancestral sampling on the tangent schedule: first order, the linear part exact."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from .scheduling_tangent import StepWeights, TangentScheduler, step_weights
from .tangent import alpha_sigma


def ddim_coefficients(
    times: torch.Tensor, next_times: torch.Tensor, d: float, eta: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Generalised DDIM from each time to the next (Song et al., 2021, Eq. 12 and 16, for a predicted clean sample).

        x' = alpha' x0 + sqrt(sigma'^2 - s^2) (x - alpha x0) / sigma + s eps
        s  = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)

    s is the standard deviation of the ancestral step, q(x' | x, x0), times eta. Were x0 right, every step would be
    exact, however long.

    Args:
        times (`torch.Tensor` of any shape): where the steps begin, in (0, 1].
        next_times (`torch.Tensor` of the same shape): where they end, earlier.
        d: of the schedule.
        eta: 0 for the probability-flow ODE, 1 for ancestral sampling.

    Returns:
        Weights of x, x0 and eps, float64, of that shape.
    """
    (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma(times, d), alpha_sigma(next_times, d)
    noise = eta * next_sigma * torch.sqrt((1 - (alpha * next_sigma / (next_alpha * sigma)).square()).clamp(min=0))
    sample = torch.sqrt(next_sigma.square() - noise.square()) / sigma
    return sample, next_alpha - alpha * sample, noise


class TangentDDIMScheduler(TangentScheduler):
    r"""
    DDIM (`eta=0`, the probability-flow ODE), ancestral sampling (`eta=1`, the reverse SDE), and what lies between, on
    the tangent schedule; the noise process and the time grids are those of [`TangentScheduler`]. First order; exact
    for any grid where the model's prediction does not change (Song et al., 2021).

    Args:
        eta (`float`, defaults to 0.0): share of the ancestral step's noise that a step adds, in [0, 1].
        fresh_noise_t_min (`float`, defaults to 0.0): see `fresh_noise_t_max`.
        fresh_noise_t_max (`float`, defaults to 0.0):
            Steps that begin at times in [`fresh_noise_t_min`, `fresh_noise_t_max`] keep nothing of their sample: they
            go to alpha' x0 + sigma' eps ("q-sampling", arXiv 2604.02028). By default there are none.
        tangent_d, t_min, t_max, time_grid, timestep_cdf: as for every solver, see [`TangentScheduler`].

    Raises:
        ValueError: values outside of their ranges, or a learned grid without `timestep_cdf`.
    """

    @register_to_config
    def __init__(
        self,
        tangent_d: float = 3.0,
        eta: float = 0.0,
        fresh_noise_t_min: float = 0.0,
        fresh_noise_t_max: float = 0.0,
        t_min: float = 0.05,
        t_max: float = 0.99,
        time_grid: str = "uniform",
        timestep_cdf: list[float] | None = None,
    ):
        super().__init__(eta="[0, 1]", fresh_noise_t_min="[0, 1]", fresh_noise_t_max=f"[{fresh_noise_t_min}, 1]")

    def solver_weights(self, grid: torch.Tensor) -> tuple[torch.Tensor, list[StepWeights]]:
        """[`ddim_coefficients`], and fresh noise where it is asked for; arguments as of
        [`TangentScheduler.solver_weights`].
        """
        config = self.config
        begins, ends = grid[:-1], grid[1:]
        sample, clean, noise = ddim_coefficients(begins, ends, config.tangent_d, config.eta)
        alpha, sigma = alpha_sigma(ends, config.tangent_d)
        is_fresh = (begins >= config.fresh_noise_t_min) & (begins <= config.fresh_noise_t_max)
        return begins, step_weights(
            sample.masked_fill(is_fresh, 0.0), torch.where(is_fresh, alpha, clean), torch.where(is_fresh, sigma, noise)
        )
