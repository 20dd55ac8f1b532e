"""The page: a tab for each thing that a pipeline does."""

from __future__ import annotations

import gradio as gr

from ..pipelines.pipeline_ldlm import LDLMPipeline
from .continuation import continuation_tab
from .editing import editing_tab
from .generation import generation_tab
from .infilling import infilling_tab
from .interpolation import interpolation_tab


THEME = gr.themes.Default(font=["Arial", "sans-serif"])  # fonts that every system has: none is fetched


def check_generation(pipeline: LDLMPipeline) -> None:
    """Raises ValueError for a pipeline that cannot write, or only for sources."""
    pipeline.require_components("this tab", "transformer", "scheduler", "token_decoder", "tokenizer")
    pipeline.check_writes_freely("This tab")


def check_prompts(pipeline: LDLMPipeline) -> None:
    """Raises ValueError for a pipeline that cannot be given a part of a text."""
    check_generation(pipeline)
    pipeline.check_takes_prompts()


def check_encoders(pipeline: LDLMPipeline) -> None:
    """Raises ValueError for a pipeline that cannot map texts to latents and back."""
    pipeline.require_components("this tab", "tokenizer", "token_encoder", "latent_encoder", "token_decoder")


def check_editing(pipeline: LDLMPipeline) -> None:
    """Raises ValueError for a pipeline that cannot do both."""
    check_generation(pipeline)
    check_encoders(pipeline)


# name: what the pipeline has to be able to do, and what is in the tab
TABS = {
    "Generate": (check_generation, generation_tab),
    "Continue": (check_prompts, continuation_tab),
    "Infill": (check_prompts, infilling_tab),
    "Edit": (check_editing, editing_tab),
    "Interpolate": (check_encoders, interpolation_tab),
}


def build_app(pipeline: LDLMPipeline) -> gr.Blocks:
    """The page for a pipeline, to be launched with `build_app(pipeline).launch(theme=THEME, css=CSS)`.

    A tab that the pipeline cannot serve says why, and what to do. Visitors wait for each other.
    """
    with gr.Blocks(title="Latent Diffusion Language Model", analytics_enabled=False) as app:
        gr.Markdown("# Latent Diffusion Language Model")
        for name, (check, build_tab) in TABS.items():
            with gr.Tab(name):
                try:
                    check(pipeline)
                except ValueError as error:
                    gr.Markdown(f"**{name} is off:** {error}")
                else:
                    build_tab(pipeline)
    return app
