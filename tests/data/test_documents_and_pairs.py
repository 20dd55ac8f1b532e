"""Chunks of one document, and of a source and a target: which rows there are, and what each of them holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from ldlm_hf.data import DataSettings, StreamedTokenChunks, TextCorpora, load_corpora, load_held_out
from ldlm_hf.data.streaming import HeldOutTexts
from ldlm_hf.evaluation.real_text import held_out_rows


LENGTH, SOURCE, END = 16, 10, 52
GIVEN = [True] * SOURCE + [False] * (LENGTH - SOURCE)
PAIRS = {
    "source_column": "question",
    "target_column": "answer",
    "source_length": SOURCE,
    "target_length": LENGTH - SOURCE,
}


@pytest.fixture
def load(tmp_path: Path, word_tokenizer) -> Callable[..., TextCorpora]:
    def load(source: Path, **changes: Any) -> TextCorpora:
        settings = DataSettings(source=str(source), cache_dir=str(tmp_path / "cache"), **changes)
        return load_corpora(settings, word_tokenizer, LENGTH)

    return load


def filled(text: str, length: int) -> list[int]:
    """What a text's tokens should be, worked out without a tokenizer."""
    tokens = [int(word[1:]) for word in text.split()][:length]
    return tokens + [END] * (length - len(tokens))


def rows_of(chunks: Any) -> list[list[int]]:
    return [chunk["input_ids"].tolist() for chunk in chunks]


def rows_of_epoch(stream: StreamedTokenChunks) -> list[list[int]]:
    """The rows of one epoch of a stream."""
    reader = stream.reader()
    return [chunk["input_ids"].tolist() for chunk in itertools.takewhile(lambda _: reader.position.epoch == 0, reader)]


