"""Writes what sampling needs of a run's pipeline, in half precision: small enough to lie in a repository of code.

    python training/export_pipeline.py RUN/pipeline FOLDER [--dtype bfloat16] [--transformer_only]
        [--sampler NAME[:key=value,...]]

The frozen token encoder is left out, which only `encode` needs, and so is the generated code, which
`python -m ldlm_hf.hub.publish FOLDER OWNER/NAME` writes again. A distilled student differs from its teacher in
denoiser and scheduler alone: with `--transformer_only` these two are written, and take the place of the teacher's.
Training leaves a pipeline the paper's scheduler; `--sampler` gives it another one, which it then samples with by
itself (docs/few_steps.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ldlm_hf import LDLMPipeline
from ldlm_hf.hub.repository import edit_json
from samplers import OWN, Sampler


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def export_pipeline(source: str, folder: Path, dtype: torch.dtype, transformer_only: bool, sampler: Sampler) -> None:
    """Saves a pipeline with the scheduler of a sampler and without its token encoder, or two parts of it.

    Raises:
        FileExistsError: the folder holds something.
        OSError: the pipeline cannot be loaded.
        ValueError: settings that the scheduler refuses, or arguments of the pipeline's call, which no pipeline keeps.
    """
    if sampler.arguments:
        names = ", ".join(name for name, _ in sampler.arguments)
        raise ValueError(f"--sampler {sampler.text!r}: {names} is said in the pipeline's call, and is not saved.")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder, or delete what it holds.")
    pipeline = LDLMPipeline.from_pretrained(source, token_encoder=None, torch_dtype=dtype)
    sampler.apply(pipeline)
    if transformer_only:
        pipeline.transformer.save_pretrained(folder / "transformer")
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        # where it was loaded from, on this machine
        edit_json(
            folder / "transformer" / pipeline.transformer.config_name, lambda config: config.pop("_name_or_path", None)
        )
        return
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.py"):
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="PIPELINE", help="folder or Hub id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--transformer_only", action="store_true", help="write denoiser and scheduler only")
    parser.add_argument(
        "--sampler",
        default=OWN,
        metavar="NAME[:key=value,...]",
        help="its scheduler, as evaluate.py's --samplers name it; by default the one that it has",
    )
    options = parser.parse_args()
    export_pipeline(
        options.source,
        options.folder,
        DTYPES[options.dtype],
        options.transformer_only,
        Sampler.parse(options.sampler),
    )


if __name__ == "__main__":
    main()
