"""An endless, shuffled stream of chunks whose position is a few numbers, for corpora larger than the disk.

A reader is one worker of one rank. In each epoch the files are put in an order drawn from (seed, epoch) and dealt out
to the readers; a reader goes through its documents in blocks, and each block is permuted by (seed, epoch, reader,
block). So a position is where its block starts, how much of the block was given, and the tokens that have not filled a
chunk: no buffer has to be saved. (The state of `datasets` keeps no shuffle buffer: a stream that is resumed from it
loses the documents that were in there.)
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import datasets
import fsspec.asyn
import numpy as np
import pyarrow
import torch

from .chunks import ChunkLayout
from .text_files import CorpusError, require_columns, require_text
from .tokenization import DocumentEncoder


logger = logging.getLogger(__name__)

# Documents tokenised in one call (ours): enough for the tokenizer's threads, little to hold. Also the block of a
# stream that is not shuffled.
TOKENIZED_DOCUMENTS = 64
# Rows that are taken out of the tables of `datasets` at once (ours).
READ_ROWS = 1000
# A reader without a document in one epoch may have some in the next, whose order differs; we give up after so many.
MAX_EMPTY_EPOCHS = 100


@dataclass(frozen=True)
class HeldOutTexts:
    """Whether a document of a stream is held out, by its text alone, so that every rank and worker decides alike; a
    pair by its source, so that all targets of a source are held out with it."""

    seed: int
    fraction: float

    def __call__(self, text: str) -> bool:
        digest = hashlib.blake2b(f"{self.seed}:{text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < self.fraction


class Document(NamedTuple):
    """The text of each column, and the position (part of the share, row of its file) at which reading goes on after
    them."""

    texts: tuple[str, ...]
    part: int
    next_row: int


def reader_share(num_files: int, reader: int, num_readers: int) -> list[tuple[int, range]]:
    """A reader's share of an epoch: places in the order of files, and of each those rows r with r mod R in a range.

    Each file counts as R = `num_readers` equal slices and each reader takes `num_files` slices in a row, so that the
    shares are disjoint, complete, of equal size where the files are, and touch no more files than they must.
    """
    first, last = reader * num_files, (reader + 1) * num_files  # slices
    share = []
    for place in range(first // num_readers, -(-last // num_readers)):
        start = place * num_readers
        share.append((place, range(max(first - start, 0), min(last - start, num_readers))))
    return share


@dataclass(frozen=True)
class DocumentFiles:
    """Raw documents, read one file at a time.

    Attributes:
        rows: stream of rows with the texts; each of its shards is a file.
        columns: those that hold the texts, by the settings that name them.
        held_out: documents that are left out, or None.
        names: of the files, for errors. Empty where they are unknown.
        skip_missing_texts: leave out rows without a text (null), and say at the end of each file how many it had.
    """

    rows: datasets.IterableDataset
    columns: Mapping[str, str] = field(default_factory=lambda: {"text_column": "text"})
    held_out: HeldOutTexts | None = None
    names: tuple[str, ...] = ()
    skip_missing_texts: bool = False

    def __len__(self) -> int:
        return self.rows.num_shards

    def name(self, file: int) -> str:
        return self.names[file] if self.names else f"file {file + 1} of {len(self)}"

    def read(self, file: int, start: int, residues: range, modulus: int) -> Iterator[tuple[int, tuple[str, ...]]]:
        """(row, texts) of the rows of a file from `start` on with `row % modulus in residues`, without those that have
        a blank text.

        Raises:
            OSError: the file cannot be read, or not further. The message names the file and the rows before.
            ValueError: a column is missing, or a row holds something else than text.
        """
        missing = 0
        for rows, columns in self._texts(file, start, residues, modulus):
            for row, *texts in zip(rows, *columns, strict=True):
                if self.skip_missing_texts and None in texts:
                    missing += 1
                    continue
                for (setting, column), text in zip(self.columns.items(), texts, strict=True):
                    require_text(setting, column, text, f"row {row} of {self.name(file)}")
                if all(map(str.strip, texts)) and not (self.held_out is not None and self.held_out(texts[0])):
                    yield row, tuple(texts)
        if missing:
            logger.warning("source: %s: %s rows have no text and were skipped", self.name(file), f"{missing:,}")

    def _texts(
        self, file: int, start: int, residues: range, modulus: int
    ) -> Iterator[tuple[list[int], list[list[Any]]]]:
        # `iter`, unlike `__iter__`, does not divide the files among the workers of a DataLoader a second time
        tables = self.rows.shard(len(self), file).with_format("arrow").iter(batch_size=READ_ROWS)
        first = 0
        while True:
            try:
                if (table := next(tables, None)) is None:
                    return
                rows = np.arange(first, first + len(table))
                rows = rows[(rows >= start) & (rows % modulus >= residues.start) & (rows % modulus < residues.stop)]
                table = table.flatten()  # fields of structs, as `column.field`
                require_columns(self.columns, table.column_names)
                chosen = table.select(list(self.columns.values())).take(pyarrow.array(rows - first))
                texts = [column.to_pylist() for column in chosen.columns]
            except CorpusError:
                raise
            except Exception as error:  # parsers, decompressors and clients each raise errors of their own
                raise OSError(
                    f"source: {self.name(file)} cannot be read beyond its row {first} "
                    f"({type(error).__name__}: {error.__cause__ or error!s:.300}). Mend the file or the connection "
                    "and go on from the last checkpoint."
                ) from error
            yield rows.tolist(), texts
            first += len(table)


@dataclass
class StreamPosition:
    """Where a reader is.

    Attributes:
        epoch: epochs that were read to their end.
        part, row: part of the epoch's share and row of its file at which the block starts.
        block: blocks of the epoch before this one.
        document: documents of the permuted block of which all tokens were taken.
        chunks: chunks that were given of `waiting` and the tokens of the next document.
        waiting: tokens of the documents before that fill no chunk.
    """

    epoch: int = 0
    part: int = 0
    row: int = 0
    block: int = 0
    document: int = 0
    chunks: int = 0
    waiting: list[int] = field(default_factory=list)


@dataclass(eq=False)
class StreamedTokenChunks(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The items of `TokenChunks` from a stream of documents, tokenised as they come, without an end.

    Ranks and the workers of a `DataLoader` share each epoch out among themselves (`reader_share`). A reader that is
    done with its share begins that of the next epoch, and takes along the tokens that fill no chunk; so no rank ends
    before another, and nothing is lost. Do not pass the loader to `Accelerator.prepare`, which would divide it among
    the ranks again.

    Held in memory: the `shuffle_buffer` texts of a block, the table that is being read (of a parquet file, a row
    group), and the tokens of 64 documents. A connection that fails is tried again by `datasets`
    (`datasets.config.STREAMING_READ_MAX_RETRIES`, `STREAMING_READ_RETRY_INTERVAL`).

    Attributes:
        files: the documents of all ranks.
        shuffle_buffer: documents in a block; 0: the files' own order.
        seed: of the order.
        rank, world_size: of this process.
    """

    files: DocumentFiles
    encoder: DocumentEncoder
    layout: ChunkLayout
    shuffle_buffer: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    _start: dict[str, Any] | None = field(default=None, init=False)
    _latest: ChunkReader | None = field(default=None, init=False)

    def __iter__(self) -> ChunkReader:
        """The chunks of this process, or of this worker of a `DataLoader`, from the loaded position on."""
        worker = torch.utils.data.get_worker_info()
        place = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._latest = self.reader(*place, self._start)
        return self._latest

    def reader(self, worker: int = 0, num_workers: int = 1, state: dict[str, Any] | None = None) -> ChunkReader:
        """The chunks of one worker of this rank, from the position of `state` on, or from the start. ValueError where
        the position is of a stream with another layout."""
        reader = ChunkReader(self, worker, num_workers)
        if state is not None:
            reader.load_state_dict(state)
        return reader

    def state_dict(self) -> dict[str, Any]:
        """The position of the latest iterator of this process: whole numbers, and at most L - 1 token ids.

        An iterator in a worker of a `DataLoader` has a position of its own, which the main process does not see.
        """
        return (self._latest or self.reader(state=self._start)).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Iterators made from now on begin at this position."""
        self._start, self._latest = state, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}  # an iterator stays in its process

    def count_tokens(self, enough: int) -> int:
        """Tokens of this rank's share of the first epoch, counted until there are `enough`."""
        count = 0
        texts = (document.texts for document in self.reader().documents())
        while count < enough and (batch := list(islice(texts, TOKENIZED_DOCUMENTS))):
            count += sum(map(len, self.encode(batch)))
        return count

    def encode(self, documents: list[tuple[str, ...]]) -> list[list[int]]:
        """The tokens of each document, of the text of each of its columns."""
        columns = zip(self.encoder.columns.values(), zip(*documents, strict=True), strict=True)
        return self.encoder({column: list(texts) for column, texts in columns})["input_ids"]


