"""Pipelines of models that were trained on one document a row, or on pairs of a source and a target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldlm_hf import GivenTokens, LDLMPipeline
from ldlm_hf.models.conditions import Conditions


LENGTH, SOURCE, COUNT = 8, 3, 48


@pytest.fixture
def make_pipe(make_conditional_pipeline: Callable[[], LDLMPipeline]) -> Callable[..., LDLMPipeline]:
    """A tiny pipeline that writes the end-of-text token into about half of its texts: where it would have written
    another one, that comes in as many."""

    def make(**settings: Any) -> LDLMPipeline:
        pipe = make_conditional_pipeline()
        rows = pipe("w5", num_texts_per_prompt=COUNT, num_inference_steps=2, generator=seeded()).sequences
        shares = torch.stack([(rows[:, SOURCE:] == token).any(1).float().mean() for token in range(40)])
        head = pipe.token_decoder.head.weight.data
        head[pipe.fill_token_id] = 1.01 * head[(shares - 0.5).abs().argmin()]
        pipe = LDLMPipeline(**pipe.components, **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def ids(pipe: LDLMPipeline, text: str) -> list[int]:
    return pipe.tokenizer(text, add_special_tokens=False)["input_ids"]


def decoded(pipe: LDLMPipeline, row: list[int]) -> str:
    return pipe.tokenizer.decode(row, skip_special_tokens=True)


def up_to_end(pipe: LDLMPipeline, row: list[int], start: int = 0) -> list[int]:
    end = pipe.fill_token_id
    return row[: row.index(end, start)] if end in row[start:] else row


@pytest.mark.parametrize("arguments", [{"batch_size": COUNT}, {"prompt": "w5 w6", "num_texts_per_prompt": COUNT}])
def test_a_text_ends_at_its_first_end_token_where_the_model_learned_that(make_pipe, arguments) -> None:
    arguments |= {"num_inference_steps": 2}
    ending, old = make_pipe(ends_texts=True), make_pipe()
    found, before = (pipe(generator=seeded(), **arguments) for pipe in (ending, old))
    assert torch.equal(found.sequences, before.sequences)
    rows = found.sequences.tolist()
    assert found.texts == [decoded(ending, up_to_end(ending, row)) for row in rows]
    assert before.texts == [decoded(old, row) for row in rows]
    assert sum(one != other for one, other in zip(found.texts, before.texts, strict=True)) > 3
    assert ending.decode(found.latents)[0] == found.texts[0] or "prompt" in arguments


def test_what_is_given_is_not_cut(make_pipe) -> None:
    """Neither an end-of-text token that is given ends a text, nor one that is written before what is given."""
    pipe = make_pipe(ends_texts=True)
    end, word = pipe.fill_token_id, ids(pipe, "w7")[0]
    rows = [[end, word, *[None] * 6], [*[None] * 7, word]]
    given = GivenTokens.of_rows(rows * COUNT, LENGTH)
    output = pipe(given_tokens=given, num_inference_steps=2, generator=seeded())
    starts = [2, 8] * COUNT
    written = output.sequences.tolist()
    assert any(end in row[:7] for row in written[1::2]) and any(end in row[2:] for row in written[::2])
    expected = [decoded(pipe, up_to_end(pipe, row, start)) for row, start in zip(written, starts, strict=True)]
    assert output.texts == expected
    assert all("w7" in text for text in output.texts)


def test_gaps_and_edits_of_texts_that_end(make_pipe) -> None:
    pipe = make_pipe(ends_texts=True)
    filled = pipe.infill("w5 ___", gap_tokens=5, num_texts_per_prompt=COUNT, num_inference_steps=2)
    assert filled.texts == [decoded(pipe, up_to_end(pipe, row)) for row in filled.sequences.tolist()]
    edited = pipe.edit(["w5 w6 w7 w8 w9 w10"] * COUNT, strength=1, num_inference_steps=4)
    assert edited.texts == [decoded(pipe, up_to_end(pipe, row)) for row in edited.sequences.tolist()]


def test_a_stream_ends_with_its_text(make_pipe) -> None:
    pipe = make_pipe(ends_texts=True)
    arguments = {"max_new_tokens": 60, "num_inference_steps": 1}
    blocks = list(pipe.stream("w5", num_texts_per_prompt=4, generator=seeded(), **arguments))
    written = [[token for block in blocks for token in block.sequences[row].tolist()] for row in range(4)]
    end = pipe.fill_token_id
    assert len(written[0]) < 60 and all(end in row for row in written)
    texts = ["w5" + "".join(block.texts[row] for block in blocks) for row in range(4)]
    assert texts == [decoded(pipe, [*ids(pipe, "w5"), *up_to_end(pipe, row)]) for row in written]
    whole = pipe("w5", num_texts_per_prompt=4, generator=seeded(), **arguments)
    assert whole.texts == texts


def test_a_prompt_is_a_source_and_texts_are_targets(make_pipe) -> None:
    pipe = make_pipe(ends_texts=True, source_length=SOURCE)
    told: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, __, keywords: told.append(keywords), with_kwargs=True)
    output = pipe(["w5", "w5 w6 w7"], num_texts_per_prompt=COUNT, num_inference_steps=2, generator=seeded())
    end = pipe.fill_token_id
    sources = [[*ids(pipe, "w5"), end, end]] * COUNT + [ids(pipe, "w5 w6 w7")] * COUNT
    rows = output.sequences.tolist()
    assert output.sequences.shape == (2 * COUNT, LENGTH) and [row[:SOURCE] for row in rows] == sources
    assert output.texts == [decoded(pipe, up_to_end(pipe, row[SOURCE:])) for row in rows]
    assert len(set(map(len, map(str.split, output.texts)))) > 1
    # the filling is given as well
    given = (torch.arange(LENGTH) < SOURCE).expand(2 * COUNT, -1)
    latents = pipe.encode_sequences(output.sequences, Conditions(given).attention_mask())
    assert torch.equal(told[0]["given"], given)
    torch.testing.assert_close(told[0]["given_latents"], latents * given[..., None])
    assert pipe.decode(output.latents[:1]) == [
        decoded(pipe, up_to_end(pipe, pipe.decode_to_sequences(output.latents[:1]).tolist()[0][SOURCE:]))
    ]


def test_shorter_targets_guidance_and_an_empty_source(make_pipe) -> None:
    pipe = make_pipe(source_length=SOURCE)
    short = pipe("w5", max_new_tokens=2, num_inference_steps=2, guidance_scale=2.0)
    assert short.sequences.shape == (1, SOURCE + 2)
    assert short.texts == [decoded(pipe, short.sequences[0, SOURCE:].tolist())]
    assert pipe.num_function_evaluations == 4
    assert pipe("", num_inference_steps=1).sequences[0, :SOURCE].tolist() == [pipe.fill_token_id] * SOURCE


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe("w2 w3 w4 w5"), "`prompt` has 4 tokens, but a source .* room for 3"),
        (lambda pipe: pipe(["w2", "w2 w3 w4 w5"]), "`prompt` has 4 tokens"),
        (lambda pipe: pipe(batch_size=2), "up to 3 tokens: give the source as `prompt`"),
        (lambda pipe: pipe("w2", suffix="w3"), "and no `suffix`"),
        (lambda pipe: pipe("w2", max_new_tokens=6), "`max_new_tokens`=6 is for .*up to 5 tokens for a source"),
        (lambda pipe: next(pipe.stream("w2", max_new_tokens=4)), "`stream` is for pipelines"),
        (lambda pipe: pipe.infill("w2 ___"), "`infill` is for pipelines"),
        (lambda pipe: pipe.edit("w2"), "`edit` is for pipelines"),
    ],
)
def test_what_makes_no_sense_with_sources_is_refused(make_pipe, call, message) -> None:
    pipe = make_pipe(ends_texts=True, source_length=SOURCE)
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        call(pipe)
    assert not calls


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_length": 0}, r"source_length=0 must lie in \[1, 8\)"),
        ({"source_length": LENGTH}, r"source_length=8 must lie in \[1, 8\)"),
        ({"source_length": 2.5}, "source_length=2.5 must be of type"),
        ({"ends_texts": 1}, "ends_texts=1 must be of type bool"),
    ],
)
def test_impossible_settings_are_refused(make_pipe, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_pipe(**settings)


def test_settings_are_saved_and_old_pipelines_have_none(make_pipe, tmp_path: Path) -> None:
    pipe = make_pipe(ends_texts=True, source_length=SOURCE)
    pipe.save_pretrained(tmp_path / "pairs")
    config = LDLMPipeline.from_pretrained(tmp_path / "pairs").config
    assert (config.ends_texts, config.source_length) == (True, SOURCE)
    index = tmp_path / "pairs" / "model_index.json"
    lines = index.read_text(encoding="utf-8").splitlines()
    assert sum("ends_texts" in line or "source_length" in line for line in lines) == 2
    old = [line for line in lines if "ends_texts" not in line and "source_length" not in line]
    index.write_text("\n".join(old), encoding="utf-8")
    config = LDLMPipeline.from_pretrained(tmp_path / "pairs").config
    assert (config.ends_texts, config.source_length) == (False, None)


def test_a_pipeline_made_of_another_keeps_them(make_pipe) -> None:
    pipe = LDLMPipeline.from_pipe(make_pipe(ends_texts=True, source_length=SOURCE))
    assert (pipe.config.ends_texts, pipe.config.source_length) == (True, SOURCE)
