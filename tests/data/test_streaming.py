"""A stream is shared out whole and once, and goes on from a saved position as if it had never stopped."""

from __future__ import annotations

import gzip
import http.server
import io
import itertools
import json
import pickle
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from ldlm_hf.data import DataSettings, StreamedTokenChunks, load_corpora
from ldlm_hf.data.chunks import ChunkLayout
from ldlm_hf.data.streaming import MAX_EMPTY_EPOCHS, DocumentFiles, HeldOutTexts, reader_share
from ldlm_hf.data.tokenization import DocumentEncoder


LENGTH = 16
ENDINGS = (".jsonl", ".txt", ".parquet", ".txt.gz")


def write_files(folder: Path, parts: list[list[str]], ending: str) -> str:
    """Writes one file a part; returns the pattern that names them."""
    folder.mkdir(exist_ok=True)
    for number, texts in enumerate(parts):
        path = folder / f"part-{number}{ending}"
        if ending == ".parquet":
            datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path), batch_size=8)  # several row groups
        elif ending == ".jsonl":
            path.write_text("".join(json.dumps({"number": i, "text": text}) + "\n" for i, text in enumerate(texts)))
        else:
            data = "".join(f"{text}\n" for text in texts).encode()
            path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    return str(folder / f"part-*{ending}")


