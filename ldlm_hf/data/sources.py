"""Where the documents come from: the Hub through `datasets`, or local files, checked before anything is built."""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import datasets
import pyarrow

from .settings import DataSettings


# File ending → builder of `datasets`. The first two kinds may also be compressed: `.txt.gz`.
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
TEXT_BUILDERS = ("text", "json")
ENDINGS = ".txt, .jsonl, .json (each also with .gz), .parquet, .arrow"
READ_BYTES = 1 << 20


def load_documents(settings: DataSettings, split: str, rank: int = 0) -> datasets.Dataset:
    """The documents of one split, memory-mapped.

    Args:
        settings: validated settings.
        split: name of the split.
        rank: of this process. Rank 0 reads every local text file once, up front, to find bytes that are not UTF-8.

    Raises:
        OSError: nothing is there, the Hub cannot be reached, or a file cannot be read.
        ValueError: a file of unknown ending or that is not UTF-8 or not what its ending says; an unknown split; a Hub
            dataset that is a loading script.
    """
    if _is_saved(settings.source):
        return _load_saved(settings, split)
    if is_local(settings.source) and rank == 0 and split == settings.train_split:  # once, not for each split
        _check_text_files(settings.source)
    arguments = _loader_arguments(settings)
    with _explained_errors(settings, split):
        loaded = datasets.load_dataset(
            **arguments, split=split, cache_dir=settings.cache_dir, num_proc=settings.num_proc
        )
    return cast(datasets.Dataset, loaded)


def load_stream(settings: DataSettings, split: str) -> tuple[datasets.IterableDataset, tuple[str, ...]]:
    """The documents of one split as a stream, of which nothing is read yet, and the names of its files.

    There are no names where a file (an archive) is not one shard of the stream.

    Raises:
        OSError, ValueError: as `load_documents`, but for what only reading the files shows; or the source is a folder
            that `save_to_disk` wrote.
    """
    if _is_saved(settings.source):
        raise ValueError(
            f"source={settings.source!r} was written by save_to_disk and is memory-mapped as it is: set "
            "streaming=false."
        )
    arguments = _loader_arguments(settings)
    with _explained_errors(settings, split):
        builder = datasets.load_dataset_builder(**arguments, cache_dir=settings.cache_dir)
        rows = cast(datasets.IterableDataset, builder.as_streaming_dataset(split=split))
    names = tuple((builder.config.data_files or {}).get(split, ()))
    return rows, names if len(names) == rows.num_shards else ()


def _loader_arguments(settings: DataSettings) -> dict[str, Any]:
    if not is_local(settings.source):
        return {"path": settings.source, "name": settings.config_name, "revision": settings.revision}
    builder, files = find_files(settings.source)
    folder = Path(settings.source).expanduser()
    if folder.is_dir():  # datasets reads splits from the names in a folder
        return {"path": str(folder), "name": settings.config_name}
    return {"path": builder, "data_files": {"train": [str(file) for file in files]}}


def _check_text_files(source: str) -> None:
    builder, files = find_files(source)
    if builder in TEXT_BUILDERS:
        with_text = [holds_utf8_text(file) for file in files]  # every file is decoded before any is judged
        if not any(with_text):
            raise ValueError(f"source={source!r}: the corpus is empty or blank. Name a file that holds text.")


@contextlib.contextmanager
def _explained_errors(settings: DataSettings, split: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"source={settings.source!r}: {error}. Check the name, revision={settings.revision!r} and the "
            "connection; a gated dataset needs `hf auth login`."
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"source={settings.source!r}, config_name={settings.config_name!r}, split {split!r}: "
            f"{_explain(error)} {_remedy(error)}"
        ) from error


def _explain(error: BaseException) -> str:
    # A DatasetGenerationError says only that generation failed; its cause says why.
    return str(error.__cause__ or error).rstrip(". ") + "."


def _remedy(error: BaseException) -> str:
    if "scripts are no longer supported" in str(error):
        return "Name an id that serves plain files, or try revision=refs/convert/parquet (ids: `ldlm_hf.data` docs)."
    if "split" in str(error).lower():
        return "Set train_split and validation_split to splits it has; a stream takes no slices."
    return "Check that the files are what their ending says and that config_name is one of the dataset's."


def _is_saved(source: str) -> bool:
    folder = Path(source).expanduser()
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(settings: DataSettings, split: str) -> datasets.Dataset:
    loaded = datasets.load_from_disk(str(Path(settings.source).expanduser()))
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else datasets.DatasetDict(train=loaded)
    if split not in splits:
        raise ValueError(
            f"source={settings.source!r} has no split {split!r}: set train_split or validation_split to one of "
            f"{sorted(map(str, splits))}."
        )
    return splits[split]


def is_local(source: str) -> bool:
    """A file, folder or pattern rather than a Hub id, which is `name` or `owner/name` without a data file's ending."""
    path = Path(source).expanduser()
    return (
        path.exists()
        or glob.has_magic(source)
        or path.is_absolute()
        or source.startswith((".", "~"))
        or source.count("/") > 1
        or _builder_of(path) is not None
    )


def _builder_of(path: Path) -> str | None:
    compressed = path.suffix == ".gz"
    builder = BUILDERS.get(Path(path.stem).suffix if compressed else path.suffix)
    return None if compressed and builder not in TEXT_BUILDERS else builder


def find_files(source: str) -> tuple[str, list[Path]]:
    """The builder of `datasets` that reads a local source, and its files in order of name.

    Raises:
        OSError: nothing is there.
        ValueError: unknown endings, or files of more than one kind.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        visible = (path for path in root.rglob("*") if not path.relative_to(root).parts[0].startswith("."))
        files = [path for path in visible if path.is_file() and _builder_of(path) is not None]
    elif root.is_file():
        files = [root]
    else:
        files = [Path(name) for name in glob.glob(str(root), recursive=True) if os.path.isfile(name)]
        if not files:
            raise OSError(f"source={source!r}: there is no such file or folder, and no file matches it as a pattern.")
    kinds = {_builder_of(path) for path in files}
    if not files or None in kinds:
        unknown = sorted(path.name for path in files if _builder_of(path) is None)
        raise ValueError(f"source={source!r} holds {unknown or 'no file'} of a known ending: use {ENDINGS}.")
    if len(kinds) > 1:
        raise ValueError(
            f"source={source!r} holds files of {len(kinds)} kinds ({sorted(map(str, kinds))}): name one with a "
            "pattern."
        )
    return str(kinds.pop()), sorted(files)


def holds_utf8_text(path: Path) -> bool:
    """Decodes a text file from end to end, a piece at a time; whether it holds more than white space.

    Raises:
        ValueError: it is not UTF-8; the message has the offset of the first wrong byte, in the unpacked text.
        OSError: a `.gz` that cannot be unpacked.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    found = False
    try:
        with _open_unpacked(path) as file:
            while True:
                pending = len(decoder.getstate()[0])  # bytes of a character that the last piece began
                piece = file.read(READ_BYTES)
                text = decoder.decode(piece, final=not piece)
                found = found or bool(text.strip())
                position += len(piece)
                if not piece:
                    return found
    except UnicodeDecodeError as error:
        offset = position - pending + error.start
        unpacked = " of the unpacked text" if path.suffix == ".gz" else ""
        raise ValueError(
            f"source: {path} is not UTF-8: byte {offset}{unpacked} is 0x{error.object[error.start]:02x} "
            f"({error.reason}). Convert the file to UTF-8, for example with `iconv -f latin1 -t utf-8`."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise OSError(f"source: {path} cannot be unpacked ({error}): the file is damaged, fetch it again.") from error


def _open_unpacked(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
