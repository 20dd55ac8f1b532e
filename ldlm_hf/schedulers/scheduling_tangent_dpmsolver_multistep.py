"""DPM-Solver++ 2M and SDE-DPM-Solver++ 2M on the tangent schedule: second order at one evaluation a step."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from .scheduling_tangent import StepWeights, TangentScheduler
from .tangent import alpha_sigma, log_snr


ALGORITHM_TYPES = ("dpmsolver++", "sde-dpmsolver++")


class TangentDPMSolverMultistepScheduler(TangentScheduler):
    r"""
    DPM-Solver++ 2M, and its SDE form, in half the log-SNR lambda = log(alpha / sigma), on the tangent schedule (Lu et
    al., 2022, Algorithm 2 and Section 5); the noise process and the time grids are those of [`TangentScheduler`]. The
    last two predictions of the clean latents are extrapolated to the middle of the step; the linear part is exact.

    The first step is of first order, since there is no earlier prediction, and so is the one after a step from t = 1,
    where lambda is -inf; with `lower_order_final` the last one, too.

    Args:
        algorithm_type (`str`, defaults to `"dpmsolver++"`):
            `"dpmsolver++"`, the probability-flow ODE, or `"sde-dpmsolver++"`, the reverse SDE.
        solver_order (`int`, defaults to 2): 2, or 1, which is DDIM or ancestral sampling.
        lower_order_final (`bool`, defaults to `True`): take the last step at first order, which is steadier for few
            steps.
        tangent_d, t_min, t_max, time_grid, timestep_cdf: as for every solver, see [`TangentScheduler`].

    Raises:
        ValueError: values outside of their ranges, or a learned grid without `timestep_cdf`.
    """

    @register_to_config
    def __init__(
        self,
        tangent_d: float = 3.0,
        algorithm_type: str = "dpmsolver++",
        solver_order: int = 2,
        lower_order_final: bool = True,
        t_min: float = 0.05,
        t_max: float = 0.99,
        time_grid: str = "uniform",
        timestep_cdf: list[float] | None = None,
    ):
        super().__init__(algorithm_type=ALGORITHM_TYPES, solver_order=(1, 2))

    def solver_weights(self, grid: torch.Tensor) -> tuple[torch.Tensor, list[StepWeights]]:
        """With h = lambda' - lambda, h_ = that of the step before, and D = x0 + h / (2 h_) (x0 - x0_):

            ODE  x' = sigma'/sigma x + alpha' (1 - e^-h) D
            SDE  x' = sigma'/sigma e^-h x + alpha' (1 - e^-2h) D + sigma' sqrt(1 - e^-2h) eps

        Arguments as of [`TangentScheduler.solver_weights`].
        """
        config, num_steps = self.config, len(grid) - 1
        if num_steps < config.solver_order:
            raise ValueError(
                f"num_inference_steps={num_steps} is below solver_order={config.solver_order}, which needs as many "
                "evaluations at least; take more steps or solver_order=1."
            )
        alpha, sigma = alpha_sigma(grid, config.tangent_d)
        half_log_snr = log_snr(grid, config.tangent_d) / 2
        weights = []
        for i in range(num_steps):
            # e^-h, which is 0 in a step from pure noise or to no noise at all, as h is infinite there
            decay = float(alpha[i] * sigma[i + 1] / (sigma[i] * alpha[i + 1]))
            if config.algorithm_type == "dpmsolver++":
                sample, noise = float(sigma[i + 1] / sigma[i]), 0.0
                clean = float(alpha[i + 1]) * (1 - decay)
            else:
                sample, noise = float(sigma[i + 1] / sigma[i]) * decay, float(sigma[i + 1]) * (1 - decay**2) ** 0.5
                clean = float(alpha[i + 1]) * (1 - decay**2)
            extrapolation = 0.0
            is_first_order = config.solver_order == 1 or i == 0 or (i == num_steps - 1 and config.lower_order_final)
            if not is_first_order:
                step, previous_step = half_log_snr[i : i + 2].diff(), half_log_snr[i - 1 : i + 1].diff()
                # 0 after an infinite step; an infinite step itself, to no noise at all, is never extrapolated
                extrapolation = float(step / (2 * previous_step)) if torch.isfinite(step) else 0.0
            weights.append(
                StepWeights(sample, clean * (1 + extrapolation), noise, previous_clean=-clean * extrapolation)
            )
        return grid[:-1], weights
