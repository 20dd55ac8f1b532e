"""Which sequences each step trains on: an order that depends on seed and position alone, so that it can be resumed.

torchdata's `StatefulDataLoader` saves the state of each worker, which only as many workers, ranks and sequences a pass
can load; here a position is one number, and a run at random access goes on with any of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from ..data import StreamedTokenChunks
from ..data.chunks import ShiftedChunks, TokenChunks


def global_rows(pass_index: int, rank: int, device_batch_size: int, world_size: int) -> range:
    """Rows of the global batch of an optimiser step that pass `pass_index` of a rank holds, in their order.

    Passes follow one another, and within a pass the ranks; so a row is the same one however a step is split.
    """
    first = (pass_index * world_size + rank) * device_batch_size
    return range(first, first + device_batch_size)


def text_digest(dataset: Dataset[dict[str, torch.Tensor]]) -> str:
    """Digest of 64 sequences, spread evenly over a data set.

    They are pieces of one stream of tokens, so what is put in or taken out shifts all that come after it.
    """
    digest = hashlib.sha256()
    for index in torch.linspace(0, len(dataset) - 1, 64, dtype=torch.float64).long().tolist():  # type: ignore[arg-type]
        digest.update(dataset[index]["input_ids"].numpy().tobytes())
    return digest.hexdigest()[:24]


class ShuffledSource:
    """Batches of one rank from a data set at random access, each epoch in a new order and, where its chunks can be
    `shifted`, cut at other places.

    An epoch is `num_sequences // batch_size` optimiser steps; what is left after them is left out, and comes at
    another place of the next epoch. Step s takes the same sequences in the same rows (`global_rows`) however many
    ranks and passes share it. Arguments and errors are those of [`TrainingBatches`].
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, torch.Tensor]],
        batch_size: int,
        device_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        loader_arguments: dict[str, Any],
        shifted: ShiftedChunks | None = None,
    ):
        self.dataset = dataset
        self.shifted = shifted
        self.num_sequences = len(dataset)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.device_batch_size = device_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.loader_arguments = loader_arguments
        self.pass_size = device_batch_size * world_size
        self.sequences_taken = 0  # by all ranks
        if self.num_sequences < batch_size:
            raise ValueError(
                f"The training text has {self.num_sequences} sequences, fewer than the {batch_size} of one optimiser "
                f"step; lower loop.batch_size={batch_size} or use more text."
            )
        self.check_divisible("loop.batch_size", batch_size)
        self.text_digest = text_digest(dataset)

    def check_divisible(self, name: str, sequences: int) -> None:
        """Raises ValueError where so many sequences are no whole number of passes."""
        if sequences % self.pass_size:
            raise ValueError(
                f"{name}={sequences} is no multiple of the {self.pass_size} sequences of one pass over all devices "
                f"(loop.device_batch_size={self.device_batch_size} × {self.world_size} devices). Change these."
            )

    def order(self) -> Iterator[list[int] | list[tuple[int, int]]]:
        """Endless batches of indices from the position on, each with its shift where chunks are shifted."""
        steps_per_epoch = self.num_sequences // self.batch_size
        order_epoch, order, shift = -1, torch.empty(0), 0
        for taken in itertools.count(self.sequences_taken, self.pass_size):
            step, row = divmod(taken, self.batch_size)
            epoch, index = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                # one stream of seeds for all runs of a project would give seed 0, epoch 1 the order of seed 1, epoch 0
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order_epoch, order = epoch, torch.randperm(self.num_sequences, generator=generator)
                if self.shifted is not None:
                    shift = int(torch.randint(self.shifted.num_shifts, (), generator=generator))
            rows = global_rows(row // self.pass_size, self.rank, self.device_batch_size, self.world_size)
            first = index * self.batch_size
            indices = order[first + rows.start : first + rows.stop].tolist()
            yield indices if self.shifted is None else [(index, shift) for index in indices]

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from the position on, which moves along."""
        for batch in DataLoader(self.shifted or self.dataset, batch_sampler=self.order(), **self.loader_arguments):
            self.sequences_taken += self.pass_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order follows from."""
        names = ("sequences_taken", "num_sequences", "batch_size", "seed", "text_digest")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a position. ValueError where the saved order is another one, or a pass would straddle it."""
        here = self.state_dict()
        differing = [
            f"{name}={here[name]} (saved: {saved})"
            for name, saved in state.items()
            if name != "sequences_taken" and here[name] != saved
        ]
        if differing:
            raise ValueError(
                f"The saved position is of another order of sequences: {', '.join(differing)}. Resume with the same "
                "text, loop.batch_size and loop.seed, or start a new run."
            )
        self.check_divisible("sequences taken before", state["sequences_taken"])
        self.sequences_taken = state["sequences_taken"]


class ReaderBatches(IterableDataset[tuple[dict[str, torch.Tensor], dict[str, Any]]]):
    """Batches of a rank's stream, each with the position of its reader after it.

    A `DataLoader` asks its worker 0 first, which therefore takes the reader `first`, whose turn it is.
    """

    def __init__(
        self, stream: StreamedTokenChunks, batch_size: int, states: list[dict[str, Any] | None], first: int
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.states = states
        self.first = first

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
        worker = get_worker_info()
        index = (self.first + (0 if worker is None else worker.id)) % len(self.states)
        reader = self.stream.reader(index, len(self.states), self.states[index])
        while True:
            yield default_collate([next(reader) for _ in range(self.batch_size)]), reader.state_dict()


class StreamSource:
    """Batches of a stream, whose readers, one a worker, take turns."""

    def __init__(self, stream: StreamedTokenChunks, batch_size: int, arguments: dict[str, Any]):
        self.stream = stream
        self.batch_size = batch_size
        self.arguments = arguments  # of DataLoader
        self.states: list[dict[str, Any] | None] = [None] * max(1, arguments["num_workers"])
        self.next_reader = 0

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from the position on, which moves along."""
        batches = ReaderBatches(self.stream, self.batch_size, list(self.states), self.next_reader)
        for batch, state in DataLoader(batches, batch_size=None, **self.arguments):
            self.states[self.next_reader] = state
            self.next_reader = (self.next_reader + 1) % len(self.states)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Position of each reader after the last of its batches that was consumed, and whose turn it is."""
        return {"readers": list(self.states), "next_reader": self.next_reader, "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a position. ValueError where it is of other ranks, workers or settings of the stream."""
        readers = len(state["readers"])
        if readers != len(self.states):
            raise ValueError(
                f"loop.dataloader_workers={self.arguments['num_workers']}, but the position was saved with {readers} "
                f"readers a device: each has a share of the stream of its own. Set loop.dataloader_workers={readers}."
            )
        if readers > 1 and state["batch_size"] != self.batch_size:
            raise ValueError(
                f"loop.device_batch_size={self.batch_size}, but the position was saved with {state['batch_size']}: "
                f"the {readers} workers take turns by batches. Set loop.device_batch_size={state['batch_size']}."
            )
        for worker, reader in enumerate(state["readers"]):
            self.stream.reader(worker, readers, reader)  # refuses a position of another layout
        self.states = list(state["readers"])
        self.next_reader = state["next_reader"]


class TrainingBatches(Iterator[dict[str, torch.Tensor]]):
    """Endless batches of one rank, of what an item holds: `{"input_ids": (B, L)}`, and of pairs `"given"` (B, L); its
    state is the position after the last one consumed.

    What workers have prepared and nobody has consumed is prepared again after a restore. Chunks at random access may
    be resumed with other numbers of ranks, workers and sequences a pass; the state is the same on all ranks. The state
    of a stream is the rank's own and is refused by another layout.

    Args:
        dataset: chunks at random access, or the rank's stream, whose order has a seed of its own.
        batch_size: sequences of one optimiser step over all ranks and passes.
        device_batch_size: B.
        num_workers: processes that prepare batches; 0: this one.
        shift_chunks: whether all chunks of an epoch begin some tokens later, as many as a random number says; not
            those of a stream.

    Raises:
        ValueError: too little text, batch sizes that do not divide, or a stream whose chunks should be shifted.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, torch.Tensor]],
        batch_size: int,
        device_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        num_workers: int = 0,
        shift_chunks: bool = False,
    ):
        # workers are seeded from here, so that the loader leaves the global random state alone
        arguments: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator().manual_seed(seed)}
        arguments["pin_memory"] = torch.cuda.is_available()
        shifted = None
        if shift_chunks:
            if not isinstance(dataset, TokenChunks):
                raise ValueError("loop.shift_chunks=true needs chunks at random access; a stream is cut once.")
            shifted = ShiftedChunks(dataset)
        self._source: StreamSource | ShuffledSource
        if isinstance(dataset, StreamedTokenChunks):
            self._source = StreamSource(dataset, device_batch_size, arguments)
        else:
            self._source = ShuffledSource(
                dataset, batch_size, device_batch_size, rank, world_size, seed, arguments, shifted
            )
        self._batches: Iterator[dict[str, torch.Tensor]] | None = None

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._batches is None:
            self._batches = self._source.batches()
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """The position, in whole numbers: under 20 kB a worker of a stream of L = 1024."""
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position; ValueError where it is of other text, another order or another layout."""
        self._source.load_state_dict(state)
        self._batches = None
