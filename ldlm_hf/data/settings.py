"""The `data:` section of a training configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ..loading.checks import check_settings
from .detokenizers import DETOKENIZERS


HOLDOUT_SELECTIONS = ("last", "first", "random")
DOCUMENTS = ("packed", "separate")


@dataclass
class DataSettings:
    """Which text, which part of it is held out, and how it becomes chunks of tokens.

    Attributes:
        source: required. A Hub dataset id; or a local file, folder or glob pattern of `.txt` (one document a line),
            `.jsonl`, `.json` or `.csv`, each also as `.gz` or `.zst`, `.parquet` or `.arrow`; or a folder written by
            `save_to_disk`. What exists under the name is read as it is named; it is a pattern only where nothing does.
        config_name: configuration of a Hub dataset or of a local folder that defines some.
        revision: branch, tag or commit of a Hub dataset.
        train_split: split to train on. Local files are one split, `train`; but a folder has those that all of its
            files name (`train.txt`, `test/part-1.parquet`), or that its README.md declares. Slices work too, unless
            streaming: `train[:-1000]`.
        validation_split: split to validate on. None: documents of the train split are held out, see the next settings.
        holdout_documents: how many documents of the train split are held out.
        holdout_fraction: the share of its documents, in [0, 1); give this or `holdout_documents`. With neither, and no
            `validation_split`, there is no validation part.
        holdout_selection: which ones: the `last` (OpenWebText's convention), the `first`, or a `random` draw.
            A stream has no last document and no count, so it takes `random` with `holdout_fraction` only: each
            document is held out or not by a hash of its text (of a pair, its source) and the seed, the same on every
            rank and worker.
        max_validation_documents: the validation part ends after that many documents; None: all of them. Required for
            the validation part of a stream, which is read into memory.
        text_column: column that holds the text; no other is read. `column.field` names a field of a column of
            objects (structs), here and in the next two.
        source_column: with `target_column`, for a corpus of pairs (translations, summaries), in place of
            `text_column`: what is given of a row, the target being written.
        target_column: what is written of a row.
        source_length: tokens of a source, which is cut there, or filled up with the end-of-text token (EOS, or SEP
            for a BERT-type tokenizer); the filling is given, too.
        target_length: tokens of a target, in the same way; both lengths together are the model's.
        skip_missing_texts: skip rows of which a text is missing (null) and say how many there were, at the end of
            each file of a stream; else the first one is an error.
        detokenizer: undoes the spaced punctuation of a corpus: `lm1b`. None: the text as it is.
        documents: `packed`, the paper's stream: documents one behind the other, cut into chunks of L tokens. Or
            `separate`: each document is one chunk, cut after L tokens or filled up with the end-of-text token, on
            which all losses are taken, too; a blank document gives no chunk. Pairs always are separate.
        append_eos: EOS (SEP for a BERT-type tokenizer) after each document, as MDLM's code does. A blank document
            gives no tokens, not even this one (ours).
        chunk_markers: MDLM's "wrap": each chunk is BOS + L-2 tokens + EOS (CLS and SEP for a BERT-type tokenizer). Off
            by default: the paper's wording fits chunks without them.
        streaming: read the training part as a stream, for corpora that do not fit on the disk. Its files are opened as
            they are read: what is wrong in the middle of one shows when the run comes there.
        shuffle_buffer: documents of a stream that are read and put in a random order at a time, by each rank and
            worker, besides the order of the files; 0: no shuffling (ours; the paper gives none).
        num_proc: processes that read and tokenise. None: this one; a fast tokenizer still uses all cores.
        cache_dir: where datasets and token streams are cached. None: the cache folder of `datasets`.
        seed: of the `random` hold-out and of the order of a stream.
    """

    source: str = ""
    config_name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    holdout_documents: int = 0
    holdout_fraction: float = 0.0
    holdout_selection: str = "last"
    max_validation_documents: int | None = None
    text_column: str = "text"
    source_column: str | None = None
    target_column: str | None = None
    source_length: int | None = None
    target_length: int | None = None
    skip_missing_texts: bool = False
    detokenizer: str | None = None
    documents: str = "packed"
    append_eos: bool = True
    chunk_markers: bool = False
    streaming: bool = False
    shuffle_buffer: int = 10_000
    num_proc: int | None = None
    cache_dir: str | None = None
    seed: int = 0

    @property
    def holds_out(self) -> bool:
        """Whether documents of the train split are set aside."""
        return self.holdout_documents > 0 or self.holdout_fraction > 0.0

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the settings that name them."""
        if self.source_column is None or self.target_column is None:
            return {"text_column": self.text_column}
        return {"source_column": self.source_column, "target_column": self.target_column}

    @property
    def has_pairs(self) -> bool:
        """Whether a row is a source, which is given, and a target."""
        return self.source_column is not None

    @property
    def is_separate(self) -> bool:
        """Whether a chunk is one document or pair, whose texts end at their first end-of-text token."""
        return self.has_pairs or self.documents == "separate"

    def text_lengths(self, sequence_length: int) -> tuple[int, ...]:
        """Tokens of the text of each column in a chunk of L; none where chunks are cut from a stream.

        Raises:
            ValueError: `source_length` and `target_length` are not L together.
        """
        if self.source_length is None or self.target_length is None:
            return (sequence_length,) if self.is_separate else ()
        if self.source_length + self.target_length != sequence_length:
            raise ValueError(
                f"data.source_length={self.source_length} and data.target_length={self.target_length} are "
                f"{self.source_length + self.target_length} tokens together, but model.sequence_length="
                f"{sequence_length}: make them equal."
            )
        return self.source_length, self.target_length

    def check_source(self) -> None:
        """Raises ValueError where no corpus is named. `load_corpora` calls it first."""
        if not self.source.strip():
            raise ValueError(
                f"source={self.source!r}: no corpus is named. Give a Hub dataset id, or a file, glob pattern or "
                "folder."
            )

    def __post_init__(self) -> None:
        check_settings(
            type(self).__init__,
            vars(self),
            holdout_documents="[0, inf)",
            holdout_fraction="[0, 1)",
            max_validation_documents="[1, inf)",
            shuffle_buffer="[0, inf)",
            num_proc="[1, inf)",
            seed="[0, inf)",
            source_length="[1, inf)",
            target_length="[1, inf)",
            documents=DOCUMENTS,
        )
        if self.holdout_selection not in HOLDOUT_SELECTIONS:
            raise ValueError(
                f"holdout_selection={self.holdout_selection!r} is unknown: choose from {list(HOLDOUT_SELECTIONS)}."
            )
        if self.detokenizer is not None and self.detokenizer not in DETOKENIZERS:
            raise ValueError(
                f"detokenizer={self.detokenizer!r} is unknown: choose from {sorted(DETOKENIZERS)}, or null for none."
            )
        if self.holdout_documents > 0 and self.holdout_fraction > 0.0:
            raise ValueError(
                f"holdout_documents={self.holdout_documents} and holdout_fraction={self.holdout_fraction} both ask "
                "for a hold-out part: give one of them."
            )
        if self.validation_split is not None and self.holds_out:
            raise ValueError(
                f"validation_split={self.validation_split!r} and a hold-out of train documents are both set: give "
                "one, or set holdout_documents and holdout_fraction to 0."
            )
        self._validate_documents()
        if self.streaming:
            self._validate_streaming()

    def _validate_documents(self) -> None:
        of_pairs = {
            name: getattr(self, name) for name in ("source_column", "target_column", "source_length", "target_length")
        }
        if any(value is None for value in of_pairs.values()) and any(value is not None for value in of_pairs.values()):
            listed = ", ".join(f"{name}={value!r}" for name, value in of_pairs.items())
            raise ValueError(f"{listed}: pairs need all four of these; give them, or none.")
        if self.has_pairs and self.source_column == self.target_column:
            raise ValueError(
                f"source_column={self.source_column!r} and target_column={self.target_column!r} are one column, so "
                "that a target is given with its source: name two."
            )
        for name, unfit in (("chunk_markers", True), ("append_eos", False)):
            if self.is_separate and getattr(self, name) is unfit:
                which = f"source_column={self.source_column!r}" if self.has_pairs else "documents='separate'"
                raise ValueError(
                    f"{name}={str(unfit).lower()} with {which}: each text is a chunk of its own, which end-of-text "
                    f"tokens fill up and nothing begins. Leave {name} out, or use documents=packed."
                )

    def _validate_streaming(self) -> None:
        if self.holdout_documents > 0 or (self.holds_out and self.holdout_selection != "random"):
            raise ValueError(
                f"streaming=true cannot hold out with holdout_documents={self.holdout_documents}, "
                f"holdout_selection={self.holdout_selection!r}: a stream has no last document and its first ones "
                "differ by rank. Use validation_split, or holdout_fraction with holdout_selection=random."
            )
        if (self.validation_split is not None or self.holds_out) and self.max_validation_documents is None:
            raise ValueError(
                "streaming=true with max_validation_documents=None: the validation part of a stream is read into "
                "memory. Set max_validation_documents, for example to 1000."
            )
