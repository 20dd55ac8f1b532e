"""The order of each solver, measured where the truth is known: error against the number of model evaluations.

    python training/solver_convergence.py --output_dir FOLDER [--time_grid uniform|log_snr] [--steps 8 16 ...]

writes FOLDER/solver_convergence.png and .md. Deterministic solvers: distance of paths from those of the
probability-flow ODE of a mixture of two Gaussians. Stochastic ones: relative error of the variance of Gaussian data.
Both are exact up to float64, with the best denoiser in the model's place; nothing is drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from figures.solver_convergence import NAME, SOLVERS, errors, plot, report
from figures.style import save_figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--time_grid", choices=["uniform", "log_snr"], default="log_snr")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    options = parser.parse_args(arguments)
    if len(options.steps) < 2 or min(options.steps) < 2:
        parser.error("--steps needs two or more numbers of steps, each at least 2, the highest order here")
    num_steps = sorted(set(options.steps))
    measured = {solver: errors(solver, num_steps, time_grid=options.time_grid) for solver in SOLVERS}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    save_figure(plot(measured, num_steps), options.output_dir / NAME)
    steps = " ".join(map(str, num_steps))
    command = (
        f"python training/solver_convergence.py --output_dir FOLDER --time_grid {options.time_grid} --steps {steps}"
    )
    (options.output_dir / f"{NAME}.md").write_text(report(measured, num_steps, command), encoding="utf-8")
    print(options.output_dir / f"{NAME}.md")


if __name__ == "__main__":
    main()
