"""The order of training sequences depends on seed and position alone, and is resumed exactly."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from ldlm_hf.data import DataSettings, StreamedTokenChunks, load_corpora
from ldlm_hf.training.batches import TrainingBatches, global_rows


class Numbers(Dataset):
    """Item i is the sequence [i]."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([index])}


def number_batches(
    length: int = 50,
    batch_size: int = 12,
    device_batch_size: int = 12,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 1,
    num_workers: int = 0,
) -> TrainingBatches:
    return TrainingBatches(Numbers(length), batch_size, device_batch_size, rank, world_size, seed, num_workers)


def take(batches: Iterator[dict[str, torch.Tensor]], count: int) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in itertools.islice(batches, count)]


def saved_and_read_back(state: dict[str, Any]) -> dict[str, Any]:
    """A state after a checkpoint, which is read without unpickling code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# device_batch_size, world_size
SPLITS = ((12, 1), (6, 1), (1, 1), (6, 2), (3, 2), (2, 3), (1, 4))


@pytest.mark.parametrize(("device_batch_size", "world_size"), SPLITS)
def test_rows_of_passes_and_ranks_make_up_the_global_batch(device_batch_size: int, world_size: int) -> None:
    passes = range(12 // (device_batch_size * world_size))
    rows = [global_rows(index, rank, device_batch_size, world_size) for index in passes for rank in range(world_size)]
    assert list(itertools.chain(*rows)) == list(range(12))


@pytest.mark.parametrize(("device_batch_size", "world_size"), SPLITS)
def test_every_row_of_every_step_is_the_same_however_it_is_split(device_batch_size: int, world_size: int) -> None:
    expected = [list(itertools.chain(*rows)) for rows in take(number_batches(), 9)]  # two epochs of four steps
    ranks = [number_batches(50, 12, device_batch_size, rank, world_size) for rank in range(world_size)]
    passes = 12 // (device_batch_size * world_size)
    for step in range(9):
        batch = [-1] * 12
        for index, (rank, batches) in itertools.product(range(passes), enumerate(ranks)):
            for row, sequence in zip(
                global_rows(index, rank, device_batch_size, world_size),
                next(batches)["input_ids"][:, 0].tolist(),
                strict=True,
            ):
                batch[row] = sequence
        assert batch == expected[step]


def test_an_epoch_visits_every_sequence_at_most_once_and_epochs_and_seeds_differ() -> None:
    steps = take(number_batches(), 8)
    first, second = ([row[0] for batch in epoch for row in batch] for epoch in (steps[:4], steps[4:]))
    assert len(set(first)) == len(set(second)) == 48
    assert first != second
    assert take(number_batches(seed=2), 1) != take(number_batches(seed=1), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prepared_batches_that_nobody_consumed_come_after_a_restore(num_workers: int) -> None:
    batches = number_batches(num_workers=num_workers)
    expected = take(number_batches(), 11)
    assert take(batches, 6) == expected[:6]
    restored = number_batches(num_workers=num_workers)
    restored.load_state_dict(saved_and_read_back(batches.state_dict()))
    assert take(restored, 5) == take(batches, 5) == expected[6:]


def test_a_run_goes_on_with_other_ranks_and_passes() -> None:
    expected = take(number_batches(), 6)
    batches = number_batches(device_batch_size=3, rank=1, world_size=2)
    take(batches, 4 * 2)  # four steps of two passes
    for device_batch_size, world_size in SPLITS:
        ranks = [
            number_batches(device_batch_size=device_batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        rows = []
        for batches_of_rank in ranks:
            batches_of_rank.load_state_dict(batches.state_dict())
        for _ in range(12 // (device_batch_size * world_size)):
            rows += [row for batches_of_rank in ranks for row in next(batches_of_rank)["input_ids"].tolist()]
        assert rows == expected[4]


def test_positions_that_mean_something_else_are_refused() -> None:
    batches = number_batches(device_batch_size=3)
    next(batches)
    state = batches.state_dict()
    with pytest.raises(ValueError, match=r"num_sequences=40 \(saved: 50\), seed=0 \(saved: 1\)"):
        number_batches(length=40, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="sequences taken before=3 is no multiple of the 12 sequences of one pass"):
        number_batches().load_state_dict(state)


def test_batch_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 7 sequences, fewer than the 8.*lower loop.batch_size=8"):
        number_batches(7, 8, 4, 0, 2)
    with pytest.raises(ValueError, match=r"loop.batch_size=12 is no multiple of the 10.*device_batch_size=5 × 2"):
        number_batches(50, 12, 5, 0, 2)


def test_loader_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert next(number_batches())["input_ids"].shape == (12, 1)
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def load_stream(tiny_tokenizer, tmp_path: Path) -> Callable[..., StreamedTokenChunks]:
    """The stream of one rank over two files of unequal length."""
    generator = random.Random(0)
    for number, documents in enumerate((5, 30)):
        lines = (" ".join(f"w{generator.randint(2, 39)}" for _ in range(20)) for _ in range(documents))
        (tmp_path / f"part-{number}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    settings = {"source": str(tmp_path / "part-*.txt"), "streaming": True, "cache_dir": str(tmp_path / "cache")}

    def load(rank: int = 0, world_size: int = 1, **changes: Any) -> StreamedTokenChunks:
        return load_corpora(
            DataSettings(**{**settings, "shuffle_buffer": 6, **changes}), tiny_tokenizer, 8, rank, world_size
        ).train

    return load


def stream_batches(stream: StreamedTokenChunks, num_workers: int, device_batch_size: int = 3) -> TrainingBatches:
    batch_size = device_batch_size * stream.world_size
    return TrainingBatches(stream, batch_size, device_batch_size, stream.rank, stream.world_size, 0, num_workers)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (2, 1), (3, 0), (3, 2)])
def test_a_stream_goes_on_exactly_after_every_kind_of_stop(load_stream, world_size: int, num_workers: int) -> None:
    rank = world_size - 1
    expected = take(stream_batches(load_stream(rank, world_size), num_workers), 40)
    assert len({str(batch) for batch in expected}) > 30
    generator = random.Random(num_workers)
    batches, done = stream_batches(load_stream(rank, world_size), num_workers), 0
    while done < 30:  # stopped and restored again and again
        count = generator.randint(0, 12)
        assert take(batches, count) == expected[done : done + count]
        done += count
        state = saved_and_read_back(batches.state_dict())
        assert take(batches, 1) == expected[done : done + 1]  # consumed, but lost in the crash
        batches = stream_batches(load_stream(rank, world_size), num_workers)
        batches.load_state_dict(state)
    assert take(batches, 40 - done) == expected[done:]


def test_workers_take_turns(load_stream) -> None:
    stream = load_stream()
    readers = [stream.reader(worker, 2) for worker in range(2)]
    for index, batch in enumerate(take(stream_batches(stream, 2), 20)):
        assert batch == [chunk["input_ids"].tolist() for chunk in itertools.islice(readers[index % 2], 3)]


def test_a_stream_refuses_another_layout(load_stream) -> None:
    batches = stream_batches(load_stream(), 2)
    take(batches, 3)
    state = batches.state_dict()
    with pytest.raises(ValueError, match=r"dataloader_workers=1, but .* 2 readers.*Set loop.dataloader_workers=2"):
        stream_batches(load_stream(), 1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"device_batch_size=6, but .* 3: the 2 workers.*device_batch_size=3"):
        stream_batches(load_stream(), 2, device_batch_size=6).load_state_dict(state)
    with pytest.raises(ValueError, match=r"world_size=2 \(saved: 1\)"):
        stream_batches(load_stream(0, 2), 2).load_state_dict(state)


def test_one_reader_goes_on_in_batches_of_another_size_and_in_a_worker(load_stream) -> None:
    expected = [row for batch in take(stream_batches(load_stream(), 0), 10) for row in batch]
    batches = stream_batches(load_stream(), 0)
    take(batches, 4)
    restored = stream_batches(load_stream(), 1, device_batch_size=6)
    restored.load_state_dict(batches.state_dict())
    assert [row for batch in take(restored, 3) for row in batch] == expected[12:]


def test_an_error_of_a_worker_is_told(load_stream, tmp_path: Path) -> None:
    batches = stream_batches(load_stream(shuffle_buffer=0, seed=3), 1)
    (tmp_path / "part-1.txt").write_bytes(b"w2 w3 \xff\n")
    with pytest.raises(ValueError, match=r"part-1.txt is not UTF-8"):
        take(batches, 100)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_shifted_chunks_are_pieces_of_the_text_that_begin_elsewhere_in_each_epoch(
    tmp_path: Path, tiny_tokenizer: Any, num_workers: int
) -> None:
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 39)}" for _ in range(90)]
    (tmp_path / "text.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    settings = DataSettings(source=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"))
    chunks = load_corpora(settings, tiny_tokenizer, 8).train
    stream = torch.cat([chunks.chunk_at(first)["input_ids"] for first in range(0, len(chunks) * 8, 8)])
    windows = {tuple(window.tolist()): first for first, window in enumerate(stream.unfold(0, 8, 1))}

    def batches() -> TrainingBatches:
        return TrainingBatches(chunks, 11, 11, 0, 1, 3, num_workers, shift_chunks=True)

    assert len(chunks) == 11
    epochs = [epoch["input_ids"] for epoch in itertools.islice(batches(), 12)]
    shifts = []
    for epoch in epochs:
        places = sorted(windows.get(tuple(chunk.tolist()), -1) for chunk in epoch)
        inside = [place for place in places if place >= 0]
        assert len(set(inside)) == len(inside) >= 10
        shifts.append({place % 8 for place in inside[:-1]})
    assert all(len(shift) == 1 for shift in shifts)
    assert len(set.union(*shifts)) > 3

    resumed = batches()
    position = batches()
    list(itertools.islice(position, 5))
    resumed.load_state_dict(saved_and_read_back(position.state_dict()))
    assert torch.equal(next(resumed)["input_ids"], epochs[5])


def test_a_stream_has_no_shifted_chunks(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "text.txt").write_text("w2 w3 w4 w5\n" * 9, encoding="utf-8")
    settings = DataSettings(source=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"), streaming=True)
    stream = load_corpora(settings, tiny_tokenizer, 8).train
    with pytest.raises(ValueError, match="shift_chunks"):
        TrainingBatches(stream, 2, 2, 0, 1, 0, shift_chunks=True)
