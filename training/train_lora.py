"""Fine-tunes the denoiser of a pipeline by LoRA on a text of one's own, its autoencoder frozen.

    accelerate launch training/train_lora.py --config training/configs/lora_demo.yaml \
        components=RUN/pipeline data.source=my_texts.txt [lora.rank=8 lora.alpha=8 lora.target_modules=[to_qkv,to_out]]

It leaves `lora/pytorch_lora_weights.safetensors`, which `LDLMPipeline.load_lora_weights` loads, a card beside it, and
the held-out diffusion loss with and without the adapter, on this text and on the pipeline's (`base_data.source`).
"""

from __future__ import annotations

from ldlm_hf.training.launch import run
from ldlm_hf.training.recipes.lora import LoraRecipe


def main() -> None:
    run(LoraRecipe, __doc__)


if __name__ == "__main__":
    main()
