"""The command line."""

from __future__ import annotations

import argparse

import torch

from ..pipelines.pipeline_ldlm import LDLMPipeline
from .marked_texts import CSS
from .page import THEME, build_app


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ldlm_hf.app", description="The page for a pipeline.")
    parser.add_argument("--pipeline", required=True, metavar="PATH_OR_ID", help="folder or Hub id of an LDLMPipeline")
    parser.add_argument("--port", type=int, help="port to serve on; by default the first free one from 7860")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the pipeline runs (here: %(default)s)",
    )
    arguments = parser.parse_args()
    # weights that are stored in half precision are read in it by accelerators alone
    dtype = torch.float32 if arguments.device == "cpu" else None
    pipeline = LDLMPipeline.from_pretrained(arguments.pipeline, dtype=dtype).to(arguments.device)
    build_app(pipeline).launch(server_port=arguments.port, theme=THEME, css=CSS)


if __name__ == "__main__":
    main()
