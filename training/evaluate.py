"""Evaluates pipelines: samples of several seeds and numbers of steps, scored beside real text.

    python training/evaluate.py --pipeline RUN/pipeline [OTHER ...] --config training/configs/NAME.yaml \
        --output_dir FOLDER --num_samples 1000 --seeds 5 --steps 8 16 32 64 128 256 512 1024 \
        [--judge JUDGE|none] [--controls] [--interpolation] [data.key=value ...]

on several GPUs with `accelerate launch` instead of `python`; `pipeline_evaluation.py` says what it does and writes.

Python looks for modules beside the script that it runs first, so for all scripts of this folder this file hides the
package `evaluate`, which the metrics are built on. Imported by that name, it steps aside for the package.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def load_hidden_package() -> None:
    """Puts the installed package `evaluate` in this file's place.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    folder = Path(__file__).resolve().parent
    spec = PathFinder.find_spec("evaluate", [path for path in sys.path if Path(path).resolve() != folder])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("The metrics need the package evaluate: pip install evaluate.", name="evaluate")
    package = module_from_spec(spec)
    sys.modules["evaluate"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    from pipeline_evaluation import main

    main()
else:
    load_hidden_package()
