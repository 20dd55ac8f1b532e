"""Sampling with explicit noise reinjection on the tangent schedule."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config

from .scheduling_tangent import StepWeights, TangentScheduler, step_weights
from .scheduling_tangent_ddim import ddim_coefficients
from .tangent import alpha_sigma, log_snr, timesteps_from_log_snr


UPDATES = ("original", "noised")
# of a step's noise level sigma / alpha (Karras et al., 2022, Algorithm 2)
MAX_CHURN = math.sqrt(2) - 1


class TangentChurnScheduler(TangentScheduler):
    r"""
    DDIM with explicit noise reinjection on the tangent schedule: before each evaluation fresh noise takes the sample
    back to a higher noise level, where the model is evaluated. The noise process and the time grids are those of
    [`TangentScheduler`]. First order; a step costs one evaluation, as without churn.

    The noise level sigma / alpha grows by the factor 1 + min(churn / num_inference_steps, sqrt(2) - 1) (Karras et al.,
    2022, Algorithm 2, written there for the variance-exploding process). `timesteps` holds the times of the
    evaluations, after the noise was added.

    Args:
        churn (`float`, defaults to 10.0): how much noise is added, over all steps together; 0 is DDIM.
        churn_t_min (`float`, defaults to 0.05): no noise is added below this time.
        churn_t_max (`float`, defaults to 0.95): no noise is added above this time.
        noise_scale (`float`, defaults to 1.0): standard deviation of the added noise over what the higher level
            asks for; slightly more than 1 makes up for a model that removes too much.
        update (`str`, defaults to `"original"`):
            What the prediction then updates: `"original"`, the sample as it was before the noise, so that the noise
            perturbs the prediction only, or `"noised"`, the noised one (Karras et al., 2022). Either has the marginals
            of the process in the limit of many steps.
        tangent_d, t_min, t_max, time_grid, timestep_cdf: as for every solver, see [`TangentScheduler`].

    Raises:
        ValueError: values outside of their ranges, or a learned grid without `timestep_cdf`.
    """

    @register_to_config
    def __init__(
        self,
        tangent_d: float = 3.0,
        churn: float = 10.0,
        churn_t_min: float = 0.05,
        churn_t_max: float = 0.95,
        noise_scale: float = 1.0,
        update: str = "original",
        t_min: float = 0.05,
        t_max: float = 0.99,
        time_grid: str = "uniform",
        timestep_cdf: list[float] | None = None,
    ):
        super().__init__(
            churn="[0, inf)",
            churn_t_min="[0, 1)",
            churn_t_max=f"[{churn_t_min}, 1)",
            noise_scale="[0, inf)",
            update=UPDATES,
        )

    def raised_times(self, times: torch.Tensor) -> torch.Tensor:
        """Times of the noise levels that churn goes back to, from those of a grid but its last; the same outside of
        the window, and at the grid's beginning, since what sampling begins with is all noise.
        """
        config = self.config
        if config.churn == 0:
            return times
        factor = 1 + min(config.churn / len(times), MAX_CHURN)
        raised = timesteps_from_log_snr(log_snr(times, config.tangent_d) - 2 * math.log(factor), config.tangent_d)
        is_churned = (times >= config.churn_t_min) & (times <= config.churn_t_max)
        is_churned[0] = False
        return torch.where(is_churned, raised, times)

    def solver_weights(self, grid: torch.Tensor) -> tuple[torch.Tensor, list[StepWeights]]:
        """A step goes by DDIM to the next time of the grid, and from there back to the level of the next evaluation:
        x^ = r x + n eps with r = alpha^ / alpha and n^2 = sigma^^2 - r^2 sigma^2. Where the original is updated, the
        noise of the step before is taken back first: x = (x^ - n eps) / r.

        Arguments as of [`TangentScheduler.solver_weights`].
        """
        d, times = self.config.tangent_d, grid[:-1]
        evaluation_times = self.raised_times(times)
        alpha, sigma = alpha_sigma(times, d)
        raised_alpha, raised_sigma = alpha_sigma(evaluation_times, d)
        is_raised = evaluation_times > times
        ratios = torch.where(is_raised, raised_alpha / alpha, 1.0)
        noises = torch.sqrt((raised_sigma.square() - (ratios * sigma).square()).clamp(min=0)) * is_raised
        noises = noises * self.config.noise_scale
        # after the last step nothing is added
        next_ratios, next_noises = F.pad(ratios[1:], (0, 1), value=1.0), F.pad(noises[1:], (0, 1))
        updates_original = self.config.update == "original"
        sample, clean, zeros = ddim_coefficients(times if updates_original else evaluation_times, grid[1:], d)
        sample, previous_noise = next_ratios * sample, zeros
        if updates_original:
            sample = sample / ratios
            previous_noise = -sample * noises
        return evaluation_times, step_weights(sample, next_ratios * clean, next_noises, zeros, previous_noise)
