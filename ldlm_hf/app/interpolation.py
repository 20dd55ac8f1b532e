"""The tab that walks through the latent space between two texts."""

from __future__ import annotations

from typing import Any

import gradio as gr
import torch

from ..loading.checks import whole_number
from ..pipelines.pipeline_ldlm import LDLMPipeline
from .events import ONE_AT_A_TIME, check_text, errors_shown
from .marked_texts import fill_boxes, mark_changes, text_boxes


MAX_POINTS = 11

ABOUT = """
Both texts are mapped to latents, and points on the straight line between them are decoded to text. The first and the
last are the two texts as the model reconstructs them; **highlighted are the tokens that differ** from the text above.
"""


@torch.no_grad()
def interpolate_texts(pipeline: LDLMPipeline, first: str, second: str, num_points: int) -> torch.Tensor:
    """Token ids (num_points, L) of evenly spaced points on the line from the one text's latents to the other's.

    Raises:
        ValueError: a pipeline without encoders, an empty or over-long text, or fewer than two points.
    """
    number = whole_number(num_points)
    if number is None or number < 2:
        raise ValueError(f"`num_points` must be an integer of at least 2, got {num_points!r}.")
    ends = []
    for name, text in (("first text", first), ("second text", second)):
        check_text(name, text)
        try:
            ends.append(pipeline.encode(text))  # (1, N, d_z)
        except ValueError as error:
            raise ValueError(f"The {name} cannot be encoded: {error}") from error
    start, end = ends
    weights = torch.linspace(0, 1, number, device=start.device)[:, None, None]
    return pipeline.decode_to_sequences(torch.lerp(start, end, weights)).cpu()


def interpolation_tab(pipeline: LDLMPipeline) -> None:
    """Two texts, and the texts on the line between them."""

    def interpolate(first: str, second: str, num_points: int) -> list[Any]:
        with errors_shown():
            sequences = interpolate_texts(pipeline, first, second, num_points)
        labels = [f"{100 * point / (num_points - 1):.0f}% of the way" for point in range(len(sequences))]
        previous = torch.cat([sequences[:1], sequences[:-1]])
        texts = [mark_changes(pipeline, *pair) for pair in zip(sequences, previous, strict=True)]
        return fill_boxes(labels, texts, MAX_POINTS)

    gr.Markdown(ABOUT)
    length = pipeline.latent_encoder.config.sequence_length
    with gr.Row():
        first = gr.Textbox(label=f"First text, at most {length} tokens", lines=2, elem_id="first")
        second = gr.Textbox(label=f"Second text, at most {length} tokens", lines=2, elem_id="second")
    points = gr.Slider(2, MAX_POINTS, value=7, step=1, label="Points", elem_id="points")
    button = gr.Button("Interpolate", variant="primary", elem_id="interpolate")
    boxes = text_boxes(MAX_POINTS, "point")
    button.click(interpolate, [first, second, points], boxes, api_name="interpolate", **ONE_AT_A_TIME)
