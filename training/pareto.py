"""The frontier of quality and diversity: Gen. PPL against entropy over the number of steps (Fig. 1).

    python training/pareto.py RESULTS.json [MORE ...] --output FILE

writes FILE.png, with a curve for each pipeline of the results of `evaluate.py`.
"""

from __future__ import annotations

from figures.evaluation import plot_pareto
from figures.result_files import draw


if __name__ == "__main__":
    draw(__doc__.split("\n")[0], plot_pareto)
