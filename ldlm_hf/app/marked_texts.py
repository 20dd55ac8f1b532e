"""Texts of which some tokens are marked, and their places on the page."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import gradio as gr
import torch

from ..pipelines.pipeline_ldlm import LDLMPipeline


CHANGED = "changed"
GIVEN = "given"
COLORS = {CHANGED: "#ffd166", GIVEN: "#8ecae6"}

# gradio gives each piece a place of its own, with spaces between, and lets lines end within words: here it is one text
CSS = """
.gradio-container .marked .textfield { display: block; font-size: 0; }
.gradio-container .marked .token-container { display: inline; }
.gradio-container .marked .token { margin: 0; }
.gradio-container .marked .token.highlighted { padding: 14px 2px 4px; }
.gradio-container .marked .text { font-size: 14px; line-height: 28px; word-break: normal; overflow-wrap: anywhere; }
.gradio-container .marked .empty { min-height: 80px; }
"""

Pieces: TypeAlias = list[tuple[str, str | None]]


def mark_tokens(pipeline: LDLMPipeline, token_ids: list[int], marks: list[str | None], start: int = 0) -> Pieces:
    """Splits a text into pieces, each with the mark of its tokens, or None; as far as its end, looked for from `start`
    on, where the pipeline's texts have one.

    The pieces joined are exactly the text, without special tokens. A character of several tokens counts to the last.
    """
    tokenizer, token_ids = pipeline.tokenizer, pipeline.up_to_end(token_ids, start)
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    pieces: Pieces = []
    num_tokens = start = 0
    for mark, run in itertools.groupby(marks):
        num_tokens += len(list(run))
        # tokens have no text of their own (spaces, word pieces, bytes of one character): only prefixes are decoded
        prefix = tokenizer.decode(token_ids[:num_tokens], skip_special_tokens=True)
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prefix, text, strict=False))
        end = max(start, len(list(common)))
        if mark is None:  # spaces look odd at the start of a marked piece
            end += len(text[end:]) - len(text[end:].lstrip())
        if end > start:
            pieces.append((text[start:end], mark))
        start = end
    return pieces


def mark_changes(pipeline: LDLMPipeline, sequence: torch.Tensor, previous: torch.Tensor | None) -> Pieces:
    """Marks the tokens of a sequence (L,) that differ from those at the same place of the previous one (L,), or all
    where there was none.
    """
    changed = [True] * len(sequence) if previous is None else (sequence != previous).tolist()
    return mark_tokens(pipeline, sequence.tolist(), [CHANGED if is_changed else None for is_changed in changed])


def text_box(elem_id: str, **options: Any) -> gr.HighlightedText:
    """A place for a marked text."""
    return gr.HighlightedText(
        color_map=COLORS, show_inline_category=False, elem_id=elem_id, elem_classes="marked", **options
    )


def text_boxes(number: int, name: str) -> list[gr.HighlightedText]:
    """Places for texts, with the ids `name-0`, `name-1`, ...; only the first is visible before there are texts."""
    return [text_box(f"{name}-{index}", label=f"Text {index + 1}", visible=index == 0) for index in range(number)]


def fill_boxes(labels: list[str], texts: list[Pieces], num_boxes: int) -> list[Any]:
    """Shows each text with its label, and hides other boxes."""
    shown = [gr.update(value=text, label=label, visible=True) for label, text in zip(labels, texts, strict=True)]
    return shown + [gr.update(value=None, visible=False)] * (num_boxes - len(shown))
