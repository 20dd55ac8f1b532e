"""Continuing, infilling and editing: texts are the pipeline's, and what was given or differs is marked."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import gradio as gr
import gradio_client
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ldlm_hf import LDLMPipeline
from ldlm_hf.app import build_app
from ldlm_hf.app.continuation import continue_prompt
from ldlm_hf.app.editing import edit_text
from ldlm_hf.app.infilling import fill_gaps
from ldlm_hf.app.marked_texts import CHANGED, GIVEN, Pieces


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def joined(pieces: Pieces) -> str:
    return "".join(text for text, _ in pieces)


def marked(pieces: Pieces) -> list[str]:
    return [text for text, mark in pieces if mark is not None]


@pytest.mark.parametrize(
    ("prompt", "suffix", "max_new_tokens", "given"),
    [
        ("w5 w6", "", 4, ["w5 w6"]),
        ("w5 w6", "w7 w8", 3, ["w5 w6", "w7 w8"]),
        ("", "w7", 3, ["w7"]),
        ("w5 w6", "", 20, ["w5 w6"]),
        ("", "", 3, []),
    ],
)
def test_continued_texts_are_those_of_the_pipeline(
    make_conditional_pipeline: Callable[[], LDLMPipeline],
    prompt: str,
    suffix: str,
    max_new_tokens: int,
    given: list[str],
):
    pipeline = make_conditional_pipeline()
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0}
    *_, texts = continue_prompt(pipeline, prompt, suffix, 2, max_new_tokens, generator=seeded(), **arguments)
    expected = pipeline(
        prompt,
        suffix=suffix,
        num_texts_per_prompt=2,
        max_new_tokens=max_new_tokens,
        generator=seeded(),
        **arguments,
    )
    assert [joined(text) for text in texts] == expected.texts
    assert [marked(text) for text in texts] == [given] * 2
    assert {mark for text in texts for _, mark in text} <= {GIVEN, None}


def test_a_long_text_grows_block_by_block(make_conditional_pipeline: Callable[[], LDLMPipeline]):
    blocks = list(
        continue_prompt(make_conditional_pipeline(), "w5 w6", "", 1, 20, num_inference_steps=2, generator=seeded())
    )
    texts = [joined(text) for (text,) in blocks]
    assert len(texts) == 5  # 6 tokens after the prompt, then 4 after the 4 of a context
    assert all(len(after) > len(before) and after.startswith(before) for before, after in itertools.pairwise(texts))
    assert all(marked(text) == ["w5 w6"] for (text,) in blocks)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("w5 ___ w6 w7", ["w5", "w6 w7"]),
        ("___ w5 ___", ["w5"]),
        ("w5 ___ ___", ["w5"]),
        ("___", []),
    ],
)
def test_filled_texts_are_those_of_the_pipeline(
    make_conditional_pipeline: Callable[[], LDLMPipeline], text: str, given: list[str]
):
    pipeline = make_conditional_pipeline()
    arguments = {"gap_tokens": 2, "num_inference_steps": 3, "guidance_scale": 2.0}
    pieces = fill_gaps(pipeline, text, generator=seeded(), **arguments)
    assert joined(pieces) == pipeline.infill(text, generator=seeded(), **arguments).texts[0]
    assert marked(pieces) == given


@pytest.mark.parametrize("strength", [0.1, 0.9])
def test_edited_tokens_that_differ_are_marked_in_both_texts(
    make_pipeline: Callable[..., LDLMPipeline], strength: float
):
    pipeline = make_pipeline()
    text, arguments = "w5 w11 w7 w8 w15", {"strength": strength, "num_inference_steps": 32}
    original, edited = edit_text(pipeline, text, generator=seeded(), **arguments)
    output = pipeline.edit(text, generator=seeded(), **arguments)
    assert joined(original) == text
    assert joined(edited) == output.texts[0]
    words = output.texts[0].split()
    assert len(words) == 5
    differing = [pair for pair in zip(text.split(), words, strict=True) if pair[0] != pair[1]]
    assert 0 < len(differing) < 5
    assert " ".join(marked(original)).split() == [before for before, _ in differing]
    assert " ".join(marked(edited)).split() == [after for _, after in differing]
    assert {mark for _, mark in original + edited} <= {CHANGED, None}


def test_the_endpoints_stream_and_say_what_is_wrong(
    make_conditional_pipeline: Callable[[], LDLMPipeline], launch: Callable[[LDLMPipeline], str]
):
    pipeline = make_conditional_pipeline()
    client = gradio_client.Client(launch(pipeline), verbose=False)

    job = client.submit("w5 w6", "", 2, 20, 3, 2.0, 3, api_name="/continue")
    boxes = [box for box in job.result(timeout=60) if box["visible"]]
    expected = pipeline(
        "w5 w6",
        num_texts_per_prompt=2,
        max_new_tokens=20,
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=seeded(),
    )
    assert ["".join(piece["token"] for piece in box["value"]) for box in boxes] == expected.texts
    assert [box["value"][0] for box in boxes] == [{"token": "w5 w6", "class_or_confidence": GIVEN}] * 2
    assert len(job.outputs()) > 1

    pieces = client.predict("w5 ___ w6", 2, 3, 1.0, 3, api_name="/infill")
    assert [piece["token"] for piece in pieces if piece["class_or_confidence"] == GIVEN] == ["w5", "w6"]
    original, edited = client.predict("w5 w6 w7", 0.5, 8, 3, api_name="/edit")
    assert "".join(piece["token"] for piece in original) == "w5 w6 w7"
    texts = pipeline.edit("w5 w6 w7", strength=0.5, num_inference_steps=8, generator=seeded()).texts
    assert ["".join(piece["token"] for piece in edited)] == texts

    for api_name, arguments, message in (
        ("/continue", ("hello", "", 1, 4, 2, 1.0, 0), "`prompt` has characters or words .* does not know"),
        ("/continue", ("w5", "w6", 1, 7, 2, 1.0, 0), "room for 6 of the 7 to be written"),
        ("/continue", ("w5", "", 1, 4, 2, 1.0, None), "`seed` must be an integer"),
        ("/infill", ("w5", 2, 2, 1.0, 0), "`gap`='___' does not occur"),
        ("/infill", ("w5 ___", 8, 2, 1.0, 0), "9 tokens, more than this model's 8"),
        ("/edit", (" ", 0.5, 2, 0), "The text is empty"),
        ("/edit", ("w5 " * 9, 0.5, 2, 0), "9 tokens, more than .* 8"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            client.predict(*arguments, api_name=api_name)


def ending(pipeline: LDLMPipeline, **settings: object) -> LDLMPipeline:
    """The pipeline as one whose texts end, and end soon."""
    pipeline.token_decoder.head.weight.data[pipeline.fill_token_id] *= 4
    changed = LDLMPipeline(**pipeline.components, ends_texts=True, **settings)
    changed.set_progress_bar_config(disable=True)
    return changed


def test_the_page_shows_nothing_behind_an_end(make_conditional_pipeline: Callable[[], LDLMPipeline]) -> None:
    pipeline = ending(make_conditional_pipeline())
    arguments = {"num_inference_steps": 3}
    expected = pipeline("w5 w6", num_texts_per_prompt=8, max_new_tokens=6, generator=seeded(), **arguments)
    assert any(len(text.split()) < 8 for text in expected.texts)
    *_, texts = continue_prompt(pipeline, "w5 w6", "", 8, 6, generator=seeded(), **arguments)
    assert [joined(text) for text in texts] == expected.texts
    expected = pipeline.infill("w5 ___ w6 ___", gap_tokens=2, generator=seeded(), **arguments)
    assert joined(fill_gaps(pipeline, "w5 ___ w6 ___", 2, generator=seeded(), **arguments)) == expected.texts[0]
    expected = pipeline.edit("w5 w6 w7 w8", strength=0.9, num_inference_steps=4, generator=seeded())
    _, after = edit_text(pipeline, "w5 w6 w7 w8", strength=0.9, num_inference_steps=4, generator=seeded())
    assert joined(after) == expected.texts[0]


def test_a_pipeline_of_pairs_has_no_tab_that_it_cannot_serve(
    make_conditional_pipeline: Callable[[], LDLMPipeline],
) -> None:
    page = build_app(ending(make_conditional_pipeline(), source_length=3))
    texts = [block.value for block in page.blocks.values() if isinstance(block, gr.Markdown)]
    off = [text.split("**")[1] for text in texts if "is off:" in text]
    assert off == ["Generate is off:", "Continue is off:", "Infill is off:", "Edit is off:"]


def test_special_tokens_are_edited_as_text(make_conditional_pipeline: Callable[[], LDLMPipeline]) -> None:
    """As the pipeline's `edit` reads them: three pieces, where the tokenizer by itself sees one end of text."""
    pipeline = make_conditional_pipeline()
    words = ["<", "eos", ">", *(f"w{index}" for index in range(2, 38))]
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0} | {word: place for place, word in enumerate(words, 1)}))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.register_modules(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    before, after = edit_text(pipeline, "w5 <eos> w6", strength=0.5, num_inference_steps=4, generator=seeded())
    assert joined(before) == "w5 < eos > w6" and after
