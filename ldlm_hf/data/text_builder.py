"""The columns of text of local files, as a builder of `datasets`.

The builders that `datasets` ships take each name for a pattern, and all columns of all files for one table: a file
whose name has brackets is another file, and a column that nobody asked for ends the run where its type changes. This
one opens exactly the files that it is given and takes the columns of text alone.

The module has nothing else in it, since `datasets` replaces `open` and `Path` in the module of a builder that streams
by its own, for which `::` in a name is a path into an archive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow
from datasets.data_files import DataFilesDict, DataFilesList

from .text_files import read_tables


# part of the cache's key: another one where the same files begin to give other rows
FORMAT = "1"


@dataclass
class TextFilesConfig(datasets.BuilderConfig):
    """Which columns hold text: names of settings → the columns that they name."""

    columns: dict[str, str] = field(default_factory=dict)


class TextFiles(datasets.ArrowBasedBuilder):
    """The columns of text of local files, one split of them or several; each file is a shard of a stream."""

    BUILDER_CONFIG_CLASS = TextFilesConfig

    def _info(self) -> datasets.DatasetInfo:
        features = {column: datasets.Value("string") for column in self.config.columns.values()}
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"files": list(files)})
            for split, files in self.config.data_files.items()
        ]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[tuple[int, int], pyarrow.Table]]:
        for place, file in enumerate(files):
            for number, table in enumerate(read_tables(file, self.config.columns)):
                yield (place, number), table


def build_text_files(
    splits: Mapping[str, Sequence[Path]], columns: dict[str, str], cache_dir: str | None
) -> TextFiles:
    """A builder of these files and no others; what it has cached is found again until one of them changes."""
    data_files = DataFilesDict(
        {
            split: DataFilesList(
                [str(file.absolute()) for file in files],
                [(str(status.st_mtime_ns), str(status.st_size)) for status in map(os.stat, files)],
            )
            for split, files in splits.items()
        }
    )
    return TextFiles(cache_dir=cache_dir, hash=FORMAT, data_files=data_files, columns=columns)