class ChunkReader(Iterator[dict[str, torch.Tensor]]):
    """The chunks of one worker of the stream's rank, from the start on or from a loaded position."""

    def __init__(self, stream: StreamedTokenChunks, worker: int, num_workers: int) -> None:
        self.stream = stream
        # what has to be equal for a position to mean the same
        self.layout = {
            "files": len(stream.files),
            "shuffle_buffer": stream.shuffle_buffer,
            "seed": stream.seed,
            "stream_tokens": stream.layout.stream_tokens,
            "text_lengths": list(stream.encoder.lengths),
            "rank": stream.rank,
            "world_size": stream.world_size,
            "worker": worker,
            "num_workers": num_workers,
        }
        self.reader = stream.rank * num_workers + worker
        self.num_readers = stream.world_size * num_workers
        self.position = StreamPosition()
        self._chunks = self._read()

    def __next__(self) -> dict[str, torch.Tensor]:
        return next(self._chunks)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last chunk given, and the layout that it belongs to."""
        return {"layout": self.layout, "position": asdict(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position; ValueError where it does not fit this stream."""
        here = self.layout
        differing = [
            f"{name}={here[name]} (saved: {saved})" for name, saved in state["layout"].items() if here[name] != saved
        ]
        if differing:
            raise ValueError(
                f"The saved position is of a stream with another layout: {', '.join(differing)}. Its shares and its "
                "order follow from these; resume with the saved ones, or start a new run."
            )
        self.position = StreamPosition(**state["position"])

    def documents(self) -> Iterator[Document]:
        """The rest of the share of an epoch, in the order of the files, from the start of the position's block on."""
        files = self.stream.files
        order = np.arange(len(files))
        if self.stream.shuffle_buffer > 0:
            order = np.random.default_rng([self.stream.seed, self.position.epoch]).permutation(order)
        share = reader_share(len(files), self.reader, self.num_readers)
        first_part, start = self.position.part, self.position.row  # the position moves on between two documents
        for part, (place, residues) in enumerate(share[first_part:], first_part):
            for row, texts in files.read(int(order[place]), start, residues, self.num_readers):
                yield Document(texts, part, row + 1)
            start = 0

    def _read(self) -> Iterator[dict[str, torch.Tensor]]:
        if torch.utils.data.get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # or a forked worker would wait for its parent's download thread for ever
        position, size = self.position, self.stream.layout.stream_tokens
        for block in self._blocks():
            for start in range(position.document, len(block), TOKENIZED_DOCUMENTS):
                for document in self.stream.encode(block[start : start + TOKENIZED_DOCUMENTS]):
                    tokens = position.waiting + document
                    whole = len(tokens) // size
                    for chunk in range(position.chunks, whole):
                        position.chunks = chunk + 1
                        yield self.stream.layout.assemble(np.array(tokens[chunk * size : (chunk + 1) * size]))
                    position.waiting = tokens[whole * size :]
                    position.chunks = 0
                    position.document += 1

    def _blocks(self) -> Iterator[list[tuple[str, ...]]]:
        """Permuted texts of block after block, epoch after epoch. Moves the position from one block to the next."""
        position, size = self.position, self.stream.shuffle_buffer or TOKENIZED_DOCUMENTS
        empty_epochs = 0
        while empty_epochs < MAX_EMPTY_EPOCHS:
            documents = self.documents()
            while block := list(islice(documents, size)):
                texts = [document.texts for document in block]
                if self.stream.shuffle_buffer > 0:
                    # + 1, since a seed of zeros at its end is the seed without them, here that of the files' order
                    key = [self.stream.seed, position.epoch, self.reader + 1, position.block]
                    texts = [texts[index] for index in np.random.default_rng(key).permutation(len(texts))]
                yield texts
                position.block += 1
                position.part, position.row = block[-1].part, block[-1].next_row
                position.document = 0
            empty_epochs = empty_epochs + 1 if position.block == 0 else 0
            position.epoch += 1
            position.part = position.row = position.block = 0
        raise ValueError(
            f"Reader {self.reader + 1} of {self.num_readers} ({self.stream.world_size} ranks × "
            f"{self.layout['num_workers']} workers) found no text in its share of {MAX_EMPTY_EPOCHS} epochs. Use more "
            "text, fewer ranks or workers, or streaming=false."
        )
