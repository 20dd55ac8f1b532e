"""Where the documents come from: the Hub through `datasets`, or local files, checked before anything is built."""

from __future__ import annotations

import contextlib
import glob
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias, cast

import datasets
import huggingface_hub
import pyarrow
import yaml
from datasets.data_files import SPLIT_KEYWORDS

from .settings import DataSettings
from .text_builder import build_text_files
from .text_files import ENDINGS, CorpusError, kind_of


logger = logging.getLogger(__name__)

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

# what datasets and the Hub write beside a corpus
METADATA_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# names of files and folders that name a split, with or without the numbers of a shard: train.txt, test-00000-of-00002
SPLIT_NAMES = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
SHARD_NUMBERS = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")


def load_split(settings: DataSettings, split: str) -> tuple[Rows, tuple[str, ...]]:
    """The documents of one split, and the names of the files of a stream.

    Documents are memory-mapped; with `streaming` they are a stream, of which nothing is read yet. It has no names
    where a file (an archive) is not one of its shards. A column of structs is memory-mapped as one column a field,
    named `column.field`.

    Raises:
        OSError: nothing is there, the Hub cannot be reached, or a file cannot be read.
        ValueError: a file of unknown ending or that is not UTF-8 or not what its ending says; an unknown split; a Hub
            dataset that is a loading script; a stream of a folder that `save_to_disk` wrote.
    """
    if _is_saved(settings.source):
        return _with_fields(_load_saved(settings, split), settings), ()
    builder = _builder(settings, split)
    if settings.streaming:
        with _explained_errors(settings, split):
            rows = cast(datasets.IterableDataset, builder.as_streaming_dataset(split=split))
        names = tuple((builder.config.data_files or {}).get(split, ()))
        return rows, names if len(names) == rows.num_shards else ()
    with _explained_errors(settings, split):
        builder.download_and_prepare(num_proc=settings.num_proc)
        return _with_fields(cast(datasets.Dataset, builder.as_dataset(split)), settings), ()


def _with_fields(rows: datasets.Dataset, settings: DataSettings) -> datasets.Dataset:
    is_nested = not set(settings.columns.values()) <= set(rows.column_names)
    return rows.flatten(max_depth=2) if is_nested else rows


def _builder(settings: DataSettings, split: str) -> datasets.DatasetBuilder:
    """Of local files the columns of text alone, and of a data set of the Hub that is parquet files."""
    if is_local(settings.source):
        return build_text_files(find_splits(settings, split), settings.columns, settings.cache_dir)
    arguments = {
        "path": settings.source,
        "name": settings.config_name,
        "revision": settings.revision,
        "cache_dir": settings.cache_dir,
    }
    with _explained_errors(settings, split):
        builder = datasets.load_dataset_builder(**arguments)
        features = builder.info.features
        # `column` of `column.field`
        names = [name if name in (features or ()) else name.partition(".")[0] for name in settings.columns.values()]
        if getattr(builder.config, "columns", ()) is None and (features is None or set(names) <= set(features)):
            builder = datasets.load_dataset_builder(**arguments, columns=list(dict.fromkeys(names)))
        return builder


def find_splits(settings: DataSettings, split: str) -> dict[str, list[Path]]:
    """The files of each split of a local source.

    A file or a pattern is the split `train`. A folder has splits where all of its files name one, by their own name or
    their folder's (`train.txt`, `validation/part-3.parquet`), or where its README.md declares some, as a data set of
    the Hub does; else it is the split `train`, too. Splits that the settings do not ask for are logged and left out.
    """
    root = Path(settings.source).expanduser()
    if not root.is_dir():
        return {"train": find_files(settings.source)}
    splits: dict[str, list[Path]] = {}
    if _is_hub_clone(root, settings):
        with _explained_errors(settings, split):
            declared = datasets.load_dataset_builder(str(root), name=settings.config_name).config.data_files
        splits = {str(name): [Path(file) for file in files] for name, files in declared.items()}
    else:
        files = find_files(settings.source)
        named = [_split_named_by(file.relative_to(root)) for file in files]
        for file, name in zip(files, named, strict=True):
            splits.setdefault("train" if name is None or None in named else name, []).append(file)
    slices = "+".join(name for name in (settings.train_split, settings.validation_split) if name).split("+")
    asked = {name.partition("[")[0].strip() for name in slices}
    if split == settings.train_split:  # said once
        for name in sorted(splits.keys() - asked):
            logger.warning("source=%r: the split %r is not read: %s", settings.source, name, _names(splits[name]))
    # all of them where one is missing, for the error that names those there are
    return {name: files for name, files in splits.items() if name in asked or not asked <= splits.keys()}