def split_unevenly(documents: list[str], count: int) -> list[list[str]]:
    """`count` parts in a row, the longer the later."""
    borders = [len(documents) * number**2 // count**2 for number in range(count + 1)]
    return [documents[start:stop] for start, stop in itertools.pairwise(borders)]


@pytest.fixture
def load_stream(tmp_path: Path, documents: list[str], word_tokenizer) -> Callable[..., StreamedTokenChunks]:
    """The stream of one rank over so many files of `documents`."""

    def load(
        num_files: int = 1, rank: int = 0, world_size: int = 1, length: int = LENGTH, **changes: Any
    ) -> StreamedTokenChunks:
        ending = ENDINGS[num_files % len(ENDINGS)]
        source = write_files(tmp_path / f"{num_files}-files", split_unevenly(documents, num_files), ending)
        settings = DataSettings(source=source, streaming=True, cache_dir=str(tmp_path / "cache"), **changes)
        return load_corpora(settings, word_tokenizer, length, rank, world_size).train

    return load


def tokens_of_epoch(stream: StreamedTokenChunks, epoch: int = 0, worker: int = 0, num_workers: int = 1) -> list[int]:
    """One reader's tokens of one epoch. The stream has chunks of one token, so that none lies across two epochs."""
    reader = stream.reader(worker, num_workers)
    tokens = []
    for chunk in reader:
        if reader.position.epoch > epoch:
            return tokens
        if reader.position.epoch == epoch:
            tokens += chunk["input_ids"].tolist()
    raise AssertionError("a stream has no end")


def take(chunks: Iterator[dict[str, torch.Tensor]], count: int) -> list[list[int]]:
    return [chunk["input_ids"].tolist() for chunk in itertools.islice(chunks, count)]


def saved_and_read_back(state: dict[str, Any]) -> dict[str, Any]:
    """A state after a checkpoint, which is read without unpickling code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("num_files", range(1, 8))
def test_shares_are_disjoint_complete_and_equal(num_files: int) -> None:
    for num_readers in range(1, 12):
        shares = [reader_share(num_files, reader, num_readers) for reader in range(num_readers)]
        slices = [[(place, residue) for place, residues in share for residue in residues] for share in shares]
        assert sorted(itertools.chain(*slices)) == list(itertools.product(range(num_files), range(num_readers)))
        assert {len(share) for share in slices} == {num_files}
        if num_files % num_readers == 0:
            assert all(residues == range(num_readers) for share in shares for _, residues in share)  # whole files


def test_unshuffled_stream_is_the_token_stream_again_and_again(load_stream, documents, stream_of) -> None:
    tokens = stream_of(documents)
    chunks = take(iter(load_stream(3, shuffle_buffer=0)), 3 * len(tokens) // LENGTH)
    assert list(itertools.chain(*chunks)) == (3 * tokens)[: len(chunks) * LENGTH]
    marked = take(iter(load_stream(3, shuffle_buffer=0, chunk_markers=True)), 50)
    assert {(chunk[0], chunk[-1]) for chunk in marked} == {(51, 52)}
    inner = itertools.chain(*(chunk[1:-1] for chunk in marked))
    assert list(inner) == (3 * tokens)[: 50 * (LENGTH - 2)]


@pytest.mark.parametrize("shuffle_buffer", [0, 7])
@pytest.mark.parametrize("num_files", range(1, 6))
def test_readers_take_every_document_once_an_epoch(
    load_stream, documents, stream_of, num_files, shuffle_buffer
) -> None:
    expected = Counter(stream_of(documents))
    for world_size, num_workers, epoch in ((1, 2, 0), (2, 1, 1), (3, 1, 0), (3, 2, 1)):
        seen: Counter[int] = Counter()
        for rank in range(world_size):
            stream = load_stream(num_files, rank, world_size, length=1, shuffle_buffer=shuffle_buffer)
            for worker in range(num_workers):
                seen += Counter(tokens_of_epoch(stream, epoch, worker, num_workers))
        assert seen == expected


def test_order_follows_seed_and_epoch(load_stream) -> None:
    def order(epoch: int, **changes: int) -> tuple[int, ...]:
        return tuple(tokens_of_epoch(load_stream(4, length=1, **{"shuffle_buffer": 10, **changes}), epoch))

    assert order(0) == order(0) and order(3) == order(3)
    orders = [order(0), order(1), order(2), order(0, seed=5), order(0, shuffle_buffer=0)]
    assert len(set(orders)) == len(orders)
    assert all(Counter(other) == Counter(orders[0]) for other in orders)


def test_every_block_of_every_epoch_has_a_permutation_of_its_own(word_tokenizer, tmp_path) -> None:
    source = write_files(tmp_path, [[f"w{number}" for number in range(50)]], ".txt")
    settings = DataSettings(source=source, streaming=True, shuffle_buffer=10, cache_dir=str(tmp_path / "cache"))
    stream = load_corpora(settings, word_tokenizer, 2).train
    words = [chunk[0] for chunk in take(iter(stream), 100)]
    blocks = [words[start : start + 10] for start in range(0, 100, 10)]  # five an epoch
    for index, block in enumerate(blocks):
        assert sorted(block) == list(range(index % 5 * 10, index % 5 * 10 + 10))
    assert len({tuple(word % 10 for word in block) for block in blocks}) == 10


def test_loader_workers_are_the_readers_in_turn(load_stream) -> None:
    stream = load_stream(3, shuffle_buffer=10)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    readers = [take(stream.reader(worker, 2), 40) for worker in range(2)]
    assert take(iter(loader), 80) == [chunk for pair in zip(*readers, strict=True) for chunk in pair]


@pytest.mark.parametrize("shuffle_buffer", [0, 7, 100])
@pytest.mark.parametrize("num_files", [1, 3, 5])
def test_a_restored_stream_gives_what_the_uninterrupted_one_gives(load_stream, num_files, shuffle_buffer) -> None:
    generator = random.Random(num_files)
    for world_size, num_workers in ((1, 1), (3, 1), (2, 2)):
        rank, worker = generator.randrange(world_size), generator.randrange(num_workers)
        # chunks of 5 tokens: several of one document, and some of several documents
        stream = load_stream(num_files, rank, world_size, length=5, shuffle_buffer=shuffle_buffer)
        reader = stream.reader(worker, num_workers)
        states, chunks = [reader.state_dict()], []
        while reader.position.epoch < 2:
            chunks += take(reader, 1)
            states.append(reader.state_dict())
        for count in {0, len(chunks) - 1, *generator.sample(range(len(chunks)), 5)}:
            restored = stream.reader(worker, num_workers, saved_and_read_back(states[count]))
            assert take(restored, len(chunks) - count) == chunks[count:]
            assert restored.state_dict() == states[-1]


def test_iterating_again_begins_at_the_loaded_position(load_stream) -> None:
    stream = load_stream(2, shuffle_buffer=5)
    start = stream.state_dict()
    chunks = take(iter(stream), 20)
    state = stream.state_dict()
    assert take(iter(stream), 20) == chunks
    again = load_stream(2, shuffle_buffer=5)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert take(iter(again), 7) == take(itertools.islice(iter(stream), 20, None), 7)
    again.load_state_dict(start)
    assert take(iter(again), 20) == chunks
    assert take(iter(pickle.loads(pickle.dumps(again))), 20) == chunks  # as a spawned worker gets it


@dataclass(frozen=True)
class CountingEncoder(DocumentEncoder):
    """Counts the texts that are tokenised."""

    counts: list[int] = field(default_factory=list)

    def __call__(self, batch):
        self.counts.append(len(batch["text"]))
        return super().__call__(batch)


@dataclass(frozen=True)
class CountingSelection(HeldOutTexts):
    """Counts the texts that are taken out of the files."""

    counts: list[int] = field(default_factory=list)

    def __call__(self, text: str) -> bool:
        self.counts.append(1)
        return super().__call__(text)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_restore_takes_one_block_and_tokenises_less(ending, word_tokenizer, tmp_path) -> None:
    generator = random.Random(0)
    texts = [" ".join(f"w{generator.randrange(50)}" for _ in range(30)) for _ in range(5000)]
    source = write_files(tmp_path / "files", [texts], ending)
    settings = DataSettings(source=source, streaming=True, cache_dir=str(tmp_path / "cache"))
    rows = load_corpora(settings, word_tokenizer, LENGTH).train.files.rows

    def stream() -> StreamedTokenChunks:
        selection, encoder = CountingSelection(seed=0, fraction=0.0), CountingEncoder(word_tokenizer, end_id=52)
        files = DocumentFiles(rows, held_out=selection)
        return StreamedTokenChunks(files, encoder, ChunkLayout(LENGTH), shuffle_buffer=300)

    first, second = stream(), stream()
    count = 4000 * 31 // LENGTH
    reader = iter(first)
    take(reader, count)
    assert sum(first.files.held_out.counts) > 4000
    second.load_state_dict(first.state_dict())
    assert take(iter(second), 10) == take(reader, 10)
    assert sum(second.files.held_out.counts) == 300
    assert sum(second.encoder.counts) <= 64


def test_state_is_a_few_numbers_even_within_a_long_document(load_stream, word_tokenizer, tmp_path) -> None:
    (tmp_path / "book.txt").write_text("w1 " * 100_000 + "\n")
    settings = DataSettings(source=str(tmp_path / "book.txt"), streaming=True, cache_dir=str(tmp_path / "cache"))
    stream = load_corpora(settings, word_tokenizer, LENGTH).train
    chunks = iter(stream)
    take(chunks, 3000)
    state = stream.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert len(state["position"]["waiting"]) < LENGTH
    assert len(json.dumps(state)) < 400


@pytest.mark.parametrize(
    ("num_files", "changes", "message"),
    [
        (3, {}, r"files=3 \(saved: 2\)"),
        (2, {"shuffle_buffer": 6}, r"shuffle_buffer=6 \(saved: 5\)"),
        (2, {"seed": 1}, r"seed=1 \(saved: 0\)"),
        (2, {"length": 8}, r"stream_tokens=8 \(saved: 16\)"),
        (2, {"rank": 1, "world_size": 2}, r"rank=1 \(saved: 0\), world_size=2 \(saved: 1\)"),
    ],
)
def test_a_position_of_another_layout_is_refused(load_stream, num_files, changes, message) -> None:
    state = load_stream(2, shuffle_buffer=5).state_dict()
    stream = load_stream(num_files, **{"shuffle_buffer": 5, **changes})
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match=f"another layout: {message}.*resume with the saved ones"):
        iter(stream)
    with pytest.raises(ValueError, match=r"num_workers=2 \(saved: 1\)"):
        load_stream(2, shuffle_buffer=5).reader(0, 2, state)


def test_ranks_with_little_text_go_on_for_ever(load_stream, documents) -> None:
    for rank in range(3):
        stream = load_stream(5, rank, 3, shuffle_buffer=5)  # parts of 1, 4, 7, 11 and 14 documents
        reader = iter(stream)
        take(reader, 200)
        assert reader.position.epoch >= 3


def test_a_reader_without_any_text_says_so(load_stream) -> None:
    stream = load_stream(1, shuffle_buffer=5)
    reader = stream.reader(37, 38)  # 37 documents
    with pytest.raises(ValueError, match=rf"Reader 38 of 38 \(1 ranks × 38 workers\).* {MAX_EMPTY_EPOCHS} epochs"):
        next(reader)
    assert len(take(stream.reader(36, 38), 1)) == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_holds_out_the_same_documents(load_stream, documents, stream_of, world_size) -> None:
    hold_out = {"holdout_fraction": 0.3, "holdout_selection": "random", "max_validation_documents": 1000}
    seen: Counter[int] = Counter()
    for rank in range(world_size):
        stream = load_stream(4, rank, world_size, length=1, **hold_out)
        seen += Counter(tokens_of_epoch(stream))
    rest = [text for text in documents if not HeldOutTexts(seed=0, fraction=0.3)(text)]
    assert 17 <= len(rest) <= 34
    assert seen == Counter(stream_of(rest))


def test_validation_part_holds_the_held_out_documents(word_tokenizer, documents, stream_of, tmp_path) -> None:
    settings = DataSettings(
        source=write_files(tmp_path, split_unevenly(documents, 3), ".txt"),
        streaming=True,
        holdout_fraction=0.3,
        holdout_selection="random",
        max_validation_documents=1000,
        cache_dir=str(tmp_path / "cache"),
    )
    validation = load_corpora(settings, word_tokenizer, 1).validation
    held_out = [text for text in documents if HeldOutTexts(seed=0, fraction=0.3)(text)]
    assert [chunk["input_ids"].item() for chunk in validation] == stream_of(held_out)


# no time of the machine in it: its bytes name a test
CUT_OFF = gzip.compress(b"w1\n" * 1000, mtime=0)[:-9]
GOOD_ROWS = b'{"number": 0, "text": "w1"}\n' * 2


@pytest.mark.parametrize(
    ("ending", "data", "error", "message"),
    [
        (".jsonl", GOOD_ROWS + b'{"number": 0, "text": null}\n', ValueError, "row 2 of .*part-1.jsonl holds None"),
        (".jsonl", GOOD_ROWS + b'{"number": 0, "text": \n', OSError, "part-1.jsonl cannot be read beyond its row 0"),
        (".txt", b"w1\nw2 \xff\n", ValueError, "part-1.txt is not UTF-8: it holds the byte 0xff"),
        (".txt.gz", CUT_OFF, OSError, r"part-1.txt.gz cannot be .* row 0 \(OSError: Truncated compressed stream"),
        (".parquet", b"PAR1 no table PAR1", OSError, "part-1.parquet cannot be read beyond its row 0"),
    ],
)
def test_unreadable_rows_are_named(ending, data, error, message, word_tokenizer, documents, tmp_path) -> None:
    source = write_files(tmp_path / "files", [2 * documents, []], ending)
    (tmp_path / "files" / f"part-1{ending}").write_bytes(data)
    settings = DataSettings(source=source, streaming=True, shuffle_buffer=0, cache_dir=str(tmp_path / "cache"))
    stream = load_corpora(settings, word_tokenizer, LENGTH).train
    assert len(take(iter(stream), 10)) == 10
    with pytest.raises(error, match=message):
        take(iter(stream), 1000)


class UnreliableServer(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges of one text and breaks off in the middle of every second answer."""

    data = b""
    requests = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        if "Range" not in self.headers:  # asks whether there are byte ranges
            return self.do_HEAD()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = self.data[int(first) : int(last) + 1]
        type(self).requests += 1
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(self.data)}")
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if self.requests % 2 else part)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the test's output clean."""


@pytest.fixture
def unreliable_url(documents: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    UnreliableServer.data = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), UnreliableServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/corpus.jsonl"
        server.shutdown()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_connection_that_breaks_is_tried_again(
    num_workers, unreliable_url, documents, stream_of, word_tokenizer
) -> None:
    rows = datasets.load_dataset("json", data_files={"train": [unreliable_url]}, split="train", streaming=True)
    encoder = DocumentEncoder(word_tokenizer, end_id=52)
    stream = StreamedTokenChunks(DocumentFiles(rows), encoder, ChunkLayout(1))
    assert tokens_of_epoch(stream) == stream_of(documents)  # this process has a download thread before it forks
    expected = [take(stream.reader(worker, max(1, num_workers)), 30) for worker in range(max(1, num_workers))]
    requests = UnreliableServer.requests
    loader = DataLoader(stream, batch_size=None, num_workers=num_workers, timeout=60 if num_workers else 0)
    assert take(iter(loader), 30 * len(expected)) == [chunk for turn in zip(*expected, strict=True) for chunk in turn]
    assert UnreliableServer.requests > requests
