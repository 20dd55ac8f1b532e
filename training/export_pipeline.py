"""Writes what sampling needs of a run's pipeline, in half precision: small enough to lie in a repository of code.

    python training/export_pipeline.py RUN/pipeline FOLDER [--dtype bfloat16] [--transformer_only]

The frozen token encoder is left out, which prompts, gaps, `encode` and `edit` need. A distilled student differs from
its teacher in denoiser and scheduler alone: with `--transformer_only` these two are written, and take the place of the
teacher's.
`python training/write_code.py FOLDER` brings the code that lies beside the weights up to date.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ldlm_hf import LDLMPipeline
from ldlm_hf.loading.repository import write_component_code


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def export_pipeline(source: str, folder: Path, dtype: torch.dtype, transformer_only: bool) -> None:
    """Saves a pipeline without its token encoder, or two parts of it.

    Raises:
        FileExistsError: the folder holds something.
        OSError: the pipeline cannot be loaded.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder, or delete what it holds.")
    pipeline = LDLMPipeline.from_pretrained(source, token_encoder=None, dtype=dtype)
    if transformer_only:
        for name in ("transformer", "scheduler"):
            component = getattr(pipeline, name)
            component.save_pretrained(folder / name)
            write_component_code(type(component), folder, name)
    else:
        pipeline.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="PIPELINE", help="folder or Hub id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--transformer_only", action="store_true", help="write denoiser and scheduler only")
    options = parser.parse_args()
    export_pipeline(options.source, options.folder, DTYPES[options.dtype], options.transformer_only)


if __name__ == "__main__":
    main()
