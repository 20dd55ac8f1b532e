from __future__ import annotations

import copy
import logging
import os
import pickle
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldlm_hf.data import DataSettings, TokenChunks, load_corpora
from ldlm_hf.data.chunks import ChunkLayout


LENGTH = 16
IDS = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})


def chunk_corpus(corpus: datasets.Dataset, tokenizer, length: int, settings: DataSettings) -> TokenChunks:
    folder = tempfile.mkdtemp(dir=settings.cache_dir)
    corpus.save_to_disk(folder)
    return load_corpora(replace(settings, source=folder), tokenizer, length).train


@pytest.mark.parametrize("num_proc", [None, 2])
def test_chunks_are_the_token_stream_without_its_tail(
    documents, word_tokenizer, stream_of, tokens_of, tmp_path, num_proc
):
    corpus = datasets.Dataset.from_dict({"text": documents})
    settings = DataSettings(num_proc=num_proc, cache_dir=str(tmp_path))
    chunks = chunk_corpus(corpus, word_tokenizer, LENGTH, settings)

    stream = stream_of(documents)
    assert len(stream) % LENGTH != 0  # there is a tail
    assert chunks.num_tokens == len(stream)
    assert len(chunks) == len(stream) // LENGTH
    assert tokens_of(chunks) == stream[: len(chunks) * LENGTH]
    assert all(chunk["input_ids"].shape == (LENGTH,) and chunk["input_ids"].dtype == torch.int64 for chunk in chunks)


@pytest.mark.parametrize("sequence_length", [1, 3, 7, 64])
def test_chunks_cross_record_batches_of_any_size(sequence_length):
    generator = random.Random(sequence_length)
    parts, stream = [], []
    for _ in range(30):
        lists = [generator.choices(range(1000), k=generator.choice([0, 0, 1, 2, 50])) for _ in range(3)]
        parts.append(datasets.Dataset.from_dict({"input_ids": lists}, features=IDS))
        stream += [token for tokens in lists for token in tokens]
    chunks = TokenChunks(datasets.concatenate_datasets(parts), ChunkLayout(sequence_length))

    order = list(range(len(chunks)))
    generator.shuffle(order)
    for index in order:
        expected = stream[index * sequence_length : (index + 1) * sequence_length]
        assert chunks[index]["input_ids"].tolist() == expected
    assert len(chunks) == len(stream) // sequence_length


def test_marked_chunks_are_bos_stream_eos(documents, word_tokenizer, stream_of, tmp_path):
    corpus = datasets.Dataset.from_dict({"text": documents})
    settings = DataSettings(chunk_markers=True, cache_dir=str(tmp_path))
    chunks = chunk_corpus(corpus, word_tokenizer, LENGTH, settings)
    table = torch.stack([chunk["input_ids"] for chunk in chunks])  # (chunks, L)

    stream = stream_of(documents)
    assert table.shape == (len(stream) // (LENGTH - 2), LENGTH)
    assert set(table[:, 0].tolist()) == {51} and set(table[:, -1].tolist()) == {52}
    assert table[:, 1:-1].flatten().tolist() == stream[: len(table) * (LENGTH - 2)]


def test_without_eos_the_stream_is_the_words_alone(documents, word_tokenizer, stream_of, tokens_of, tmp_path):
    corpus = datasets.Dataset.from_dict({"text": documents})
    settings = DataSettings(append_eos=False, cache_dir=str(tmp_path))
    chunks = chunk_corpus(corpus, word_tokenizer, LENGTH, settings)
    stream = [token for token in stream_of(documents) if token != 52]
    assert tokens_of(chunks) == stream[: len(chunks) * LENGTH]


def test_blank_documents_give_no_tokens(documents, word_tokenizer, stream_of, tokens_of, tmp_path):
    corpus = datasets.Dataset.from_dict({"text": ["", *documents, " \t "]})
    chunks = chunk_corpus(corpus, word_tokenizer, LENGTH, DataSettings(cache_dir=str(tmp_path)))
    assert chunks.num_tokens == len(stream_of(documents))


def test_detokenizer_is_applied_before_the_tokenizer(word_tokenizer, tmp_path):
    corpus = datasets.Dataset.from_dict({"text": ["w1 $ w2"]})  # `$ w2` becomes `$w2`; the tokenizer splits it again
    for detokenizer, text in ((None, "w1 $ w2"), ("lm1b", "w1 $w2")):
        settings = DataSettings(detokenizer=detokenizer, cache_dir=str(tmp_path))
        chunks = chunk_corpus(corpus, word_tokenizer, 4, settings)
        assert chunks[0]["input_ids"].tolist() == [*word_tokenizer(text)["input_ids"], 52]


def test_index_bounds(documents, word_tokenizer, tmp_path):
    corpus = datasets.Dataset.from_dict({"text": documents})
    chunks = chunk_corpus(corpus, word_tokenizer, LENGTH, DataSettings(cache_dir=str(tmp_path)))
    assert torch.equal(chunks[-1]["input_ids"], chunks[len(chunks) - 1]["input_ids"])
    assert torch.equal(chunks[np.int64(2)]["input_ids"], chunks[2]["input_ids"])
    for index in (len(chunks), -len(chunks) - 1):
        with pytest.raises(IndexError, match=str(len(chunks))):
            chunks[index]


def test_pickled_chunks_map_the_file_again(state_of_the_union: Path, bert_tokenizer, tmp_path):
    settings = DataSettings(source=str(state_of_the_union), train_split="train[:20]", cache_dir=str(tmp_path))
    chunks = load_corpora(settings, bert_tokenizer, 128).train
    pickled = pickle.dumps(chunks)
    assert len(pickled) < chunks.num_tokens / 10  # file names, not tokens
    mapped_again = pickle.loads(pickled)
    assert len(mapped_again) == len(chunks)
    assert torch.equal(mapped_again[7]["input_ids"], chunks[7]["input_ids"])


def test_loader_workers_read_the_same_chunks(corpus_file, word_tokenizer, tokens_of, tmp_path):
    settings = DataSettings(source=str(corpus_file), cache_dir=str(tmp_path / "cache"))
    chunks = load_corpora(settings, word_tokenizer, LENGTH).train
    loader = DataLoader(chunks, batch_size=4, num_workers=2)
    assert [token for batch in loader for token in batch["input_ids"].flatten().tolist()] == tokens_of(chunks)


def cache_entries(folder: Path) -> set[tuple[str, int]]:
    """Name and inode of each file: a file that is built again gets another inode."""
    return {(str(path), os.stat(path).st_ino) for path in folder.rglob("*.arrow")}


def test_second_call_tokenises_nothing(corpus_file, build_word_tokenizer, tokens_of, tmp_path):
    cache = tmp_path / "cache"
    settings = DataSettings(source=str(corpus_file), holdout_documents=5, cache_dir=str(cache))
    tokenizer = build_word_tokenizer(eos_token="[EOS]", pad_token="[PAD]")
    first = load_corpora(settings, tokenizer, LENGTH)
    entries = cache_entries(cache)
    # Another tokenizer object, whose state a padded call has changed, another length and another number of processes.
    tokenizer = build_word_tokenizer(eos_token="[EOS]", pad_token="[PAD]")
    tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=2)
    second = load_corpora(settings, tokenizer, LENGTH)
    load_corpora(DataSettings(**{**vars(settings), "num_proc": 2}), tokenizer, 2 * LENGTH)
    assert cache_entries(cache) == entries
    assert tokens_of(second.train) == tokens_of(first.train)


