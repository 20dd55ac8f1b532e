"""Writes a run's pipeline in half precision: small enough to lie in a repository of code.

    python training/export_pipeline.py RUN/pipeline FOLDER [--dtype bfloat16] [--backbone HUB_ID] [--transformer_only]
        [--without_token_encoder]

Of the frozen token encoder, which prompts, gaps, `encode` and `edit` need, the statistics are written and the name of
its language model, which is loaded from where it was pretrained. `--without_token_encoder` writes nothing of it, for
one whose language model nobody else has. A distilled student differs from its teacher in
denoiser and scheduler alone: with `--transformer_only` these two are written, and take the place of the teacher's.
`python training/write_code.py FOLDER` brings the code that lies beside the weights up to date.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ldlm_hf import LDLMPipeline
from ldlm_hf.loading.repository import write_component_code


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def export_pipeline(
    source: str,
    folder: Path,
    dtype: torch.dtype,
    backbone: str | None = None,
    transformer_only: bool = False,
    without_token_encoder: bool = False,
) -> None:
    """Saves a pipeline without the weights of its token encoder's language model, or two parts of it.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: the language model is not that of `backbone`, or nobody else has it.
        OSError: the pipeline cannot be loaded.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder, or delete what it holds.")
    left_out = {"token_encoder": None} if transformer_only or without_token_encoder else {}
    pipeline = LDLMPipeline.from_pretrained(source, dtype=dtype, **left_out)
    if transformer_only:
        for name in ("transformer", "scheduler"):
            component = getattr(pipeline, name)
            component.save_pretrained(folder / name)
            write_component_code(type(component), folder, name)
    else:
        if pipeline.token_encoder is not None and pipeline.token_encoder.config.representation != "scratch":
            if backbone is None and pipeline.token_encoder.config.backbone_source is None:
                raise ValueError(
                    f"{source!r} does not say where its token encoder's language model comes from. Name it with "
                    "--backbone HUB_ID (or package:NAME/FOLDER), or leave it out with --without_token_encoder."
                )
            pipeline.token_encoder.leave_out_backbone(backbone)
        pipeline.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="PIPELINE", help="folder or Hub id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--backbone", help="Hub id or package:NAME/FOLDER of the language model, if not in its config")
    parser.add_argument("--transformer_only", action="store_true", help="write denoiser and scheduler only")
    parser.add_argument("--without_token_encoder", action="store_true", help="write nothing of the token encoder")
    options = parser.parse_args()
    export_pipeline(
        options.source,
        options.folder,
        DTYPES[options.dtype],
        options.backbone,
        options.transformer_only,
        options.without_token_encoder,
    )


if __name__ == "__main__":
    main()
