"""Data whose best denoiser is known, so that a solver's error is its own: mixtures of Gaussians on the line.

At any noise level, x = alpha z + sigma eps is a mixture again, of components N(alpha m, alpha^2 s^2 + sigma^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldlm_hf import TangentScheduler
from ldlm_hf.schedulers.discrete import model_times


@dataclass(frozen=True)
class GaussianMixture:
    """z ~ sum_k w_k N(m_k, s_k^2), all float64.

    Attributes:
        weights: w, which sum to 1.
        means: m.
        stds: s, positive.
    """

    weights: tuple[float, ...] = (1.0,)
    means: tuple[float, ...] = (0.0,)
    stds: tuple[float, ...] = (1.0,)

    def components(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.distributions.MixtureSameFamily:
        """The distribution of x at a noise level."""
        means, stds = torch.tensor(self.means).double(), torch.tensor(self.stds).double()
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.tensor(self.weights).double()),
            torch.distributions.Normal(alpha * means, torch.sqrt((alpha * stds).square() + sigma.square())),
        )

    def denoise(self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """E[z | x] for each x, by the components' responsibilities."""
        mixture = self.components(alpha, sigma)
        means, stds = torch.tensor(self.means).double(), torch.tensor(self.stds).double()
        normal = mixture.component_distribution
        x = x[..., None]
        logits = mixture.mixture_distribution.logits + normal.log_prob(x)
        # of each component, m + alpha s^2 / (alpha^2 s^2 + sigma^2) (x - alpha m)
        expected = means + alpha * stds.square() / normal.variance * (x - normal.mean)
        return (logits.softmax(-1) * expected).sum(-1)

    def flow(self, quantiles: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Where the probability-flow ODE has taken its paths: on the line it keeps each one's quantile in (0, 1)."""
        mixture = self.components(alpha, sigma)
        spread = 12 * float(mixture.component_distribution.stddev.max())
        low = torch.full_like(quantiles, float(mixture.component_distribution.mean.min()) - spread)
        high = torch.full_like(quantiles, float(mixture.component_distribution.mean.max()) + spread)
        for _ in range(80):
            middle = (low + high) / 2
            is_below = mixture.cdf(middle) < quantiles
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return (low + high) / 2


def flow_error(scheduler: TangentScheduler, mixture: GaussianMixture, num_steps: int, num_paths: int = 63) -> float:
    """Root mean square distance of a deterministic solver's paths from those of the ODE at their end, in stds of z.

    The paths start where those of the ODE are at the first time of the grid, and are evenly spaced in probability.
    """
    scheduler.set_timesteps(num_steps)
    quantiles = torch.arange(1, num_paths + 1, dtype=torch.float64) / (num_paths + 1)
    times = model_times(scheduler)
    x = mixture.flow(quantiles, *scheduler.marginal(times[0].double()))
    for t in times:
        clean = mixture.denoise(x, *scheduler.marginal(t.double()))
        x = scheduler.step(clean, t, x, return_dict=False)[0]
    end = mixture.flow(quantiles, *scheduler.marginal(torch.tensor(scheduler.config.t_min, dtype=torch.float64)))
    return float((x - end).square().mean().sqrt())


def variance_error(scheduler: TangentScheduler, std: float, num_steps: int) -> float:
    """Relative error of the variance in which a solver ends for z ~ N(0, std^2), without drawing a number.

    The best denoiser is linear there, E[z | x] = g x, so sample, earlier prediction and earlier noise are a Gaussian
    vector whose covariance each step maps to the next one's.
    """
    scheduler.set_timesteps(num_steps)
    alpha, sigma = scheduler.marginal(scheduler.timesteps.double())
    gains = alpha * std**2 / ((alpha * std).square() + sigma.square())
    # of (x, previous x0, previous noise), at a first time that counts as pure noise
    covariance = torch.diag(
        torch.tensor([float((alpha[0] * std) ** 2 + sigma[0] ** 2), 0.0, 0.0], dtype=torch.float64)
    )
    for i, (weights, gain) in enumerate(zip(scheduler.step_weights, gains.tolist(), strict=True)):
        # before the first step there is no earlier prediction, and the present one takes its place
        previous_clean = weights.previous_clean if i else 0.0
        clean = weights.clean + weights.previous_clean - previous_clean
        transition = torch.tensor(
            [[weights.sample + clean * gain, previous_clean, weights.previous_noise], [gain, 0, 0], [0, 0, 0]],
            dtype=torch.float64,
        )
        drawn = torch.tensor([weights.noise, 0.0, 1.0], dtype=torch.float64)
        covariance = transition @ covariance @ transition.T + torch.outer(drawn, drawn)
    alpha, sigma = scheduler.marginal(torch.tensor(scheduler.config.t_min, dtype=torch.float64))
    expected = float((alpha * std) ** 2 + sigma**2)
    return abs(float(covariance[0, 0]) / expected - 1)


def observed_order(num_steps: list[int], errors: list[float]) -> float:
    """Minus the slope of log error over log number of steps, by least squares."""
    x, y = torch.tensor(num_steps).double().log(), torch.tensor(errors).double().log()
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / x.square().sum())
