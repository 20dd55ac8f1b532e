"""Scores over the number of evaluations of the denoiser (NFE), a curve a pipeline and sampler, real text as a line.

    python training/over_evaluations.py RESULTS.json [MORE ...] --output FILE

writes FILE.png from the results of `evaluate.py`.
"""

from __future__ import annotations

from figures.evaluation import plot_over_evaluations
from figures.result_files import draw


if __name__ == "__main__":
    draw(__doc__.split("\n")[0], plot_over_evaluations)
