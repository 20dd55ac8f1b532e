"""Chunks of L tokens cut from one stream of documents, at random access."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch


@dataclass(frozen=True)
class ChunkLayout:
    """What a chunk is made of: L tokens of the stream, or with `markers` (BOS, EOS): BOS + L-2 tokens + EOS.

    Raises:
        ValueError: `sequence_length` leaves no room for a token of the stream.
    """

    sequence_length: int
    markers: tuple[int, int] | None = None

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
        """`tokens` (stream_tokens,) → `{"input_ids": int64 (L,)}`."""
        if self.markers is not None:
            tokens = np.pad(tokens, 1, constant_values=self.markers)
        return {"input_ids": torch.from_numpy(tokens.astype(np.int64))}  # (L,)


class TokenChunks(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Chunk i holds tokens [i·n, (i+1)·n) of the concatenated documents, n = `layout.stream_tokens`.

    The documents stay where they are, in memory-mapped Arrow record batches; a chunk is copied out of the one or two
    batches that it lies in, found by bisection. Nothing is lost but the tail that fills no chunk. Workers of a
    `DataLoader` share the mapping, whether forked or spawned.

    Args:
        documents: one row a document, column `input_ids` of lists of int32.
        layout: what a chunk is made of.
    """

    def __init__(self, documents: datasets.Dataset, layout: ChunkLayout) -> None:
        self.documents = documents
        self.layout = layout
        self._map_record_batches()

    def _map_record_batches(self) -> None:
        column = self.documents.data.column("input_ids")
        # flatten() is the values buffer between the batch's first and last offset, without a copy.
        self._batches = [lists.flatten().to_numpy(zero_copy_only=True) for lists in column.chunks]
        lengths = [len(tokens) for tokens in self._batches]
        self._starts = np.cumsum([0, *lengths], dtype=np.int64)  # (batches + 1,) position in the stream

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, its tail included."""
        return int(self._starts[-1])

    def __len__(self) -> int:
        return self.num_tokens // self.layout.stream_tokens

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`{"input_ids": int64 (L,)}`. Negative indices count from the end; IndexError past either end."""
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"chunk {index} of {length}")
        start = int(index) % length * self.layout.stream_tokens
        return self.layout.assemble(self._tokens_between(start, start + self.layout.stream_tokens))

    def _tokens_between(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        return np.concatenate(
            [
                batch[max(0, start - batch_start) : stop - batch_start]
                for batch, batch_start in zip(self._batches[first:last], self._starts[first:last], strict=True)
            ]
        )

    def __getstate__(self) -> dict[str, Any]:
        # `datasets` pickles the mapping as file names; arrays would be pickled as their contents.
        return {"documents": self.documents, "layout": self.layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map_record_batches()
