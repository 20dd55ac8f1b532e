"""Smoothness of latent spaces: Gen. PPL along lines between the latents of real texts (Fig. 3, left).

    python training/smoothness.py RESULTS.json [MORE ...] --output FILE

writes FILE.png, with a curve for each pipeline that `evaluate.py --interpolation` has evaluated.
"""

from __future__ import annotations

from figures.evaluation import plot_smoothness
from figures.result_files import draw


if __name__ == "__main__":
    draw(__doc__.split("\n")[0], plot_smoothness)
