"""Local files are read as they are named, all of them, and of each the text column alone."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torch

from ldlm_hf.data import DataSettings, load_corpora
from ldlm_hf.data.text_files import read_tables


@pytest.fixture
def words_of(tmp_path: Path, word_tokenizer: Any) -> Callable[..., list[str]]:
    """The words that a source trains on, mapped or as the first epoch of a stream, in order of the alphabet."""

    def load(source: Path | str, streaming: bool, **settings: Any) -> list[str]:
        settings = {"append_eos": False, "shuffle_buffer": 0, "cache_dir": str(tmp_path / "cache")} | settings
        train = load_corpora(
            DataSettings(source=str(source), streaming=streaming, **settings), word_tokenizer, 1
        ).train
        if not streaming:
            return sorted(f"w{int(item['input_ids'])}" for item in train)
        words, reader = [], iter(train)
        while True:
            chunk = next(reader)
            if reader.state_dict()["position"]["epoch"] > 0:
                return sorted(words)
            words.append(f"w{int(chunk['input_ids'])}")

    return load


both = pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])


# 1. Names


@both
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("corpus[1].txt", "corpus1.txt"),
        ("what?.txt", "whats.txt"),
        ("*.txt", "other.txt"),
        ("a::b.txt", "b.txt"),
        ("a::b.jsonl.gz", "b.jsonl"),
        ("x #1 100% {a,b}.txt", "x.txt"),
        ("[v2] corpus/part.txt", "v corpus/part.txt"),
        ("train[1].jsonl", "train1.jsonl"),
    ],
)
def test_a_name_that_exists_is_no_pattern(
    name: str, other: str, streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    for file, text in ((other, "w9"), (name, "w1 w2")):
        path = tmp_path / "files" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        line = (json.dumps({"text": text}) if ".jsonl" in file else text) + "\n"
        path.write_bytes(gzip.compress(line.encode()) if file.endswith("gz") else line.encode())
    assert words_of(tmp_path / "files" / name, streaming) == ["w1", "w2"]


@both
def test_a_folder_whose_name_looks_like_a_pattern(
    streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    folder = tmp_path / "my corpus [v2]"
    folder.mkdir()
    (folder / "one.txt").write_text("w1\n")
    (folder / "two.txt").write_text("w2\n")
    assert words_of(folder, streaming) == ["w1", "w2"]


@both
def test_a_name_that_does_not_exist_is_a_pattern(
    streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"part{number}.txt").write_text(f"w{number}\n")
    assert words_of(tmp_path / "part[12].txt", streaming) == ["w1", "w2"]


@both
def test_a_file_that_has_changed_is_read_again(
    streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("w1\n")
    assert words_of(path, streaming) == ["w1"]
    path.write_text("w2\n")
    os.utime(path, ns=(1, 1))
    assert words_of(path, streaming) == ["w2"]


# 2. Splits


@both
@pytest.mark.parametrize(
    "names",
    [
        ["emma.txt", "murder-on-the-train.txt", "persuasion.txt"],
        ["a-test-of-wills.txt", "emma.txt", "persuasion.txt"],
        ["a-test-of-wills.txt", "murder-on-the-train.txt", "dev-ops.txt"],
        ["train.txt", "emma.txt", "test.txt"],
    ],
)
def test_a_book_s_title_is_no_split(
    names: list[str], streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    (tmp_path / "books").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "books" / name).write_text(f"w{number}\n")
    assert words_of(tmp_path / "books", streaming) == ["w0", "w1", "w2"]


@both
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.txt", "test.txt"),
        ("Train_0.TXT", "eval-1.txt"),
        ("data/train-00000-of-00002.txt", "data/test-00000-of-00001.txt"),
        ("training/a.txt", "testing/a.txt"),
    ],
)
def test_a_folder_whose_files_all_name_a_split_has_these(
    train: str,
    test: str,
    streaming: bool,
    tmp_path: Path,
    words_of: Callable[..., list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, word in ((train, "w1"), (test, "w2")):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_text(word)
    with caplog.at_level(logging.WARNING):
        assert words_of(tmp_path / "clone", streaming) == ["w1"]
    assert caplog.text.count(f"the split 'test' is not read: {Path(test).name}") == 1
    caplog.clear()
    assert words_of(tmp_path / "clone", streaming, validation_split="test", max_validation_documents=9) == ["w1"]
    assert "not read" not in caplog.text


@both
def test_a_split_that_is_not_read_may_hold_anything(
    streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    (tmp_path / "train.txt").write_text("w1")
    (tmp_path / "test.txt").write_bytes(b"\xff")
    assert words_of(tmp_path, streaming) == ["w1"]


def test_sums_of_splits_are_read(
    tmp_path: Path, words_of: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    for name, words in (("train", "w1 w2"), ("test", "w3")):
        (tmp_path / f"{name}.txt").write_text(words)
    assert words_of(tmp_path, False, train_split="train+test[:1]", holdout_documents=0) == ["w1", "w2", "w3"]
    assert "not read" not in caplog.text


@pytest.mark.parametrize("card", [b"---\nfoo: [\n---\n", b"---\nname: \xe9\n---\n"])
def test_a_card_that_cannot_be_read_declares_nothing(
    card: bytes, tmp_path: Path, words_of: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_bytes(card)
    (tmp_path / "a.txt").write_text("w1")
    assert words_of(tmp_path, False) == ["w1"]
    assert f"{tmp_path / 'README.md'} declares no splits" in caplog.text


@both
def test_splits_that_a_card_declares(streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: books\n  data_files:\n  - split: train\n    path: emma.txt\n"
        "- config_name: plays\n  data_files:\n  - split: train\n    path: hamlet.txt\n---\n"
    )
    (tmp_path / "emma.txt").write_text("w1")
    (tmp_path / "hamlet.txt").write_text("w2")
    assert words_of(tmp_path, streaming, config_name="plays") == ["w2"]


# 3. Columns


def write_tables(folder: Path, kind: str, rows: list[list[dict[str, Any]]]) -> Path:
    folder.mkdir()
    for number, part in enumerate(rows):
        path = folder / f"part-{number}.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
        elif kind == "json":
            path.write_text(json.dumps(part, indent=1))
        else:
            datasets.Dataset.from_list(part).to_parquet(str(path))
    return folder


@both
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"url": None}, {"url": "here"}),
        ({"url": 1}, {"url": ["a", "b"]}),
        ({}, {"further": 2}),
        ({"meta": {"a": 1}}, {"meta": {"b": "c", "d": [1.5]}}),
    ],
    ids=["null and string", "number and list", "one more", "map"],
)
def test_columns_that_are_not_read_may_hold_anything(
    kind: str,
    first: dict[str, Any],
    second: dict[str, Any],
    streaming: bool,
    tmp_path: Path,
    words_of: Callable[..., list[str]],
) -> None:
    rows = [[{"text": "w1"} | first, {"text": "w2"} | first], [{"text": "w3"} | second]]
    assert words_of(write_tables(tmp_path / "tables", kind, rows), streaming) == ["w1", "w2", "w3"]


@both
def test_a_column_may_change_its_type_far_into_a_file(
    streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    filler = [{"text": "", "notes": "x" * 10_000}] * 1200  # more than 10 MB
    rows = [[{"text": "w1", "notes": "x"}, *filler, {"text": "w2", "notes": {"a": [1]}}]]
    assert words_of(write_tables(tmp_path / "tables", "jsonl", rows), streaming) == ["w1", "w2"]


@both
def test_a_map_column_of_arrow_types_that_datasets_does_not_know(
    streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    table = pyarrow.table(
        {
            "text": pyarrow.array(["w1", "w2"], pyarrow.large_string()),
            "scores": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "corpus.parquet")
    assert words_of(tmp_path / "corpus.parquet", streaming) == ["w1", "w2"]


def test_tables_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "w1"}\n' * 5000 + "{broken")
    tables = read_tables(path, {"text_column": "text"})
    assert [len(next(tables)) for _ in range(5)] == [1000] * 5
    with pytest.raises(ValueError, match="corpus.jsonl, line 5001"):
        next(tables)


@both
def test_a_column_without_texts_is_named(streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]) -> None:
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(str(tmp_path / "corpus.parquet"))
    with pytest.raises(ValueError, match="text_column='text': corpus.parquet holds int64 in place of a text"):
        words_of(tmp_path / "corpus.parquet", streaming)


# 5. Missing texts, further kinds


@both
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_texts_are_skipped_and_counted_where_that_is_asked_for(
    kind: str,
    streaming: bool,
    tmp_path: Path,
    words_of: Callable[..., list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [[{"text": "w1"}, {"text": None}, {"text": "w2"}, {"text": None}, {"text": "w3"}]]
    source = write_tables(tmp_path / "tables", kind, rows)
    with pytest.raises(ValueError, match="holds None.*skip_missing_texts=true skips"):
        words_of(source, streaming)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert words_of(source, streaming, skip_missing_texts=True) == ["w1", "w2", "w3"]
    assert ("2 rows have no text" if streaming else "2 of the 5 rows of the training part") in caplog.text


@both
@pytest.mark.parametrize(
    "name", ["c.csv", "c.csv.gz", "c.jsonl.zst", "c.txt.zst", "C.TXT", "C.JSONL", "c.Json", "C.TXT.GZ", "c.PARQUET"]
)
def test_further_endings(name: str, streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]) -> None:
    path, lowered = tmp_path / name, name.lower()
    if ".csv" in lowered:
        content = 'id,text,note\n1,w1,"a, b"\n2,"w2\nw3",\n'
    elif ".json" in lowered:
        content = '{"text": "w1"}\n\n{"text": "w2 w3"}\n'
    else:
        content = "w1\nw2 w3\n"
    if lowered.endswith(".parquet"):
        datasets.Dataset.from_dict({"text": ["w1", "w2 w3"]}).to_parquet(str(path))
    elif lowered.endswith(".gz"):
        path.write_bytes(gzip.compress(content.encode()))
    elif lowered.endswith(".zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(content.encode())
    else:
        path.write_text(content)
    assert words_of(path, streaming) == ["w1", "w2", "w3"]


@both
def test_texts_of_csv_may_be_as_long_as_a_book(
    streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    (tmp_path / "a.csv").write_text('note,text\n"' + 200_000 * "x" + '","' + 200_000 * " " + 'w1"\n')
    assert words_of(tmp_path / "a.csv", streaming) == ["w1"]


def test_blank_lines_before_the_names_of_columns(tmp_path: Path, words_of: Callable[..., list[str]]) -> None:
    (tmp_path / "a.csv").write_text("\n \ntext\n\nw1\n")
    assert words_of(tmp_path / "a.csv", False) == ["w1"]


def test_a_row_of_csv_with_too_many_fields_hides_no_error(tmp_path: Path, words_of: Callable[..., list[str]]) -> None:
    (tmp_path / "a.csv").write_text("id,body\n1,w1,extra\n")
    with pytest.raises(ValueError, match=r"no such column. It has \['body', 'id'\]"):
        words_of(tmp_path / "a.csv", False)


@both
@pytest.mark.parametrize("missing", [0, 1])
def test_objects_without_a_text_are_missing_texts_in_any_place(
    missing: int, streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    lines = ['{"text": "w1"}', '{"text": "w2"}']
    lines.insert(missing, '{"id": 3}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert words_of(tmp_path / "a.jsonl", streaming, skip_missing_texts=True) == ["w1", "w2"]
    with pytest.raises(ValueError, match="skip_missing_texts=true"):
        words_of(tmp_path / "a.jsonl", streaming)


@both
@pytest.mark.parametrize("is_file", [True, False], ids=["file", "stream"])
def test_both_formats_of_arrow(
    is_file: bool, streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    table = pyarrow.table({"id": [1, 2], "text": ["w1", "w2"]})
    new = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    with new(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert words_of(tmp_path / "a.arrow", streaming) == ["w1", "w2"]


@both
def test_a_clone_s_metadata_is_no_text(streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]) -> None:
    datasets.Dataset.from_dict({"text": ["w1"]}).to_parquet(str(tmp_path / "part-0.parquet"))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "message.txt").write_text("w9")
    assert words_of(tmp_path, streaming) == ["w1"]


def test_a_damaged_zst_file_is_named(tmp_path: Path, words_of: Callable[..., list[str]]) -> None:
    with pyarrow.output_stream(str(tmp_path / "c.txt.zst"), compression="zstd") as file:
        file.write(bytes(torch.randint(97, 122, (100_000,), dtype=torch.uint8).tolist()))
    (tmp_path / "c.txt.zst").write_bytes((tmp_path / "c.txt.zst").read_bytes()[:20_000])
    with pytest.raises(OSError, match="c.txt.zst"):
        words_of(tmp_path / "c.txt.zst", streaming=False)


@both
def test_a_link_has_the_ending_of_its_own_name(
    streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    (tmp_path / "blob-1f3a").write_text("w1\nw2\n")
    (tmp_path / "corpus.txt").symlink_to(tmp_path / "blob-1f3a")
    assert words_of(tmp_path / "corpus.txt", streaming) == ["w1", "w2"]


@both
@pytest.mark.parametrize(
    ("name", "content"), [("c.txt", "w1\n"), ("c.jsonl", '{"text": "w1"}\n'), ("c.csv", "text,id\nw1,2\n")]
)
def test_a_byte_order_mark_is_no_text(
    name: str, content: str, streaming: bool, tmp_path: Path, words_of: Callable[..., list[str]]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert words_of(tmp_path / name, streaming) == ["w1"]
