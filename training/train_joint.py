"""Trains a Latent Diffusion Language Model: encoder, denoiser and decoders together (Sections 4 and 5 of the paper).

accelerate launch training/train_joint.py --config training/configs/NAME.yaml [section.key=value ...]
"""

from __future__ import annotations

from ldlm_hf.training.launch import run
from ldlm_hf.training.recipes.joint import JointRecipe


def main() -> None:
    run(JointRecipe, __doc__)


if __name__ == "__main__":
    main()
