"""Documents → token ids, in parallel and cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.fingerprint import Hasher

from .detokenizers import DETOKENIZERS
from .text_files import require_columns, require_text


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Part of the cache key: raise it when the same inputs begin to give other tokens.
CACHE_VERSION = 1


# What begins a chunk and what ends a document; the second is a BERT-type tokenizer's.
START_TOKENS = ("bos_token", "cls_token")
END_TOKENS = ("eos_token", "sep_token")


def special_id(tokenizer: PreTrainedTokenizerBase, names: tuple[str, str], setting: str) -> int:
    """The id of the first of these special tokens. ValueError, naming the `setting` that needs it, without any."""
    for name in names:
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        f"{setting}=true needs a tokenizer with {names[0]} or {names[1]}, and {tokenizer.name_or_path!r} "
        f"({type(tokenizer).__name__}) has neither. Set one on the tokenizer, or set {setting}=false."
    )


@dataclass(frozen=True)
class DocumentEncoder:
    """A batch of rows → the token ids of each document, with no special tokens but those that end its texts.

    Attributes:
        tokenizer, columns, detokenizer: see `DataSettings`.
        end_id: what a text ends with, or None. A document with a blank text gives no tokens at all.
        skip_missing_texts: one whose text is missing (null) gives no tokens either, instead of an error.
        lengths: of the texts of each column in tokens, which are cut there or filled up with `end_id`. Without any,
            documents have one text of any length, behind which stands one `end_id`.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: Mapping[str, str] = field(default_factory=lambda: {"text_column": "text"})
    detokenizer: str | None = None
    end_id: int | None = None
    skip_missing_texts: bool = False
    lengths: tuple[int, ...] = ()

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        require_columns(self.columns, batch)
        texts = [self.texts(setting, column, batch[column]) for setting, column in self.columns.items()]
        parts = [self.encode(some) for some in texts]
        return {
            "input_ids": [
                self.document(*of_row) if all(map(str.strip, texts_of_row)) else []
                for texts_of_row, of_row in zip(zip(*texts, strict=True), zip(*parts, strict=True), strict=True)
            ]
        }

    def document(self, *parts: list[int]) -> list[int]:
        """The tokens of a document, of those of the text of each column."""
        end = [] if self.end_id is None else [self.end_id]
        if not self.lengths:
            return parts[0] + end
        filled = [(ids + end * length)[:length] for ids, length in zip(parts, self.lengths, strict=True)]
        return list(chain(*filled))

    def texts(self, setting: str, column: str, values: list[Any]) -> list[str]:
        """The texts of a column, missing ones as blank ones where they are to be skipped."""
        if self.skip_missing_texts:
            values = ["" if value is None else value for value in values]
        for value in values:
            require_text(setting, column, value, "a row")
        return values if self.detokenizer is None else [DETOKENIZERS[self.detokenizer](value) for value in values]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The token ids of texts."""
        # verbose=False: a document may well be longer than the model; it is cut afterwards.
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def tokenize_documents(
    documents: datasets.Dataset,
    encoder: DocumentEncoder,
    num_proc: int | None,
    cache_dir: str | None,
) -> datasets.Dataset:
    """One row a document, column `input_ids`: lists of int32, in a file of the folder `ldlm_hf_tokens` of `cache_dir`
    (None: of the cache of `datasets`), which a second call with the same documents and tokenizer maps again.

    Raises:
        ValueError: a column is missing or holds something else than text.
    """
    require_columns(encoder.columns, documents.column_names)
    columns = list(encoder.columns.values())
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ldlm_hf_tokens"
    folder.mkdir(parents=True, exist_ok=True)
    # The key is ours: a hash of the tokenizer object would miss, since it keeps the truncation of its last call.
    fingerprint = Hasher.hash(
        (
            CACHE_VERSION,
            documents._fingerprint,
            tokenizer_fingerprint(encoder.tokenizer),
            *columns,
            encoder.detokenizer,
            encoder.end_id,
            encoder.skip_missing_texts,
            *encoder.lengths,
        )
    )
    return documents.select_columns(columns).map(
        encoder,
        batched=True,
        num_proc=num_proc,
        remove_columns=columns,
        features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        load_from_cache_file=True,
        desc="Tokenising",
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that encode alike, also across processes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    state = json.loads(backend.to_str())
    for name in ("truncation", "padding"):
        state.pop(name, None)
    return Hasher.hash(json.dumps(state, sort_keys=True))
