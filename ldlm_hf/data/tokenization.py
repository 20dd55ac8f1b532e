"""Documents → token ids, in parallel and cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets.fingerprint import Hasher

from .detokenizers import DETOKENIZERS
from .text_files import require_text, require_text_column


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
    """A batch of rows → the token ids of each text, with no special tokens but the end of the document.

    Attributes:
        tokenizer, text_column, detokenizer: see `DataSettings`.
        end_id: appended to each document, or None. Blank documents give no tokens at all.
        skip_missing_texts: a missing text (null) gives no tokens either, instead of an error.
    """

    tokenizer: PreTrainedTokenizerBase
    text_column: str = "text"
    detokenizer: str | None = None
    end_id: int | None = None
    skip_missing_texts: bool = False

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[list[int]]]:
        require_text_column(self.text_column, list(batch))
        texts = batch[self.text_column]
        if self.skip_missing_texts:
            texts = ["" if text is None else text for text in texts]
        for value in texts:
            require_text(self.text_column, value, "a row")
        if self.detokenizer is not None:
            texts = [DETOKENIZERS[self.detokenizer](text) for text in texts]
        # verbose=False: a document may well be longer than the model; it is cut into chunks afterwards.
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        end = [] if self.end_id is None else [self.end_id]
        return {"input_ids": [ids + end if text.strip() else [] for text, ids in zip(texts, encoded, strict=True)]}


def tokenize_documents(
    documents: datasets.Dataset,
    encoder: DocumentEncoder,
    num_proc: int | None,
    cache_dir: str | None,
) -> datasets.Dataset:
    """One row a document, column `input_ids`: lists of int32, in a file of the folder `ldlm_hf_tokens` of `cache_dir`
    (None: of the cache of `datasets`), which a second call with the same documents and tokenizer maps again.

    Raises:
        ValueError: the text column is missing or holds something else than text.
    """
    require_text_column(encoder.text_column, documents.column_names)
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ldlm_hf_tokens"
    folder.mkdir(parents=True, exist_ok=True)
    # The key is ours: a hash of the tokenizer object would miss, since it keeps the truncation of its last call.
    fingerprint = Hasher.hash(
        (
            CACHE_VERSION,
            documents._fingerprint,
            tokenizer_fingerprint(encoder.tokenizer),
            encoder.text_column,
            encoder.detokenizer,
            encoder.end_id,
            encoder.skip_missing_texts,
        )
    )
    return documents.select_columns(encoder.text_column).map(
        encoder,
        batched=True,
        num_proc=num_proc,
        remove_columns=[encoder.text_column],
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
