"""Training and validation chunks from the settings of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import datasets
import numpy as np

from .chunks import ChunkLayout, TokenChunks
from .settings import DataSettings
from .sources import load_documents, load_stream
from .streaming import DocumentFiles, HeldOutTexts, StreamedTokenChunks
from .text_files import require_text_column
from .tokenization import DocumentEncoder, chunk_start_id, document_end_id, tokenize_documents


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass
class TextCorpora:
    """What a run reads: both parts give `{"input_ids": int64 (L,)}`.

    Attributes:
        train: at random access, or a stream where `streaming` is set.
        validation: held-out documents at random access, in the corpus' order; also the real-text reference of the
            metrics. None where the settings ask for none.
    """

    train: TokenChunks | StreamedTokenChunks
    validation: TokenChunks | None


def load_corpora(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    rank: int = 0,
    world_size: int = 1,
) -> TextCorpora:
    """Loads, splits by documents, tokenises and chunks a corpus.

    Args:
        settings: see `DataSettings`.
        tokenizer: any tokenizer of transformers; its own length limit plays no part.
        sequence_length: L.
        rank, world_size: of this process. A stream gives each rank its own share; chunks at random access are all
            visible to every rank, and the sampler shares them out.

    Raises:
        ValueError, OSError: a wrong setting, an unreadable or unfit corpus, a part with fewer tokens than one chunk.
            The message names the setting, its value and the remedy.
    """
    settings.check_source()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}, world_size={world_size}: a rank is at least 0 and below world_size.")
    encoder, layout = _encoder_and_layout(settings, tokenizer, sequence_length)
    if settings.streaming:
        return _stream_corpora(settings, encoder, layout, rank, world_size)

    documents = load_documents(settings, settings.train_split, rank)
    validation_documents: datasets.Dataset | None = None
    if settings.validation_split is not None:
        validation_documents = load_documents(settings, settings.validation_split, rank)
    elif settings.holds_out:
        documents, validation_documents = hold_out(documents, settings)

    validation: TokenChunks | None = None
    if validation_documents is not None:  # first: it is the smaller part, so its errors come early
        validation = _chunk_validation(validation_documents, encoder, layout, settings)
    return TextCorpora(_chunk(documents, encoder, layout, "training part", settings), validation)


def load_held_out(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, sequence_length: int, rank: int = 0
) -> TokenChunks:
    """The validation part of `load_corpora` alone: the training part is neither tokenised nor, where it can be told
    apart by its name, read.

    Raises:
        ValueError, OSError: as `load_corpora`; and the settings hold no text out.
    """
    settings.check_source()
    encoder, layout = _encoder_and_layout(settings, tokenizer, sequence_length)
    if settings.validation_split is None and not settings.holds_out:
        raise ValueError(
            f"source={settings.source!r}: no text is held out. Set validation_split, holdout_documents or "
            "holdout_fraction, as in training."
        )
    if settings.streaming:
        rows, _ = load_stream(settings, settings.validation_split or settings.train_split)
        if settings.validation_split is None:
            rows, _ = _hold_out_of_stream(rows, settings)
        return _chunk_validation_stream(rows, encoder, layout, settings)
    documents = load_documents(settings, settings.validation_split or settings.train_split, rank)
    if settings.validation_split is None:
        _, documents = hold_out(documents, settings)
    return _chunk_validation(documents, encoder, layout, settings)


def chunk_corpus(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    settings: DataSettings | None = None,
    batch_size: int = 1000,
) -> TokenChunks:
    """Tokenises documents that are already loaded and cuts them into chunks.

    Args:
        documents: rows with the text.
        tokenizer: any tokenizer of transformers.
        sequence_length: L.
        settings: its text column, detokenizer, markers, processes and cache apply; `source` and the splits do not.
        batch_size: documents a call of the tokenizer; the chunks do not depend on it.

    Raises:
        ValueError: as `load_corpora`.
    """
    settings = settings or DataSettings()
    encoder, layout = _encoder_and_layout(settings, tokenizer, sequence_length)
    return _chunk(documents, encoder, layout, "corpus", settings, batch_size)


def _encoder_and_layout(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> tuple[DocumentEncoder, ChunkLayout]:
    end_id = document_end_id(tokenizer, "append_eos") if settings.append_eos else None
    markers = None
    if settings.chunk_markers:
        markers = (chunk_start_id(tokenizer, "chunk_markers"), document_end_id(tokenizer, "chunk_markers"))
    encoder = DocumentEncoder(
        tokenizer, settings.text_column, settings.detokenizer, end_id, settings.skip_missing_texts
    )
    return encoder, ChunkLayout(sequence_length, markers)


def hold_out(documents: datasets.Dataset, settings: DataSettings) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits documents into (training, validation), both in the corpus' order.

    Raises:
        ValueError: nothing would be left to train on.
    """
    total = len(documents)
    count = settings.holdout_documents or max(1, round(settings.holdout_fraction * total))
    if count >= total:
        raise ValueError(
            f"holdout_documents={settings.holdout_documents}, holdout_fraction={settings.holdout_fraction}: holding "
            f"out {count} of the {total} documents of source={settings.source!r} leaves nothing to train on. "
            "Hold out fewer."
        )
    if settings.holdout_selection == "first":
        return documents.select(range(count, total)), documents.select(range(count))
    if settings.holdout_selection == "last":
        return documents.select(range(total - count)), documents.select(range(total - count, total))
    drawn = np.zeros(total, dtype=bool)
    drawn[np.random.default_rng(settings.seed).choice(total, count, replace=False)] = True
    return documents.select(np.flatnonzero(~drawn)), documents.select(np.flatnonzero(drawn))