def test_changed_text_tokenizer_or_setting_is_tokenised_anew(
    corpus_file, documents, build_word_tokenizer, word_tokenizer, stream_of, tokens_of, tmp_path
):
    settings = DataSettings(source=str(corpus_file), cache_dir=str(tmp_path / "cache"))
    before = load_corpora(settings, word_tokenizer, LENGTH).train
    without_eos = load_corpora(DataSettings(**{**vars(settings), "append_eos": False}), word_tokenizer, LENGTH).train
    assert without_eos.num_tokens == before.num_tokens - len(documents)

    other = build_word_tokenizer(eos_token="[END]")  # its EOS is 51
    shifted = load_corpora(settings, other, LENGTH).train
    assert tokens_of(shifted) == [51 if token == 52 else token for token in tokens_of(before)]

    changed = [*documents[1:], "w1 w2 w3"]
    corpus_file.write_text("\n".join(changed), encoding="utf-8")
    after = load_corpora(settings, word_tokenizer, LENGTH).train
    assert tokens_of(after) == stream_of(changed)[: len(after) * LENGTH]


def test_long_documents_of_a_bert_type_tokenizer(state_of_the_union, bert_tokenizer, tmp_path, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)  # its records do not reach the root logger
    bert_tokenizer = copy.deepcopy(bert_tokenizer)
    bert_tokenizer.deprecation_warnings = {}  # it warns once in its life
    settings = DataSettings(
        source=str(state_of_the_union),
        train_split="train[:6]",
        validation_split="train[6:8]",
        chunk_markers=True,
        cache_dir=str(tmp_path),
    )
    try:
        corpora = load_corpora(settings, bert_tokenizer, 128)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "longer than" not in caplog.text
    rows = torch.stack([chunk["input_ids"] for chunk in corpora.train])  # (chunks, L)
    assert corpora.train.num_tokens > 6 * bert_tokenizer.model_max_length  # so that the warning was due
    assert set(rows[:, 0].tolist()) == {bert_tokenizer.cls_token_id}
    assert set(rows[:, -1].tolist()) == {bert_tokenizer.sep_token_id}
    inner = rows[:, 1:-1]
    assert not (inner == bert_tokenizer.cls_token_id).any() and not (inner == bert_tokenizer.pad_token_id).any()
    assert (inner == bert_tokenizer.sep_token_id).sum() in (5, 6)  # one a document; the last may be in the tail
    assert bert_tokenizer.decode(corpora.train[0]["input_ids"]).startswith("[CLS] fellow - citizens of the senate")
