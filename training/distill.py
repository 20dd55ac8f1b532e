"""Distils a trained pipeline's denoiser into one of few steps, on its own latents (ldlm_hf/objective/flow_map.py).

accelerate launch training/distill.py --config CONFIG.yaml components=RUN/pipeline [method=progressive] [key=value]
"""

from __future__ import annotations

from ldlm_hf.training.launch import run
from ldlm_hf.training.recipes.distillation import DistillationRecipe


def main() -> None:
    run(DistillationRecipe, __doc__)


if __name__ == "__main__":
    main()