def _is_hub_clone(root: Path, settings: DataSettings) -> bool:
    card, metadata = root / "README.md", None
    try:
        if card.is_file():
            metadata = huggingface_hub.metadata_load(card)
    except (yaml.YAMLError, ValueError) as error:
        logger.warning("%s declares no splits: its metadata cannot be read (%s)", card, error)
    has_script = (root / f"{root.name}.py").is_file()  # datasets says that it runs none
    return settings.config_name is not None or has_script or "configs" in (metadata or {})


def _split_named_by(path: Path) -> str | None:
    for part in (path.name.partition(".")[0], *reversed(path.parts[:-1])):
        if (name := SHARD_NUMBERS.sub("", part.lower())) in SPLIT_NAMES:
            return SPLIT_NAMES[name]
    return None


def _names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")


@contextlib.contextmanager
def _explained_errors(settings: DataSettings, split: str) -> Iterator[None]:
    try:
        yield
    except CorpusError:
        raise
    except OSError as error:
        raise OSError(
            f"source={settings.source!r}: {error}. Check the name, revision={settings.revision!r} and the "
            "connection; a gated dataset needs `hf auth login`."
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        if isinstance(error.__cause__, (CorpusError, OSError)):
            raise error.__cause__ from error
        raise ValueError(
            f"source={settings.source!r}, config_name={settings.config_name!r}, split {split!r}: "
            # a DatasetGenerationError says only that generation failed; its cause says why
            f"{str(error.__cause__ or error).rstrip('. ')}. {_remedy(error)}"
        ) from error


def _remedy(error: BaseException) -> str:
    if "scripts are no longer supported" in str(error):
        return "Name an id that serves plain files, or try revision=refs/convert/parquet (ids: `ldlm_hf.data` docs)."
    if "corresponds to no data" in str(error):
        return "The files of this split hold no row."
    if "split" in str(error).lower():
        return "Set train_split and validation_split to splits it has; a stream takes no slices."
    return "Check that the files are what their ending says and that config_name is one of the dataset's."


def _is_saved(source: str) -> bool:
    folder = Path(source).expanduser()
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(settings: DataSettings, split: str) -> datasets.Dataset:
    if settings.streaming:
        raise ValueError(
            f"source={settings.source!r} was written by save_to_disk and is memory-mapped as it is: set "
            "streaming=false."
        )
    loaded = datasets.load_from_disk(str(Path(settings.source).expanduser()))
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
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
        or kind_of(path) is not None
    )


def find_files(source: str) -> list[Path]:
    """The files of a local source, all of one kind, in order of name. What exists is itself, and no pattern.

    Raises:
        OSError: nothing is there.
        ValueError: unknown endings, or files of more than one kind.
    """
    root = Path(source).expanduser()
    if root.is_dir():
        # parts of a folder that tools keep for themselves begin with . or __
        hidden = re.compile(r"(^|/)(\.|__)")
        visible = (path for path in root.rglob("*") if not hidden.search(path.relative_to(root).as_posix()))
        files = [path for path in visible if path.is_file() and kind_of(path) and path.name not in METADATA_FILES]
    elif root.is_file():
        files = [root]
    else:
        files = [Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file()]
        if not files:
            raise OSError(f"source={source!r}: there is no such file or folder, and no file matches it as a pattern.")
    kinds = {kind_of(path) for path in files}
    if not files or None in kinds:
        unknown = sorted(path.name for path in files if kind_of(path) is None)
        raise CorpusError(f"source={source!r} holds {unknown or 'no file'} of a known ending: use {ENDINGS}.")
    if len(kinds) > 1:
        raise CorpusError(
            f"source={source!r} holds files of {len(kinds)} kinds ({sorted(map(str, kinds))}): name one with a "
            "pattern."
        )
    return sorted(files)
