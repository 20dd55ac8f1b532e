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
from .sources import Rows, load_split
from .streaming import DocumentFiles, HeldOutTexts, StreamedTokenChunks
from .text_files import require_columns, with_fields
from .tokenization import END_TOKENS, START_TOKENS, DocumentEncoder, special_id, tokenize_documents


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass
class TextCorpora:
    """What a run reads: both parts give `{"input_ids": int64 (L,)}`, and of pairs `"given"`, bool (L,), which tells
    the source from the target.

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
    cutter = _ChunkCutter(settings, tokenizer, sequence_length)
    rows, names = load_split(settings, settings.train_split)
    validation: TokenChunks | None = None  # chunked first: it is the smaller part, so its errors come early
    if settings.validation_split is not None:
        validation = cutter.cut_validation(load_split(settings, settings.validation_split)[0])
    elif settings.holds_out:
        rows, held_out = hold_out(rows, settings)
        validation = cutter.cut_validation(held_out)
    if isinstance(rows, datasets.Dataset):
        return TextCorpora(cutter.cut(rows, "training part"), validation)

    selection = HeldOutTexts(settings.seed, settings.holdout_fraction) if settings.holds_out else None
    files = DocumentFiles(rows, settings.columns, selection, names, settings.skip_missing_texts)
    train = StreamedTokenChunks(
        files, cutter.encoder, cutter.layout, settings.shuffle_buffer, settings.seed, rank, world_size
    )
    part = "training part" if world_size == 1 else f"training part of rank {rank}"
    cutter.require_one_chunk(train.count_tokens(cutter.layout.stream_tokens), part)
    return TextCorpora(train, validation)


def load_held_out(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> TokenChunks:
    """The validation part of `load_corpora` alone: the training part is neither tokenised nor, where it can be told
    apart by its name, read.

    Raises:
        ValueError, OSError: as `load_corpora`; and the settings hold no text out.
    """
    settings.check_source()
    cutter = _ChunkCutter(settings, tokenizer, sequence_length)
    if settings.validation_split is not None:
        held_out, _ = load_split(settings, settings.validation_split)
    elif settings.holds_out:
        _, held_out = hold_out(load_split(settings, settings.train_split)[0], settings)
    else:
        raise ValueError(
            f"source={settings.source!r}: no text is held out. Set validation_split, holdout_documents or "
            "holdout_fraction, as in training."
        )
    return cutter.cut_validation(held_out)


def hold_out(documents: Rows, settings: DataSettings) -> tuple[Rows, Rows]:
    """Splits documents into (training, validation), both in the corpus' order. The training part of a stream still has
    the held-out texts, which its reader leaves out.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if isinstance(documents, datasets.IterableDataset):
        columns = settings.columns
        require_columns(columns, with_fields(next(iter(documents), dict.fromkeys(columns.values()))))
        held_out, column = HeldOutTexts(settings.seed, settings.holdout_fraction), next(iter(columns.values()))
        return documents, documents.filter(lambda row: held_out(with_fields(row)[column]))
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


class _ChunkCutter:
    """Documents → chunks of tokens, as the settings of a run say."""

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        end_id = special_id(tokenizer, END_TOKENS, "append_eos") if settings.append_eos else None
        markers = None
        if settings.chunk_markers:
            start_id = special_id(tokenizer, START_TOKENS, "chunk_markers")
            markers = (start_id, special_id(tokenizer, END_TOKENS, "chunk_markers"))
        self.settings = settings
        self.layout = ChunkLayout(sequence_length, markers, settings.source_length)
        # texts of separate documents are chunks already, so the stream of them is cut at their ends
        self.encoder = DocumentEncoder(
            tokenizer,
            settings.columns,
            settings.detokenizer,
            end_id,
            settings.skip_missing_texts,
            settings.text_lengths(sequence_length),
        )

    def cut(self, documents: datasets.Dataset, part: str) -> TokenChunks:
        """The chunks of a part; ValueError, which calls it `part`, where there is not one."""
        settings = self.settings
        if len(documents) == 0:
            raise ValueError(
                f"source={settings.source!r}: the {part} is empty, it holds no documents. "
                "Use more text or hold out more."
            )
        if settings.skip_missing_texts and (missing := _count_missing_texts(documents, settings)):
            counts = f"{missing:,} of the {len(documents):,} rows"
            logger.warning("source=%r: %s of the %s have no text and are skipped", settings.source, counts, part)
        tokens = tokenize_documents(documents, self.encoder, settings.num_proc, settings.cache_dir)
        chunks = TokenChunks(tokens, self.layout)
        self.require_one_chunk(chunks.num_tokens, part)
        return chunks

    def cut_validation(self, rows: Rows) -> TokenChunks:
        """The chunks of held-out rows, of the first `max_validation_documents`."""
        limit = self.settings.max_validation_documents
        if isinstance(rows, datasets.IterableDataset):
            rows = datasets.Dataset.from_list([with_fields(row) for row in islice(rows, limit)])
        elif limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        return self.cut(rows, "validation part")

    def require_one_chunk(self, num_tokens: int, part: str) -> None:
        """Raises ValueError where a part has fewer tokens than a chunk."""
        if num_tokens == 0:
            raise ValueError(
                f"source={self.settings.source!r}: the {part} is empty or blank, it gives no tokens. Use more text."
            )
        if num_tokens < self.layout.stream_tokens:
            raise ValueError(
                f"source={self.settings.source!r}: the {part} has {num_tokens} tokens, and one chunk of "
                f"sequence_length={self.layout.sequence_length} needs {self.layout.stream_tokens}. "
                "Use more text, a shorter sequence or another hold-out."
            )


def _count_missing_texts(documents: datasets.Dataset, settings: DataSettings) -> int:
    """Rows of which a text is missing."""
    require_columns(settings.columns, documents.column_names)
    columns = list(settings.columns.values())
    tables = documents.select_columns(columns).with_format("arrow").iter(batch_size=10_000)
    return sum(len(table) - len(table.drop_null()) for table in tables)
