"""The `data:` section of a training configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ..loading.checks import check_settings
from .detokenizers import DETOKENIZERS


HOLDOUT_SELECTIONS = ("last", "first", "random")


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
            document is held out or not by a hash of its text and the seed, the same on every rank and worker.
        max_validation_documents: the validation part ends after that many documents; None: all of them. Required for
            the validation part of a stream, which is read into memory.
        text_column: column that holds the text; no other is read.
        skip_missing_texts: skip rows whose text is missing (null) and say how many there were, at the end of each
            file of a stream; else the first one is an error.
        detokenizer: undoes the spaced punctuation of a corpus: `lm1b`. None: the text as it is.
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
    skip_missing_texts: bool = False
    detokenizer: str | None = None
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
        if self.streaming:
            self._validate_streaming()

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
