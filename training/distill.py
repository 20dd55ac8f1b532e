"""Distils a trained pipeline's denoiser into one of few steps, on its own latents (ldlm_hf/objective/flow_map.py).

    accelerate launch training/distill.py --config CONFIG.yaml components=RUN/pipeline [method=progressive] [key=value]

`method=flow_map` trains one student for any number of steps; `method=progressive` halves the steps of its teacher, so
that a chain of runs, each with the one before as its `components`, goes from many steps to few. Both leave a pipeline
with the frozen encoders and decoders of the teacher's, and a scheduler for the student.
"""

from __future__ import annotations

from ldlm_hf.training.launch import run
from ldlm_hf.training.recipes.distillation import DistillationRecipe


def main() -> None:
    run(DistillationRecipe, __doc__)


if __name__ == "__main__":
    main()
