"""The order of each solver, measured where the best denoiser is known, so that a solver's error is its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from matplotlib.figure import Figure

from figures.style import run_style
from ldlm_hf import (
    TangentChurnScheduler,
    TangentDDIMScheduler,
    TangentDPMSolverMultistepScheduler,
    TangentEulerMaruyamaScheduler,
    TangentScheduler,
)
from ldlm_hf.evaluation.markdown import markdown_table
from ldlm_hf.hub.training_curves import WIDTH


NAME = "solver_convergence"
STD = 0.3
NUM_PATHS = 63


# 1. Data whose best denoiser is known


@dataclass(frozen=True)
class GaussianMixture:
    """z ~ sum_k w_k N(m_k, s_k^2) on the line, all float64; the weights w sum to 1.

    At any noise level, x = alpha z + sigma eps is a mixture again, of components N(alpha m, alpha^2 s^2 + sigma^2).
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

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


MIXTURE = GaussianMixture(weights=(0.3, 0.7), means=(-1.0, 0.8), stds=(0.3, 0.2))


# 2. Errors of solvers


def flow_error(scheduler: TangentScheduler, mixture: GaussianMixture, num_steps: int) -> float:
    """Root mean square distance of a deterministic solver's paths from those of the ODE at their end, in stds of z.

    The paths start where those of the ODE are at the first time of the grid, and are evenly spaced in probability.
    """
    scheduler.set_timesteps(num_steps)
    quantiles = torch.arange(1, NUM_PATHS + 1, dtype=torch.float64) / (NUM_PATHS + 1)
    x = mixture.flow(quantiles, *scheduler.marginal(scheduler.timesteps[0].double()))
    for t in scheduler.timesteps:
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
    covariance = torch.zeros(3, 3, dtype=torch.float64)
    covariance[0, 0] = (alpha[0] * std) ** 2 + sigma[0] ** 2
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


def observed_order(num_steps: Sequence[int], errors: Sequence[float]) -> float:
    """Minus the slope of log error over log number of steps, by least squares."""
    return -float(numpy.polyfit(numpy.log(num_steps), numpy.log(errors), 1)[0])


@dataclass(frozen=True)
class Solver:
    """A solver, and what it claims.

    Attributes:
        make: the scheduler, with further settings.
        order: power of 1 / steps that its error falls with.
        is_deterministic: whether it follows the ODE.
    """

    name: str
    make: Callable[..., TangentScheduler]
    order: int
    is_deterministic: bool


SDE_MULTISTEP = partial(TangentDPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++")
SOLVERS = (
    Solver("DDIM", TangentDDIMScheduler, 1, True),
    Solver("DPM-Solver++ 2M", TangentDPMSolverMultistepScheduler, 2, True),
    Solver("Euler–Maruyama", TangentEulerMaruyamaScheduler, 1, False),
    Solver("ancestral (eta = 1)", partial(TangentDDIMScheduler, eta=1.0), 1, False),
    Solver("SDE-DPM-Solver++ 2M", SDE_MULTISTEP, 2, False),
    Solver("churn, original updated", TangentChurnScheduler, 1, False),
    Solver("churn, noised updated", partial(TangentChurnScheduler, update="noised"), 1, False),
)


def errors(solver: Solver, num_steps: Sequence[int], **settings: str) -> list[float]:
    """The solver's error for each number of steps, which is the number of evaluations."""
    scheduler = solver.make(**settings)
    if solver.is_deterministic:
        return [flow_error(scheduler, MIXTURE, steps) for steps in num_steps]
    return [variance_error(scheduler, STD, steps) for steps in num_steps]


# 3. Figure and page


def plot(measured: dict[Solver, list[float]], num_steps: Sequence[int]) -> Figure:
    """Error over evaluations, of deterministic solvers (left) and of stochastic ones, with slopes 1 and 2."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("ODE: RMS distance of paths", "SDE: relative error of the variance")
    for axes, is_deterministic, title in zip(panels, (True, False), titles, strict=True):
        shown = {solver: found for solver, found in measured.items() if solver.is_deterministic == is_deterministic}
        for solver, found in shown.items():
            place = list(measured).index(solver)
            axes.plot(num_steps, found, label=solver.name, markersize=4, **run_style(place))
        top = max(found[0] for found in shown.values())
        for order in (1, 2):
            slope = [top * (steps / num_steps[0]) ** -order for steps in num_steps]
            axes.plot(num_steps, slope, color="0.6", linewidth=0.8, linestyle=":")
            axes.annotate(f"order {order}", (num_steps[-1], slope[-1]), color="0.4", fontsize=8, ha="right")
        axes.set(title=title, xlabel="evaluations of the model (NFE)", xscale="log", yscale="log")
        axes.set_xticks(num_steps, [str(steps) for steps in num_steps], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=8)
    return figure


def report(measured: dict[Solver, list[float]], num_steps: Sequence[int], command: str) -> str:
    """The errors and the orders as a page."""
    half = len(num_steps) // 2
    columns = ["", "claimed", "measured order", *(f"{steps} NFE" for steps in num_steps)]
    rows = [
        [
            solver.name,
            str(solver.order),
            f"{observed_order(num_steps[half:], found[half:]):.2f}",
            *(f"{e:.1e}" for e in found),
        ]
        for solver, found in measured.items()
    ]
    table = "\n".join(markdown_table(columns, rows))
    sections = [
        "# Orders of the solvers on data with a known denoiser",
        f"Written by\n\n    {command}",
        table,
        f"Deterministic solvers: RMS distance, at t_min, of {NUM_PATHS} paths from those of the probability-flow "
        f"ODE of {MIXTURE}. The others: relative error of the variance at t_min for data of standard deviation "
        f"{STD:g}. The order is the slope over the last {len(num_steps) - half} columns. Float64; no number depends "
        "on a seed or on the machine.",
        f"![errors]({NAME}.png)",
    ]
    return "\n\n".join(sections) + "\n"
