"""Trains a method that LDLM is compared with, on the same text and by the same loop.

    accelerate launch training/train_baseline.py METHOD --config training/configs/METHOD_demo.yaml [key=value ...]

Methods: `autoregressive`, `mdlm`, `duo`, `duo_dcd`, `candi`, `flm`, `fmlm`. Each is described in its file of
`ldlm_hf/baselines/`; what comes out is its pipeline.
"""

from __future__ import annotations

import sys

from ldlm_hf.baselines.recipes import RECIPES
from ldlm_hf.training.launch import parse_arguments, run


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        parse_arguments(__doc__)
    if len(sys.argv) < 2 or sys.argv[1] not in RECIPES:
        raise SystemExit(f"train_baseline.py: name the method first, one of {', '.join(RECIPES)}.")
    run(RECIPES[sys.argv.pop(1)], __doc__)


if __name__ == "__main__":
    main()
