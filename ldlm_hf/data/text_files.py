"""Reads one column of text out of a local file of any kind that we take."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet


# rows of a table (ours)
ROWS_AT_ONCE = 1000
# characters of a field of CSV; Python's own limit, 131,072, is shorter than a book
MAX_FIELD_SIZE = 2**31 - 1
ARROW_FILE = b"ARROW1"
TEXT_KINDS = ("txt", "jsonl", "json", "csv")
KINDS = (*TEXT_KINDS, "parquet", "arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_TYPES = (
    pyarrow.types.is_string,
    pyarrow.types.is_large_string,
    pyarrow.types.is_string_view,
    pyarrow.types.is_null,
)
ENDINGS = ".txt, .jsonl, .json, .csv (each also with .gz or .zst), .parquet, .arrow"


class CorpusError(ValueError):
    """What a file holds is not what the settings say; the message names the setting and the remedy."""


def kind_of(path: Path) -> str | None:
    """The kind of a file by its ending in any case, of a compressed one by the ending before; None if unknown."""
    *_, inner, last = ["", *path.name.lower().split(".")]
    if path.suffix.lower() in COMPRESSIONS:
        return inner if inner in TEXT_KINDS else None
    return last if last in KINDS else None


def require_text_column(text_column: str, columns: Iterable[str]) -> None:
    columns = list(columns)
    if text_column not in columns:
        raise CorpusError(f"text_column={text_column!r}: the corpus has no such column. It has {sorted(columns)}.")


def require_text(text_column: str, value: Any, row: str) -> None:
    if not isinstance(value, str):
        skip = " skip_missing_texts=true skips and counts rows without one." if value is None else ""
        raise CorpusError(
            f"text_column={text_column!r}: {row} holds {value!r:.80} ({type(value).__name__}) in place of a text. "
            f"Name a column of texts, or remove such rows.{skip}"
        )


def read_tables(name: str | Path, text_column: str) -> Iterator[pyarrow.Table]:
    """A file's rows as tables of one column of strings, some of which may be missing (null).

    Raises:
        CorpusError: the column is not there, or holds something else than text; a text file is not UTF-8.
        OSError, ValueError, pyarrow.ArrowException: the file cannot be read, or is not what its ending says.
    """
    path = Path(name)
    kind = kind_of(path)
    if kind in ("parquet", "arrow"):
        yield from _read_columns(path, kind, text_column)
        return
    # a line ends with any of \n, \r\n and \r; what a quoted field of CSV holds stays as it is
    newline = "" if kind == "csv" else None
    compression = COMPRESSIONS.get(path.suffix.lower())
    try:
        file = pyarrow.input_stream(str(path), compression)
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as lines:
            values = _read_values(lines, kind, path.name, text_column)
            while batch := list(islice(values, ROWS_AT_ONCE)):
                yield pyarrow.table({text_column: pyarrow.array(batch, pyarrow.string())})
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"source: {path} is not UTF-8: it holds the byte 0x{error.object[error.start]:02x} ({error.reason}). "
            "Convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8`."
        ) from error
    except OSError as error:
        if compression is None:
            raise
        raise OSError(f"source: {path} cannot be unpacked ({error}): the file is damaged, fetch it again.") from error


def _read_values(lines: io.TextIOWrapper, kind: str | None, name: str, text_column: str) -> Iterator[str | None]:
    if kind == "txt":
        require_text_column(text_column, ["text"])
        yield from (line.rstrip("\n") for line in lines)
        return
    rows = iter(_read_csv(lines) if kind == "csv" else _read_json(lines, name))
    first = list(islice(rows, ROWS_AT_ONCE))  # an object may lack what others have
    if columns := {key for row in first if isinstance(row, dict) for key in row if key is not None}:
        require_text_column(text_column, columns)
    for number, row in enumerate(chain(first, rows)):
        if not isinstance(row, dict):
            raise CorpusError(f"row {number} of {name} is {row!r:.80} in place of an object with {text_column!r}.")
        value = row.get(text_column)
        if value is not None:
            require_text(text_column, value, f"row {number} of {name}")
        yield value


def _read_csv(lines: Iterable[str]) -> Iterator[dict[str | None, Any]]:
    """The rows by the names in the first line that is not blank; what a row has too many of has the name None."""
    csv.field_size_limit(MAX_FIELD_SIZE)
    yield from csv.DictReader(dropwhile(str.isspace, lines))


def _read_json(lines: io.TextIOWrapper, name: str) -> Iterator[Any]:
    """The objects of a file with one a line, or with all of them in one list."""
    at_start = True
    for number, line in enumerate(lines, 1):
        if at_start and line.lstrip().startswith("["):
            yield from json.loads(line + lines.read())
            return
        if line.strip():
            at_start = False
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number}: {error.msg}") from error


def _read_columns(path: Path, kind: str, text_column: str) -> Iterator[pyarrow.Table]:
    with path.open("rb") as file:
        if kind == "parquet":
            parquet = pyarrow.parquet.ParquetFile(file)
            schema = parquet.schema_arrow
            batches = parquet.iter_batches(ROWS_AT_ONCE, columns=[text_column])
        else:  # a stream, as `datasets` writes its files, or the file format of Arrow (Feather)
            is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            schema = reader.schema
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        require_text_column(text_column, schema.names)
        text_type = schema.field(text_column).type
        values = text_type.value_type if pyarrow.types.is_dictionary(text_type) else text_type
        if not any(is_text(values) for is_text in TEXT_TYPES):
            raise CorpusError(
                f"text_column={text_column!r}: {path.name} holds {text_type} in place of a text. Name another column."
            )
        for batch in batches:
            yield pyarrow.table({text_column: batch[text_column].cast(pyarrow.string())})