@pytest.fixture
def pairs(documents: list[str]) -> list[dict[str, str]]:
    """Texts of all lengths; a question comes with several answers."""
    return [{"question": documents[index // 2], "answer": text} for index, text in enumerate(documents)]


def expected_pairs(pairs: list[dict[str, str]]) -> list[list[int]]:
    return [filled(pair["question"], SOURCE) + filled(pair["answer"], LENGTH - SOURCE) for pair in pairs]


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> Path:
    """In the format of the path's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(pairs), encoding="utf-8")
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(pairs).to_csv(str(path), index=False)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(pairs).to_parquet(str(path), batch_size=7)
    else:
        datasets.Dataset.from_list(pairs).save_to_disk(str(path))
    return path


def test_a_document_is_a_row_cut_or_filled_up(documents, corpus_file, load) -> None:
    assert {len(text.split()) > LENGTH for text in documents} == {True, False}
    corpora = load(corpus_file, documents="separate", holdout_documents=5)
    assert rows_of(corpora.train) == [filled(text, LENGTH) for text in documents[:-5]]
    assert rows_of(corpora.validation) == [filled(text, LENGTH) for text in documents[-5:]]
    assert set(corpora.train[0]) == {"input_ids"} and corpora.train[0]["input_ids"].dtype == torch.int64


def test_a_blank_document_gives_no_row(tmp_path, load) -> None:
    (tmp_path / "text.txt").write_text("w1 w2\n\n  \nw3\n", encoding="utf-8")
    rows = [filled("w1 w2", LENGTH), filled("w3", LENGTH)]
    assert rows_of(load(tmp_path / "text.txt", documents="separate").train) == rows
    stream = load(tmp_path / "text.txt", documents="separate", streaming=True, shuffle_buffer=0).train
    assert rows_of_epoch(stream) == rows


def test_a_bert_type_tokenizer_fills_up_with_its_separator(tmp_path, bert_tokenizer) -> None:
    (tmp_path / "text.txt").write_text("we the people\n", encoding="utf-8")
    settings = DataSettings(source=str(tmp_path / "text.txt"), documents="separate", cache_dir=str(tmp_path / "cache"))
    (row,) = rows_of(load_corpora(settings, bert_tokenizer, 6).train)
    assert row == [*bert_tokenizer("we the people", add_special_tokens=False)["input_ids"], *[102] * 3]
    assert bert_tokenizer.sep_token_id == 102


def test_rows_of_another_length_are_tokenised_anew(documents, corpus_file, word_tokenizer, tmp_path) -> None:
    """The cache has rows, not texts."""
    for changes, length in (({}, 8), ({"documents": "separate"}, 8), ({"documents": "separate"}, 12)):
        settings = DataSettings(source=str(corpus_file), cache_dir=str(tmp_path / "cache"), **changes)
        rows = rows_of(load_corpora(settings, word_tokenizer, length).train)
        assert (rows == [filled(text, length) for text in documents]) == bool(changes)


@pytest.mark.parametrize("columns", [{}, PAIRS])
@pytest.mark.parametrize("shuffle_buffer", [0, 9])
def test_a_stream_has_the_rows_of_random_access(pairs, load, tmp_path, columns, shuffle_buffer) -> None:
    texts = {"documents": "separate", "text_column": "question"} | columns
    held_out = {"holdout_fraction": 0.3, "holdout_selection": "random", "max_validation_documents": 100}
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    whole = rows_of(load(path, **texts).train)
    corpora = load(path, **texts, **held_out, streaming=True, shuffle_buffer=shuffle_buffer)
    train, validation = rows_of_epoch(corpora.train), rows_of(corpora.validation)
    assert sorted(train + validation) == sorted(whole) and train and validation
    assert len(whole) == len(pairs)
    if columns:
        assert all(chunk["given"].tolist() == GIVEN for chunk in itertools.islice(corpora.train, 5))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.csv", "pairs.parquet", "saved"])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_pair_is_a_source_and_a_target(pairs, load, tmp_path, name, num_proc) -> None:
    corpora = load(write_pairs(tmp_path / name, pairs), **PAIRS, holdout_documents=4, num_proc=num_proc)
    assert rows_of(corpora.train) + rows_of(corpora.validation) == expected_pairs(pairs)
    for chunk in itertools.chain(corpora.train, corpora.validation):
        assert chunk["given"].dtype == torch.bool and chunk["given"].tolist() == GIVEN


@pytest.mark.parametrize(
    ("name", "streaming"),
    [(name, streaming) for name in ("pairs.jsonl", "pairs.parquet") for streaming in (False, True)]
    + [("saved", False)],
)
def test_columns_of_structs(pairs, load, tmp_path, name, streaming) -> None:
    """As WMT14's `translation`, but with other columns beside it."""
    nested = [{"id": 3, "translation": {"de": pair["question"], "en": pair["answer"]}} for pair in pairs]
    columns = PAIRS | {"source_column": "translation.de", "target_column": "translation.en"}
    held_out = {"holdout_fraction": 0.2, "holdout_selection": "random", "max_validation_documents": 100}
    corpora = load(write_pairs(tmp_path / name, nested), **columns, **held_out, streaming=streaming, shuffle_buffer=0)
    train = rows_of_epoch(corpora.train) if streaming else rows_of(corpora.train)
    assert sorted(train + rows_of(corpora.validation)) == sorted(expected_pairs(pairs))


def test_columns_of_structs_of_a_data_set_of_the_hub(pairs, load, tmp_path, monkeypatch) -> None:
    """Read by the builder of `datasets`, as from the Hub: parquet files with a card."""
    nested = [{"translation": {"de": pair["question"], "en": pair["answer"]}, "id": 3} for pair in pairs]
    (tmp_path / "hub" / "de-en").mkdir(parents=True)
    write_pairs(tmp_path / "hub" / "de-en" / "train-00000-of-00001.parquet", nested)
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: de-en\n  data_files:\n  - split: train\n    path: de-en/train-*\n---\n"
    )
    # the one thing that tells a folder from an id
    monkeypatch.setattr("ldlm_hf.data.sources.is_local", lambda source: False)
    columns = PAIRS | {"source_column": "translation.de", "target_column": "translation.en", "config_name": "de-en"}
    assert rows_of(load(tmp_path / "hub", **columns).train) == expected_pairs(pairs)
    stream = load(tmp_path / "hub", **columns, streaming=True, shuffle_buffer=0).train
    assert rows_of_epoch(stream) == expected_pairs(pairs)


def test_a_column_with_a_dot_in_its_name_is_itself(load, tmp_path, documents) -> None:
    rows = [{"a.b": text, "a": {"b": "w1"}} for text in documents]
    corpora = load(write_pairs(tmp_path / "text.jsonl", rows), text_column="a.b", documents="separate")
    assert rows_of(corpora.train) == [filled(text, LENGTH) for text in documents]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pair_that_lacks_a_text_is_skipped_or_refused(load, tmp_path, caplog, streaming) -> None:
    rows = [
        {"question": "w1", "answer": "w2"},
        {"question": None, "answer": "w3"},
        {"question": "w4", "answer": None},
        {"question": None, "answer": None},
        {"question": " ", "answer": "w5"},
        {"question": "w6", "answer": "w7"},
    ]
    path = write_pairs(tmp_path / "pairs.jsonl", rows)
    arguments = {**PAIRS, "streaming": streaming, "shuffle_buffer": 0}
    train = load(path, **arguments, skip_missing_texts=True).train
    expected = expected_pairs([rows[0], rows[-1]])
    assert (rows_of_epoch(train) if streaming else rows_of(train)) == expected
    assert ("3 rows have no text" if streaming else "3 of the 6 rows of the training part") in caplog.text
    with pytest.raises(ValueError, match="source_column='question': .* holds None .*skip_missing_texts=true"):
        rows_of_epoch(load(path, **arguments).train)


def test_all_targets_of_a_source_are_held_out_with_it(pairs, load, tmp_path) -> None:
    held_out = {"holdout_fraction": 0.3, "holdout_selection": "random", "max_validation_documents": 100}
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    corpora = load(path, **PAIRS, **held_out, streaming=True, shuffle_buffer=0)
    is_held_out = HeldOutTexts(seed=0, fraction=0.3)
    chosen = [pair for pair in pairs if is_held_out(pair["question"])]
    assert 2 < len(chosen) < len(pairs)
    assert rows_of(corpora.validation) == expected_pairs(chosen)


def test_held_out_pairs_alone(pairs, word_tokenizer, tmp_path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    settings = DataSettings(source=str(path), **PAIRS, holdout_documents=6, cache_dir=str(tmp_path / "cache"))
    rows = held_out_rows(load_held_out(settings, word_tokenizer, LENGTH), 100)
    assert rows["input_ids"].tolist() == expected_pairs(pairs[-6:])
    assert rows["given"].tolist() == [GIVEN] * 6


@pytest.mark.parametrize("columns", [{"documents": "separate"}, PAIRS])
def test_a_stream_goes_on_exactly(pairs, load, tmp_path, columns) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    texts = {"text_column": "question", **columns, "streaming": True, "shuffle_buffer": 7}
    stream = load(path, **texts).train
    expected = rows_of(itertools.islice(stream, 100))
    reader = stream.reader()
    assert rows_of(itertools.islice(reader, 41)) == expected[:41]
    again = load(path, **texts).train
    again.load_state_dict(reader.state_dict())
    assert rows_of(itertools.islice(again, 59)) == expected[41:]
    packed = load(path, text_column="question", streaming=True, shuffle_buffer=7).train
    packed.load_state_dict(reader.state_dict())
    with pytest.raises(ValueError, match=r"text_lengths=\[\] \(saved: \[1"):
        next(iter(packed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": "wrapped"}, "documents='wrapped' must be one of packed, separate"),
        ({"documents": "separate", "chunk_markers": True}, "chunk_markers=true with documents='separate'"),
        ({"documents": "separate", "append_eos": False}, "append_eos=false with documents='separate'"),
        ({**PAIRS, "chunk_markers": True}, "chunk_markers=true with source_column='question'"),
        ({**PAIRS, "append_eos": False}, "append_eos=false with source_column='question'"),
        ({**PAIRS, "target_column": None}, "target_column=None.*pairs need all four"),
        ({**PAIRS, "source_column": None, "target_column": None}, "source_column=None.*pairs need all four"),
        ({**PAIRS, "source_length": None}, "source_length=None.*pairs need all four"),
        ({**PAIRS, "target_length": 0}, r"target_length=0 must lie in \[1, inf\)"),
        ({**PAIRS, "target_column": "question"}, "are one column"),
        (
            {**PAIRS, "target_length": 7},
            "data.source_length=10 and data.target_length=7 are 17 tokens together, but model.sequence_length=16",
        ),
        ({**PAIRS, "target_column": "reply"}, r"target_column='reply': the corpus has no such column.*'answer'"),
        ({**PAIRS, "source_column": "question.de"}, "source_column='question.de': the corpus has no such column"),
        ({**PAIRS, "target_column": "number"}, "target_column='number': .* holds .* in place of a text"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_cannot_be_is_refused(pairs, load, tmp_path, changes, message, ending) -> None:
    rows = [{**pair, "number": number} for number, pair in enumerate(pairs)]
    with pytest.raises(ValueError, match=message):
        load(write_pairs(tmp_path / f"pairs.{ending}", rows), **changes)


def test_text_files_have_no_pairs(corpus_file, load) -> None:
    with pytest.raises(
        ValueError, match=r"source_column='question': the corpus has no such column. It has \['text'\]"
    ):
        load(corpus_file, **PAIRS)
