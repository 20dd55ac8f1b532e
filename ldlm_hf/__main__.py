"""Writes texts in a terminal: `python -m ldlm_hf "The state of our union" --pipeline RUN/pipeline`.

A text longer than the model's appears block by block, as it is written.
"""

from __future__ import annotations

import argparse
import sys

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from .pipelines.pipeline_ldlm import LDLMPipeline


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldlm_hf", description="Writes texts.")
    parser.add_argument("prompt", nargs="?", help="what a text begins with; none by default")
    parser.add_argument("--pipeline", required=True, metavar="PATH_OR_ID", help="folder or Hub id of an LDLMPipeline")
    parser.add_argument("--suffix", help="what it ends with")
    parser.add_argument("--num_texts", type=int, default=1, help="how many texts (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, help="tokens that are written; by default one text's")
    parser.add_argument("--num_inference_steps", type=int, default=64, help="denoising steps (%(default)s)")
    parser.add_argument("--guidance_scale", type=float, help="weight of the prompt; the pipeline's own by default")
    parser.add_argument("--seed", type=int, help="of the noise; by default another one each time")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the pipeline runs (here: %(default)s)",
    )
    return parser.parse_args(arguments)


def write(options: argparse.Namespace) -> None:
    """Writes the texts to the standard output, an empty line between two of them."""
    # weights that are stored in half precision are read in it by accelerators alone
    dtype = torch.float32 if options.device == "cpu" else None
    pipeline = LDLMPipeline.from_pretrained(options.pipeline, dtype=dtype).to(options.device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    generator = torch.Generator(options.device)
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    sampling = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "generator": generator,
    }
    length = options.max_new_tokens
    writes_freely = options.suffix is None and pipeline.config.source_length is None
    if options.num_texts == 1 and writes_freely and length is not None:
        written = options.prompt or ""
        for block in pipeline.stream(options.prompt, max_new_tokens=length, **sampling):
            print(written + block.texts[0], end="", flush=True)
            written = ""
        print()
        return
    count = "batch_size" if options.prompt is None and options.suffix is None else "num_texts_per_prompt"
    counts = {count: options.num_texts}
    output = pipeline(options.prompt, suffix=options.suffix, max_new_tokens=length, **counts, **sampling)
    print("\n\n".join(output.texts))


def main() -> None:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    options = parse_arguments()
    try:
        write(options)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:  # torch's words for a device or seed
        raise SystemExit(f"python -m ldlm_hf: {error}") from error


if __name__ == "__main__":
    main()
