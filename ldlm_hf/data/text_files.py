"""Reads columns of text out of a local file of any kind that we take."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
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


def require_columns(columns: Mapping[str, str], found: Iterable[str]) -> None:
    """Raises CorpusError unless each column, by its setting (`text_column`), is one of those found."""
    found = list(found)
    for setting, column in columns.items():
        if column not in found:
            raise CorpusError(f"{setting}={column!r}: the corpus has no such column. It has {sorted(found)}.")


def require_text(setting: str, column: str, value: Any, row: str) -> None:
    """Raises CorpusError unless a value of a column, which the setting names, is a text."""
    if not isinstance(value, str):
        skip = " skip_missing_texts=true skips and counts rows without one." if value is None else ""
        raise CorpusError(
            f"{setting}={column!r}: {row} holds {value!r:.80} ({type(value).__name__}) in place of a text. "
            f"Name a column of texts, or remove such rows.{skip}"
        )


def with_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row, and the fields of its columns that hold objects as columns of their own, named `column.field`."""
    fields = {
        f"{column}.{name}": field
        for column, value in row.items()
        if isinstance(value, dict)
        for name, field in value.items()
    }
    return {**fields, **row}


def read_tables(name: str | Path, columns: Mapping[str, str]) -> Iterator[pyarrow.Table]:
    """A file's rows as tables of columns of strings, some of which may be missing (null).

    Args:
        name: of the file.
        columns: names of settings (`text_column`) → the columns that they name.

    Raises:
        CorpusError: the column is not there, or holds something else than text; a text file is not UTF-8.
        OSError, ValueError, pyarrow.ArrowException: the file cannot be read, or is not what its ending says.
    """
    path = Path(name)
    kind = kind_of(path)
    if kind in ("parquet", "arrow"):
        yield from _read_columns(path, kind, columns)
        return
    # a line ends with any of \n, \r\n and \r; what a quoted field of CSV holds stays as it is
    newline = "" if kind == "csv" else None
    compression = COMPRESSIONS.get(path.suffix.lower())
    try:
        file = pyarrow.input_stream(str(path), compression)
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as lines:
            schema = pyarrow.schema([(column, pyarrow.string()) for column in columns.values()])
            rows = _read_rows(lines, kind, path.name, columns)
            while batch := list(islice(rows, ROWS_AT_ONCE)):
                yield pyarrow.Table.from_pylist(batch, schema)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"source: {path} is not UTF-8: it holds the byte 0x{error.object[error.start]:02x} ({error.reason}). "
            "Convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8`."
        ) from error
    except OSError as error:
        if compression is None:
            raise
        raise OSError(f"source: {path} cannot be unpacked ({error}): the file is damaged, fetch it again.") from error


def _read_rows(
    lines: io.TextIOWrapper, kind: str | None, name: str, columns: Mapping[str, str]
) -> Iterator[Mapping[str, str | None]]:
    """The rows of a text file, of which each of the columns is a text or missing (None)."""
    if kind == "txt":
        require_columns(columns, ["text"])
        yield from ({"text": line.rstrip("\n")} for line in lines)
        return
    rows = iter(_read_csv(lines) if kind == "csv" else _read_json(lines, name))
    first = list(islice(rows, ROWS_AT_ONCE))  # an object may lack what others have
    if found := {key for row in first if isinstance(row, dict) for key in with_fields(row) if key is not None}:
        require_columns(columns, found)
    for number, row in enumerate(chain(first, rows)):
        if not isinstance(row, dict):
            wanted = " and ".join(map(repr, columns.values()))
            raise CorpusError(f"row {number} of {name} is {row!r:.80} in place of an object with {wanted}.")
        values = with_fields(row)
        texts = {column: values.get(column) for column in columns.values()}
        for setting, column in columns.items():
            if texts[column] is not None:
                require_text(setting, column, texts[column], f"row {number} of {name}")
        yield texts


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


def _read_columns(path: Path, kind: str, columns: Mapping[str, str]) -> Iterator[pyarrow.Table]:
    names = list(columns.values())
    with path.open("rb") as file:
        if kind == "parquet":
            parquet = pyarrow.parquet.ParquetFile(file)
            schema = parquet.schema_arrow
            batches = parquet.iter_batches(ROWS_AT_ONCE, columns=names)
        else:  # a stream, as `datasets` writes its files, or the file format of Arrow (Feather)
            is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
            file.seek(0)
            reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
            schema = reader.schema
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        schema = schema.empty_table().flatten().schema  # a field of a column of structs is named column.field
        require_columns(columns, schema.names)
        for setting, column in columns.items():
            text_type = schema.field(column).type
            values = text_type.value_type if pyarrow.types.is_dictionary(text_type) else text_type
            if not any(is_text(values) for is_text in TEXT_TYPES):
                raise CorpusError(
                    f"{setting}={column!r}: {path.name} holds {text_type} in place of a text. Name another column."
                )
        texts = pyarrow.schema([(column, pyarrow.string()) for column in names])
        for batch in batches:
            yield pyarrow.Table.from_batches([batch]).flatten().select(names).cast(texts)
