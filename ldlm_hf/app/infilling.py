"""The tab that fills the gaps of a text."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..pipelines.pipeline_ldlm import LDLMPipeline
from ..pipelines.prompts import rows_with_gaps
from .events import ONE_AT_A_TIME, errors_shown, seeded_generator
from .marked_texts import GIVEN, Pieces, mark_tokens, text_box


GAP = "___"

ABOUT = f"""
The model writes as many tokens as are asked for in the place of each gap, {GAP} (three underscores), and sees the
words on both sides of it. **Highlighted is what was given.**
"""


def fill_gaps(pipeline: LDLMPipeline, text: str, gap_tokens: int, **sampling: Any) -> Pieces:
    """The text with its gaps filled and what was given marked.

    Raises:
        ValueError: as of the pipeline's `infill`, with these and other arguments of it.
    """
    sequences, _ = pipeline.infill(text, gap=GAP, gap_tokens=gap_tokens, return_dict=False, **sampling)
    (row,) = rows_with_gaps(pipeline.prompt_tokenizer, [text], GAP, int(gap_tokens), pipeline.sequence_length)
    marks = [None if token is None else GIVEN for token in row]
    end_of_given = max((place + 1 for place, mark in enumerate(marks) if mark), default=0)
    return mark_tokens(pipeline, sequences[0].tolist(), marks, end_of_given)


def infilling_tab(pipeline: LDLMPipeline) -> None:
    """A text with gaps, and without."""

    def infill(text: str, gap_tokens: int, num_inference_steps: int, guidance_scale: float, seed: int) -> Pieces:
        with errors_shown():
            return fill_gaps(
                pipeline,
                text,
                gap_tokens,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=seeded_generator(seed),
            )

    length = pipeline.sequence_length
    gr.Markdown(ABOUT)
    text = gr.Textbox(
        label=f"Text with gaps, at most {length} tokens",
        placeholder=f"We {GAP} the people, and {GAP} shall be done.",
        lines=2,
        elem_id="gaps",
    )
    with gr.Row():
        tokens = gr.Slider(1, length, value=min(4, length), step=1, label="Tokens a gap")
        steps = gr.Slider(1, 1024, value=64, step=1, label="Steps")
        guidance = gr.Slider(0, 8, value=pipeline.config.guidance_scale or 1, step=0.5, label="Guidance weight")
        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
    button = gr.Button("Fill gaps", variant="primary", elem_id="infill")
    box = text_box("filled", label="Filled text")
    button.click(infill, [text, tokens, steps, guidance, seed], box, api_name="infill", **ONE_AT_A_TIME)
