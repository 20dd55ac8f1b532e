"""Trains a token decoder of any depth on frozen components, and puts it into their pipeline (Section 4.1, App. B.2).

    accelerate launch training/train_token_decoder.py --config CONFIG.yaml components=RUN/pipeline [key=value ...]

It reads the reconstructed hidden states of the frozen latent decoder, or with `reads=latents` the latents themselves;
both from latents with decoder noise, as in joint training.
"""

from __future__ import annotations

from ldlm_hf.training.launch import run
from ldlm_hf.training.recipes.token_decoder import TokenDecoderRecipe


def main() -> None:
    run(TokenDecoderRecipe, __doc__)


if __name__ == "__main__":
    main()
