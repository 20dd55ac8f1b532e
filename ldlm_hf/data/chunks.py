"""Chunks of L tokens cut from one stream of documents, at random access."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow
import torch
from datasets.table import InMemoryTable


@dataclass(frozen=True)
class ChunkLayout:
    """What a chunk is made of: L tokens of the stream, or with `markers` (BOS, EOS): BOS + L-2 tokens + EOS. Its first
    `source_length` tokens are given, where that is set.

    Raises:
        ValueError: `sequence_length` leaves no room for a token of the stream.
    """

    sequence_length: int
    markers: tuple[int, int] | None = None
    source_length: int | None = None

    def __post_init__(self) -> None:
        if self.stream_tokens < 1:
            raise ValueError(
                f"sequence_length={self.sequence_length}, chunk_markers={self.markers is not None}: no room for a "
                "token of text. Give at least 1, or 3 with markers."
            )

    @property
    def stream_tokens(self) -> int:
        """Tokens of the stream that one chunk takes."""
        return self.sequence_length - (0 if self.markers is None else 2)

    def assemble(self, tokens: np.ndarray) -> dict[str, torch.Tensor]:
        """`tokens` (stream_tokens,) → `{"input_ids": int64 (L,)}`, and with a source `"given"`: bool (L,)."""
        if self.markers is not None:
            tokens = np.pad(tokens, 1, constant_values=self.markers)
        item = {"input_ids": torch.from_numpy(tokens.astype(np.int64))}  # (L,)
        if self.source_length is not None:
            item["given"] = torch.arange(self.sequence_length) < self.source_length  # (L,)
        return item


class TokenChunks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Chunk i holds tokens [i·n, (i+1)·n) of the concatenated documents, n = `layout.stream_tokens`.

    The documents stay where they are, in memory-mapped Arrow record batches; a chunk is copied out of the one or two
    batches that it lies in. Nothing is lost but the tail that fills no chunk. Workers of a `DataLoader` share the
    mapping, whether forked or spawned.

    Args:
        documents: one row a document, column `input_ids` of lists of int32.
        layout: what a chunk is made of.
    """

    def __init__(self, documents: datasets.Dataset, layout: ChunkLayout) -> None:
        self.documents = documents
        self.layout = layout
        # flatten() is the values buffer between the batch's first and last offset, without a copy.
        batches = [lists.flatten() for lists in documents.data.column("input_ids").chunks]
        self._stream = InMemoryTable.from_arrays([pyarrow.chunked_array(batches, pyarrow.int32())], names=["tokens"])

    def __reduce__(self) -> tuple[type[TokenChunks], tuple[datasets.Dataset, ChunkLayout]]:
        # `datasets` pickles the mapping as file names; the stream would be pickled as its contents.
        return type(self), (self.documents, self.layout)

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, its tail included."""
        return self._stream.num_rows

    def __len__(self) -> int:
        return self.num_tokens // self.layout.stream_tokens

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """As [`ChunkLayout.assemble`] makes it. Negative indices count from the end; IndexError past either end."""
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"chunk {index} of {length}")
        return self.chunk_at(int(index) % length * self.layout.stream_tokens)

    def chunk_at(self, first_token: int) -> dict[str, torch.Tensor]:
        """The chunk that begins with a token of the stream, wherever it is: `{"input_ids": int64 (L,)}`."""
        tokens = self._stream.fast_slice(first_token, self.layout.stream_tokens)["tokens"]
        return self.layout.assemble(tokens.to_numpy())


class ShiftedChunks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Chunks by pairs (index, tokens that it begins later), of the same stream and as many; the last one ends with the
    stream.

    Args:
        chunks: those without a shift.
    """

    def __init__(self, chunks: TokenChunks) -> None:
        self.chunks = chunks
        self.num_shifts = chunks.layout.stream_tokens  # 0 is one of them

    def __getitem__(self, place: tuple[int, int]) -> dict[str, torch.Tensor]:
        (index, shift), size = place, self.num_shifts
        return self.chunks.chunk_at(min(index * size + shift, self.chunks.num_tokens - size))
