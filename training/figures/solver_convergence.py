"""The order of each solver, measured where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from figures.analytic_denoisers import GaussianMixture, flow_error, observed_order, variance_error
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


MIXTURE = GaussianMixture(weights=(0.3, 0.7), means=(-1.0, 0.8), stds=(0.3, 0.2))
STD = 0.3
NAME = "solver_convergence"


@dataclass(frozen=True)
class Solver:
    """A solver, and what it claims.

    Attributes:
        name: for people.
        make: the scheduler, with further settings.
        order: power of 1 / steps that its error falls with.
        is_deterministic: whether it follows the ODE.
    """

    name: str
    make: Callable[..., TangentScheduler]
    order: int
    is_deterministic: bool


def _multistep(algorithm_type: str) -> Callable[..., TangentScheduler]:
    return lambda **settings: TangentDPMSolverMultistepScheduler(algorithm_type=algorithm_type, **settings)


SOLVERS = (
    Solver("DDIM", TangentDDIMScheduler, 1, True),
    Solver("DPM-Solver++ 2M", _multistep("dpmsolver++"), 2, True),
    Solver("Euler–Maruyama", TangentEulerMaruyamaScheduler, 1, False),
    Solver("ancestral (eta = 1)", lambda **settings: TangentDDIMScheduler(eta=1.0, **settings), 1, False),
    Solver("SDE-DPM-Solver++ 2M", _multistep("sde-dpmsolver++"), 2, False),
    Solver("churn, original updated", TangentChurnScheduler, 1, False),
    Solver("churn, noised updated", lambda **settings: TangentChurnScheduler(update="noised", **settings), 1, False),
)


def errors(solver: Solver, num_steps: Sequence[int], **settings: str) -> list[float]:
    """The solver's error for each number of steps, which is the number of evaluations."""
    scheduler = solver.make(**settings)
    if solver.is_deterministic:
        return [flow_error(scheduler, MIXTURE, steps) for steps in num_steps]
    return [variance_error(scheduler, STD, steps) for steps in num_steps]


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
    header = ["", "claimed", "measured order", *(f"{steps} NFE" for steps in num_steps)]
    lines = [
        [
            solver.name,
            str(solver.order),
            f"{observed_order(list(num_steps)[half:], found[half:]):.2f}",
            *(f"{e:.1e}" for e in found),
        ]
        for solver, found in measured.items()
    ]
    table = "\n".join(markdown_table(header, lines))
    sections = [
        "# Orders of the solvers on data with a known denoiser",
        f"Written by\n\n    {command}",
        table,
        f"Deterministic solvers: RMS distance, at t_min, of 63 paths from those of the probability-flow ODE of "
        f"{MIXTURE}. The others: relative error of the variance at t_min for data of standard deviation {STD:g}. The "
        f"order is the slope over the last {len(num_steps) - half} columns. Float64; no number depends on a seed or "
        "on the machine.",
        f"![errors]({NAME}.png)",
    ]
    return "\n\n".join(sections) + "\n"
