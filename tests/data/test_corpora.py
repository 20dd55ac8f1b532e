from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from ldlm_hf.data import DataSettings, load_corpora, load_held_out


LENGTH = 16


def write_corpus(kind: str, folder: Path, documents: list[str]) -> str:
    """Writes `documents` in one of the accepted forms; returns the source that names it."""
    lines = "\n".join(documents) + "\n"
    json_lines = "\n".join(json.dumps({"number": number, "text": text}) for number, text in enumerate(documents))
    table = datasets.Dataset.from_dict({"text": documents})
    path = folder / f"corpus{kind}"
    if kind in (".txt", ".jsonl"):
        path.write_text(lines if kind == ".txt" else json_lines, encoding="utf-8")
    elif kind in (".txt.gz", ".jsonl.gz"):
        path.write_bytes(gzip.compress((lines if kind == ".txt.gz" else json_lines).encode()))
    elif kind == ".json":
        path.write_text(json.dumps([{"text": text} for text in documents]), encoding="utf-8")
    elif kind == ".parquet":
        table.to_parquet(str(path))
    elif kind == ".arrow":
        table.save_to_disk(str(folder / "saved"))
        (folder / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif kind == "saved dataset":
        table.save_to_disk(str(path))
    elif kind == "saved splits":
        datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(path))
    else:
        path.mkdir()
        (path / "README.md").write_text("Not a part of the corpus.")
        (path / "part-0.txt").write_text("\n".join(documents[:9]) + "\n", encoding="utf-8")
        (path / "part-1.txt.gz").write_bytes(gzip.compress(("\n".join(documents[9:])).encode()))
        return str(path / "part-*") if kind == "pattern" else str(path)
    return str(path)


FILE_KINDS = [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow", "pattern", "folder"]


@pytest.mark.parametrize("kind", [*FILE_KINDS, "saved dataset", "saved splits"])
def test_every_kind_of_source_gives_the_same_stream(kind, documents, word_tokenizer, stream_of, tokens_of, tmp_path):
    settings = DataSettings(source=write_corpus(kind, tmp_path, documents), cache_dir=str(tmp_path / "cache"))
    corpora = load_corpora(settings, word_tokenizer, LENGTH)
    assert tokens_of(corpora.train) == stream_of(documents)[: len(corpora.train) * LENGTH]
    assert corpora.train.num_tokens == len(stream_of(documents))
    assert corpora.validation is None


def test_text_is_one_document_a_line_and_no_other_separator_counts(bert_tokenizer, tmp_path):
    (tmp_path / "corpus.txt").write_text("a\u2028b\u0085c\x0bd\ne\x0cf\n", encoding="utf-8")
    settings = DataSettings(source=str(tmp_path / "corpus.txt"), cache_dir=str(tmp_path / "cache"))
    chunks = load_corpora(settings, bert_tokenizer, 2).train
    assert len(chunks.documents) == 2


def test_splits_of_a_folder(documents, word_tokenizer, stream_of, tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(documents[:30]), encoding="utf-8")
    (tmp_path / "test.txt").write_text("\n".join(documents[30:]), encoding="utf-8")
    settings = DataSettings(source=str(tmp_path), validation_split="test", cache_dir=str(tmp_path / ".cache"))
    corpora = load_corpora(settings, word_tokenizer, LENGTH)
    assert corpora.train.num_tokens == len(stream_of(documents[:30]))
    assert corpora.validation.num_tokens == len(stream_of(documents[30:]))


def loaded_documents(chunks) -> list[str]:
    """The documents of a part, read back from its token stream, the tail included."""
    words = [f"w{token}" for row in chunks.documents for token in row["input_ids"]]
    return [text.strip() for text in " ".join(words).split("w52") if text.strip()]


@pytest.mark.parametrize(
    ("selection", "validation"), [("last", slice(27, None)), ("first", slice(0, 10)), ("random", None)]
)
def test_hold_out_is_by_documents(selection, validation, corpus_file, documents, word_tokenizer, tmp_path):
    def load(seed: int):
        settings = DataSettings(
            source=str(corpus_file),
            holdout_documents=10,
            holdout_selection=selection,
            seed=seed,
            cache_dir=str(tmp_path / "cache"),
        )
        corpora = load_corpora(settings, word_tokenizer, LENGTH)
        return loaded_documents(corpora.train), loaded_documents(corpora.validation)

    train, held_out = load(seed=0)
    assert len(held_out) == 10 and Counter(train + held_out) == Counter(documents)
    assert train == [text for text in documents if text not in held_out]  # in the corpus' order
    assert load(seed=0) == (train, held_out)
    if validation is None:
        assert load(seed=1)[1] != held_out
    else:
        assert held_out == documents[validation]


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, 4), (0.001, 1), (0.5, 18)])
def test_hold_out_fraction_is_rounded_and_at_least_one(fraction, expected, corpus_file, word_tokenizer, tmp_path):
    settings = DataSettings(source=str(corpus_file), holdout_fraction=fraction, cache_dir=str(tmp_path / "cache"))
    corpora = load_corpora(settings, word_tokenizer, 2)
    assert len(corpora.validation.documents) == expected
    assert len(corpora.train.documents) == 37 - expected


def test_validation_part_can_be_cut_short(corpus_file, documents, word_tokenizer, tmp_path):
    settings = DataSettings(
        source=str(corpus_file), holdout_documents=10, max_validation_documents=4, cache_dir=str(tmp_path / "cache")
    )
    corpora = load_corpora(settings, word_tokenizer, LENGTH)
    assert loaded_documents(corpora.validation) == documents[27:31]
    assert loaded_documents(corpora.train) == documents[:27]


def test_stream_validates_on_the_start_of_another_split(documents, word_tokenizer, tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(documents[:30]), encoding="utf-8")
    (tmp_path / "test.txt").write_text("\n".join(documents[30:]), encoding="utf-8")
    settings = DataSettings(
        source=str(tmp_path),
        streaming=True,
        validation_split="test",
        max_validation_documents=3,
        cache_dir=str(tmp_path / "cache"),
    )
    corpora = load_corpora(settings, word_tokenizer, LENGTH)
    assert loaded_documents(corpora.validation) == documents[30:33]


@pytest.mark.parametrize(
    "held_out",
    [
        {"holdout_documents": 5},
        {"holdout_fraction": 0.3, "holdout_selection": "random", "max_validation_documents": 4},
        {"validation_split": "train[:7]"},
        {"holdout_fraction": 0.5, "holdout_selection": "random", "streaming": True, "max_validation_documents": 6},
    ],
)
def test_held_out_text_alone_is_that_of_training(held_out, documents, word_tokenizer, tokens_of, tmp_path):
    settings = DataSettings(
        source=write_corpus(".txt", tmp_path, documents), cache_dir=str(tmp_path / "cache"), **held_out
    )
    expected = load_corpora(settings, word_tokenizer, LENGTH).validation
    assert expected is not None
    assert tokens_of(load_held_out(settings, word_tokenizer, LENGTH)) == tokens_of(expected)


def test_held_out_text_has_to_be_held_out(documents, word_tokenizer, tmp_path):
    settings = DataSettings(source=write_corpus(".txt", tmp_path, documents))
    with pytest.raises(ValueError, match="no text is held out. Set validation_split"):
        load_held_out(settings, word_tokenizer, LENGTH)
