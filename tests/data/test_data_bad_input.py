"""Each bad input gives an error that names the setting, the value and the remedy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from ldlm_hf.data import DataSettings, load_corpora


LENGTH = 16


@pytest.fixture
def load(tmp_path, word_tokenizer):
    def load(source: Path | str, tokenizer=word_tokenizer, sequence_length: int = LENGTH, **changes):
        settings = DataSettings(source=str(source), cache_dir=str(tmp_path / "cache"), **changes)
        return load_corpora(settings, tokenizer, sequence_length)

    return load


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "source='': no corpus is named. Give a Hub dataset id"),
        ({"holdout_documents": -1}, r"holdout_documents=-1 must lie in \[0, inf\)"),
        ({"holdout_documents": 2.5}, "holdout_documents=2.5 must be of type int"),
        ({"holdout_fraction": 1.0}, r"holdout_fraction=1.0 must lie in \[0, 1\)"),
        ({"holdout_fraction": "half"}, "holdout_fraction='half' must be of type float"),
        ({"holdout_documents": 3, "holdout_fraction": 0.1}, "holdout_documents=3 and holdout_fraction=0.1 both"),
        ({"holdout_selection": "middle"}, r"holdout_selection='middle' is unknown: choose from \['last'"),
        ({"holdout_documents": 3, "validation_split": "test"}, "validation_split='test' and a hold-out"),
        ({"max_validation_documents": 0}, r"max_validation_documents=0 must lie in \[1, inf\)"),
        ({"shuffle_buffer": -5}, "shuffle_buffer=-5"),
        ({"num_proc": 0}, r"num_proc=0 must lie in \[1, inf\)"),
        ({"num_proc": True}, "num_proc=True"),
        ({"seed": -1}, "seed=-1"),
        ({"detokenizer": "ptb"}, r"detokenizer='ptb' is unknown: choose from \['lm1b'\]"),
        ({"streaming": True, "holdout_documents": 3}, "streaming=true .* holdout_documents=3.*Use validation_split"),
        ({"streaming": True, "holdout_fraction": 0.1}, "streaming=true .*holdout_selection='last'"),
        ({"streaming": True, "validation_split": "test"}, "streaming=true .*Set max_validation_documents"),
    ],
)
def test_settings_that_no_corpus_could_fit(changes, message, corpus_file, word_tokenizer):
    with pytest.raises(ValueError, match=message):
        load_corpora(DataSettings(**{"source": str(corpus_file), **changes}), word_tokenizer, LENGTH)


def test_rank_outside_the_world(corpus_file, word_tokenizer):
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        load_corpora(DataSettings(source=str(corpus_file)), word_tokenizer, LENGTH, rank=2, world_size=2)


@pytest.mark.parametrize(("length", "markers"), [(0, False), (-3, False), (2, True)])
def test_sequence_length_without_room_for_text(length, markers, corpus_file, load):
    with pytest.raises(ValueError, match=f"sequence_length={length}, chunk_markers={markers}.*at least 1, or 3"):
        load(corpus_file, sequence_length=length, chunk_markers=markers)


@pytest.mark.parametrize("name", ["absent.txt", "absent", "absent-*.jsonl"])
def test_missing_files(name, tmp_path, load):
    with pytest.raises(OSError, match=f"source='.*{name.replace('*', '.')}': there is no such file"):
        load(tmp_path / name)


def test_dataset_that_the_hub_does_not_give(monkeypatch, load):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="source='nobody/nothing'.*Check the name, revision='main' and the connection"):
        load("nobody/nothing", revision="main")


def test_loading_script(tmp_path, documents, load):
    (tmp_path / "owt").mkdir()
    (tmp_path / "owt" / "owt.py").write_text("raise SystemExit")
    (tmp_path / "owt" / "data.txt").write_text("\n".join(documents))
    with pytest.raises(
        ValueError, match="source='.*owt'.*scripts are no longer supported.*Name an id that serves plain"
    ):
        load(tmp_path / "owt")


def test_unknown_endings(tmp_path, load):
    for name in ("book.docx", "book.parquet.gz", "book"):
        (tmp_path / name).write_bytes(b"text")
        with pytest.raises(
            ValueError, match=rf"source='.*{name}' holds \['{name}'\] of a known ending: use .txt, .jsonl"
        ):
            load(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="source='.*folder' holds no file of a known ending"):
        load(tmp_path / "folder")


def test_files_of_several_kinds(tmp_path, corpus_file, load):
    (tmp_path / "corpus.jsonl").write_text('{"text": "w1"}')
    with pytest.raises(
        ValueError, match=r"source='.*' holds files of 2 kinds \(\['jsonl', 'txt'\]\): name one with a"
    ):
        load(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_split(streaming, corpus_file, load):
    with pytest.raises(ValueError, match="source='.*corpus.txt'.*split 'dev'.*Set train_split and validation_split"):
        load(corpus_file, streaming=streaming, validation_split="dev", max_validation_documents=10)


def test_saved_folder_refuses_unknown_splits_and_streaming(tmp_path, documents, load):
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"source='.*saved' has no split 'dev'.*one of \['train'\]"):
        load(tmp_path / "saved", train_split="dev")
    with pytest.raises(ValueError, match="source='.*saved' was written by save_to_disk.*set streaming=false"):
        load(tmp_path / "saved", streaming=True)


def test_files_that_are_not_what_their_ending_says(tmp_path, load):
    (tmp_path / "corpus.parquet").write_bytes(b"not a table at all")
    (tmp_path / "corpus.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    for name in ("corpus.parquet", "corpus.jsonl"):
        with pytest.raises(ValueError, match=f"source='.*{name}'.*Check that the files are what their ending says"):
            load(tmp_path / name)
    (tmp_path / "corpus.txt.gz").write_bytes(gzip.compress(b"w1 w2 w3\n" * 1000)[:-9])
    with pytest.raises(OSError, match="corpus.txt.gz cannot be unpacked .*damaged, fetch it again"):
        load(tmp_path / "corpus.txt.gz")
    (tmp_path / "other.txt.gz").write_bytes(b"w1 w2 w3\n")
    with pytest.raises(OSError, match="other.txt.gz cannot be unpacked"):
        load(tmp_path / "other.txt.gz")


@pytest.mark.parametrize(
    ("before", "wrong", "byte"),
    [
        (b"caf\xc3\xa9 ", b"caf\xe9 w1", 0xE9),  # Latin-1 after good UTF-8
        (b"w1 " * 400_000, b"\xff", 0xFF),  # beyond the first piece that is read
        (b"w1 w2 ", b"\xe2\x82", 0xE2),  # a character cut short by the end of the file
    ],
)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".txt.gz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_bytes_that_are_not_utf8(before, wrong, byte, ending, streaming, tmp_path, load):
    data = before + wrong
    path = tmp_path / f"corpus{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    with pytest.raises(ValueError, match=f"corpus{ending} is not UTF-8: it holds the byte 0x{byte:02x}.*iconv"):
        load(path, streaming=streaming)


def test_second_file_of_a_pattern_is_checked_too(tmp_path, corpus_file, load):
    (tmp_path / "corpus-2.txt").write_bytes(b"w1\xff")
    with pytest.raises(ValueError, match="corpus-2.txt is not UTF-8: it holds the byte 0xff"):
        load(tmp_path / "corpus*.txt")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", ["", "\n\n", "  \n\t\n \u00a0 \n"])
def test_empty_and_blank_corpora(content, streaming, tmp_path, load):
    (tmp_path / "corpus.txt").write_text(content, encoding="utf-8")
    (tmp_path / "corpus.txt.gz").write_bytes(gzip.compress(content.encode()))
    is_empty = not content and not streaming
    message = "hold no row" if is_empty else "the training part is empty or blank, it gives no tokens. Use more"
    for name in ("corpus.txt", "corpus.txt.gz"):
        with pytest.raises(ValueError, match=f"source='.*{name}'.*{message}"):
            load(tmp_path / name, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_blank_tables(streaming, tmp_path, load):
    datasets.Dataset.from_dict({"text": ["", "  "]}).to_parquet(str(tmp_path / "blank.parquet"))
    with pytest.raises(ValueError, match="source='.*blank.parquet': the training part is empty or blank"):
        load(tmp_path / "blank.parquet", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_text_column_names_the_columns(streaming, tmp_path, load):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"title": "w1", "body": "w2"}) + "\n")
    with pytest.raises(
        ValueError, match=r"text_column='text': the corpus has no such column. It has \['body', 'title'\]"
    ):
        load(tmp_path / "corpus.jsonl", streaming=streaming)


def test_missing_text_column_of_a_stream_that_holds_out(tmp_path, load):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"title": "w1", "body": "w2"}) + "\n")
    hold_out = {"holdout_fraction": 0.5, "holdout_selection": "random", "max_validation_documents": 3}
    with pytest.raises(ValueError, match=r"text_column='text'.*\['body', 'title'\]"):
        load(tmp_path / "corpus.jsonl", streaming=True, **hold_out)


@pytest.mark.parametrize(
    ("streaming", "row"), [(False, "(a row|row 0 of corpus.jsonl)"), (True, "row 0 of .*corpus.jsonl")]
)
@pytest.mark.parametrize("value", [None, 7, ["w1"]])
def test_rows_without_text(value, streaming, row, tmp_path, load):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": value, "number": 1}) + "\n")
    with pytest.raises(
        ValueError, match=f"text_column='text': {row} holds .* in place of a text. Name a column of texts"
    ):
        load(tmp_path / "corpus.jsonl", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_fewer_tokens_than_one_chunk(streaming, tmp_path, load):
    (tmp_path / "corpus.txt").write_text("w1 w2 w3\nw4\n")
    message = "the training part has 6 tokens, and one chunk of sequence_length=16 needs 16. Use more text, a shorter"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "corpus.txt", streaming=streaming)
    with pytest.raises(ValueError, match="has 6 tokens, and one chunk of sequence_length=9 needs 7"):
        load(tmp_path / "corpus.txt", streaming=streaming, sequence_length=9, chunk_markers=True)


def test_held_out_part_with_fewer_tokens_than_one_chunk(tmp_path, load):
    (tmp_path / "corpus.txt").write_text("w1 w2 w3 " * 20 + "\nw4 w5\n")
    with pytest.raises(ValueError, match="the validation part has 3 tokens.*needs 16.*another hold-out"):
        load(tmp_path / "corpus.txt", holdout_documents=1)


@pytest.mark.parametrize("count", [37, 100_000])
def test_hold_out_that_leaves_nothing(count, corpus_file, load):
    with pytest.raises(ValueError, match=f"holdout_documents={count}.*{count} of the 37 documents.*Hold out fewer"):
        load(corpus_file, holdout_documents=count)


def test_tokenizers_without_the_special_tokens(corpus_file, build_word_tokenizer, load):
    bare = build_word_tokenizer()
    with pytest.raises(
        ValueError, match="append_eos=true needs a tokenizer with eos_token or sep_token.*append_eos=false"
    ):
        load(corpus_file, tokenizer=bare)
    assert len(load(corpus_file, tokenizer=bare, append_eos=False).train) > 0
    only_end = build_word_tokenizer(sep_token="[SEP]")
    with pytest.raises(ValueError, match="chunk_markers=true needs a tokenizer with bos_token or cls_token"):
        load(corpus_file, tokenizer=only_end, chunk_markers=True)
    only_start = build_word_tokenizer(cls_token="[CLS]")
    with pytest.raises(ValueError, match="chunk_markers=true needs a tokenizer with eos_token or sep_token"):
        load(corpus_file, tokenizer=only_start, append_eos=False, chunk_markers=True)