def _chunk_validation(
    documents: datasets.Dataset, encoder: DocumentEncoder, layout: ChunkLayout, settings: DataSettings
) -> TokenChunks:
    if settings.max_validation_documents is not None:
        documents = documents.select(range(min(settings.max_validation_documents, len(documents))))
    return _chunk(documents, encoder, layout, "validation part", settings)


def _chunk_validation_stream(
    rows: datasets.IterableDataset, encoder: DocumentEncoder, layout: ChunkLayout, settings: DataSettings
) -> TokenChunks:
    in_memory = datasets.Dataset.from_list(list(islice(rows, settings.max_validation_documents)))
    return _chunk(in_memory, encoder, layout, "validation part", settings)


def _hold_out_of_stream(
    rows: datasets.IterableDataset, settings: DataSettings
) -> tuple[datasets.IterableDataset, HeldOutTexts]:
    """The held-out rows of a stream, and what tells them from the others."""
    require_text_column(settings.text_column, list(next(iter(rows), {settings.text_column: ""})))
    held_out = HeldOutTexts(settings.seed, settings.holdout_fraction)
    return rows.filter(held_out, input_columns=settings.text_column), held_out


def _chunk(
    documents: datasets.Dataset,
    encoder: DocumentEncoder,
    layout: ChunkLayout,
    part: str,
    settings: DataSettings,
    batch_size: int = 1000,
) -> TokenChunks:
    if len(documents) == 0:
        raise ValueError(
            f"source={settings.source!r}: the {part} is empty, it holds no documents. Use more text or hold out more."
        )
    if settings.skip_missing_texts and (missing := _count_missing_texts(documents, settings.text_column)):
        logger.warning(
            "source=%r: %s of the %s rows of the %s have no text and are skipped",
            settings.source,
            f"{missing:,}",
            f"{len(documents):,}",
            part,
        )
    tokens = tokenize_documents(documents, encoder, settings.num_proc, settings.cache_dir, batch_size)
    chunks = TokenChunks(tokens, layout)
    _require_one_chunk(chunks.num_tokens, layout, part, settings)
    return chunks


def _count_missing_texts(documents: datasets.Dataset, text_column: str) -> int:
    require_text_column(text_column, documents.column_names)
    tables = documents.select_columns(text_column).with_format("arrow").iter(batch_size=10_000)
    return sum(table[text_column].null_count for table in tables)


def _require_one_chunk(num_tokens: int, layout: ChunkLayout, part: str, settings: DataSettings) -> None:
    if num_tokens == 0:
        raise ValueError(
            f"source={settings.source!r}: the {part} is empty or blank, it gives no tokens. Use more text."
        )
    if num_tokens < layout.stream_tokens:
        raise ValueError(
            f"source={settings.source!r}: the {part} has {num_tokens} tokens, and one chunk of "
            f"sequence_length={layout.sequence_length} needs {layout.stream_tokens}. "
            "Use more text, a shorter sequence or another hold-out."
        )


def _stream_corpora(
    settings: DataSettings, encoder: DocumentEncoder, layout: ChunkLayout, rank: int, world_size: int
) -> TextCorpora:
    rows, names = load_stream(settings, settings.train_split)
    held_out: HeldOutTexts | None = None
    validation_rows: datasets.IterableDataset | None = None
    if settings.validation_split is not None:
        validation_rows, _ = load_stream(settings, settings.validation_split)
    elif settings.holds_out:
        validation_rows, held_out = _hold_out_of_stream(rows, settings)

    validation: TokenChunks | None = None
    if validation_rows is not None:
        validation = _chunk_validation_stream(validation_rows, encoder, layout, settings)

    files = DocumentFiles(rows, settings.text_column, held_out, names, settings.skip_missing_texts)
    train = StreamedTokenChunks(files, encoder, layout, settings.shuffle_buffer, settings.seed, rank, world_size)
    part = "training part" if world_size == 1 else f"training part of rank {rank}"
    _require_one_chunk(train.count_tokens(layout.stream_tokens), layout, part, settings)
    return TextCorpora(train, validation)
