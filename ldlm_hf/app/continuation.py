"""The tab that continues a prompt, and writes up to a suffix if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..pipelines.pipeline_ldlm import LDLMPipeline
from .events import ONE_AT_A_TIME, errors_shown, seeded_generator
from .marked_texts import GIVEN, Pieces, fill_boxes, mark_tokens, text_boxes


MAX_TEXTS = 8
MAX_LENGTHS = 16  # that a text may be longer than the model's

ABOUT = """
The model writes what follows the prompt, and with a suffix what stands between the two; **highlighted is what was
given**. A text longer than the model's {length} tokens is written block by block, each with the end of the text before
as its prompt; one with a suffix cannot be.
"""


def continue_prompt(
    pipeline: LDLMPipeline,
    prompt: str,
    suffix: str,
    num_texts: int,
    max_new_tokens: int,
    **sampling: Any,
) -> Iterator[list[Pieces]]:
    """Yields the texts with what was given marked, as far as they are written: one block more each time.

    Raises:
        ValueError: as of the pipeline's call, with these and other arguments of it.
    """
    prompts, suffixes = pipeline.tokenize_prompts(prompt, suffix or None, 1, num_texts)
    num_given, num_last = len(prompts[0]), len(suffixes[0])

    def marked(rows: list[list[int]]) -> list[Pieces]:
        num_written = len(rows[0]) - num_given - num_last
        marks = [GIVEN] * num_given + [None] * num_written + [GIVEN] * num_last
        start = len(marks) if num_last else num_given
        return [mark_tokens(pipeline, row, marks, start) for row in rows]

    arguments = {"num_texts_per_prompt": num_texts, "max_new_tokens": max_new_tokens, **sampling}
    if suffix:
        yield marked(pipeline(prompt, suffix=suffix, **arguments).sequences.tolist())
        return
    rows = prompts
    for block in pipeline.stream(prompt, **arguments):
        rows = [row + new for row, new in zip(rows, block["sequences"].tolist(), strict=True)]
        yield marked(rows)


def continuation_tab(pipeline: LDLMPipeline) -> None:
    """Prompt, suffix, and the texts that they are a part of."""

    def continue_(
        prompt: str,
        suffix: str,
        num_texts: int,
        max_new_tokens: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
    ) -> Iterator[list[Any]]:
        with errors_shown():
            for texts in continue_prompt(
                pipeline,
                prompt,
                suffix,
                num_texts,
                max_new_tokens,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=seeded_generator(seed),
            ):
                yield fill_boxes([f"Text {number}" for number in range(1, len(texts) + 1)], texts, MAX_TEXTS)

    length = pipeline.sequence_length
    gr.Markdown(ABOUT.format(length=length))
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
        suffix = gr.Textbox(label="Suffix (optional)", lines=2, elem_id="suffix")
    with gr.Row():
        texts = gr.Slider(1, MAX_TEXTS, value=2, step=1, label="Texts")
        tokens = gr.Slider(
            1, MAX_LENGTHS * length, value=length // 2, step=1, label="New tokens", elem_id="new-tokens"
        )
        steps = gr.Slider(1, 1024, value=64, step=1, label="Steps")
        guidance = gr.Slider(0, 8, value=pipeline.config.guidance_scale or 1, step=0.5, label="Guidance weight")
        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
    with gr.Row():
        start_button = gr.Button("Continue", variant="primary", elem_id="continue")
        stop_button = gr.Button("Stop")
    boxes = text_boxes(MAX_TEXTS, "continued")
    writing = start_button.click(
        continue_,
        [prompt, suffix, texts, tokens, steps, guidance, seed],
        boxes,
        api_name="continue",
        **ONE_AT_A_TIME,
    )
    stop_button.click(None, cancels=[writing])
