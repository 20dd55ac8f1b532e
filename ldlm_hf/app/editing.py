"""The tab that rewrites a text, the more freely the greater the strength."""

from __future__ import annotations

from typing import Any

import gradio as gr
import torch

from ..pipelines.pipeline_ldlm import LDLMPipeline
from ..pipelines.prompts import tokenize
from .events import ONE_AT_A_TIME, check_text, errors_shown, seeded_generator
from .marked_texts import Pieces, mark_changes, text_box


ABOUT = """
Noise is put on the latents of a text, up to the time that is the strength, and from there they are denoised. The text
keeps its number of tokens; **highlighted are those that differ**.
"""


def edit_text(pipeline: LDLMPipeline, text: str, **arguments: Any) -> tuple[Pieces, Pieces]:
    """The text and the edited one, the tokens that differ marked in both.

    Raises:
        ValueError: no text, or as of the pipeline's `edit`, with these arguments.
    """
    check_text("text", text)
    sequences, _ = pipeline.edit(text, return_dict=False, **arguments)
    after = sequences[0].cpu()
    before = torch.tensor(tokenize(pipeline.prompt_tokenizer, text, "text"))
    return mark_changes(pipeline, before, after), mark_changes(pipeline, after, before)


def editing_tab(pipeline: LDLMPipeline) -> None:
    """A text, and the edited one beside it."""

    def edit(text: str, strength: float, num_inference_steps: int, seed: int) -> tuple[Pieces, Pieces]:
        with errors_shown():
            return edit_text(
                pipeline,
                text,
                strength=strength,
                num_inference_steps=num_inference_steps,
                generator=seeded_generator(seed),
            )

    gr.Markdown(ABOUT)
    length = pipeline.latent_encoder.config.sequence_length
    text = gr.Textbox(label=f"Text, at most {length} tokens", lines=2, elem_id="unedited")
    with gr.Row():
        strength = gr.Slider(0.05, 1, value=0.2, step=0.05, label="Strength")
        steps = gr.Slider(1, 1024, value=64, step=1, label="Steps of a whole generation")
        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
    button = gr.Button("Edit", variant="primary", elem_id="edit")
    with gr.Row():
        boxes = [text_box("original", label="Original"), text_box("edited", label="Edited")]
    button.click(edit, [text, strength, steps, seed], boxes, api_name="edit", **ONE_AT_A_TIME)
