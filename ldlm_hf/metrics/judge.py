"""The judge: a pretrained causal language model that scores texts or gives features of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from evaluate.utils import logging
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ldlm_hf.loading.pretrained_sources import resolve_pretrained_source
from ldlm_hf.metrics.inputs import check_positive_int


@dataclass(frozen=True)
class Judge:
    """A loaded judge, to measure many sets with: a causal language model and the tokenizer that it was trained with.

    `name` is what results report it as. A model in training mode, or with fewer embeddings than the tokenizer has
    tokens, is a ValueError.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def __post_init__(self) -> None:
        if len(self.tokenizer) > self.num_embeddings:
            raise ValueError(
                f"`judge` {self.name!r}: its tokenizer has {len(self.tokenizer)} tokens and its model only "
                f"{self.num_embeddings} embeddings, so they do not belong together. Load both from the same place."
            )
        if self.model.training:
            raise ValueError(
                f"`judge` {self.name!r} is in training mode, where dropout makes every score random: "
                "call `model.eval()` first."
            )

    @property
    def num_embeddings(self) -> int:
        """The number of token ids that the model knows; some models pad it above their tokenizer's."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings

    @property
    def context_length(self) -> int | None:
        """The longest sequence, in tokens, that the model has positions for; `None` if it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def check_max_length(self, max_length: Any) -> int:
        """Returns `max_length` as an int; a `ValueError` if so many tokens do not fit into the judge's context."""
        max_length = check_positive_int("max_length", max_length)
        if self.context_length is not None and max_length > self.context_length:
            raise ValueError(
                f"`max_length` is {max_length}, but the judge {self.name!r} reads at most {self.context_length} "
                "tokens: lower it, or leave it out to use the judge's context."
            )
        return max_length

    def encode(self, texts: list[str], max_length: int | None) -> list[list[int]]:
        """The first `max_length` tokens of each text by the judge's tokenizer, without any special token added."""
        # Cut here: a tokenizer's own truncation may be set to cut on the left, and without it it warns of the length.
        sequences = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(sequence[:max_length]) for sequence in sequences]

    def batches(
        self, sequences: list[list[int]], batch_size: int, description: str
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Right-padded batches of sequences of similar length: their places (B), `input_ids`, `attention_mask` (B, L).

        The longest come first: a batch that does not fit into memory fails at once, and little of a batch is padding.
        """
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
        for start in logging.tqdm(range(0, len(order), batch_size), desc=description):
            indices = order[start : start + batch_size]
            rows = [torch.tensor(sequences[index], dtype=torch.long) for index in indices]
            # Any id will do as padding, for the positions after a sequence's end do not reach those before it.
            input_ids = pad_sequence(rows, batch_first=True, padding_value=0)  # (B, L)
            attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            yield indices, input_ids.to(self.model.device), attention_mask.to(self.model.device)

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: logits (B, L, V), and the last hidden state at each sequence's last token (B, D)."""
        seen: list[torch.Tensor] = []
        # what a causal model's forward gives is the logits alone
        hook = self.model.base_model.register_forward_hook(
            lambda module, inputs, output: seen.append(at_last_token(output.last_hidden_state, attention_mask))
        )
        with hook:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits, seen[0]


def at_last_token(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L, D) of right-padded sequences → (B, D)"""
    rows = torch.arange(len(hidden_states), device=hidden_states.device)
    return hidden_states[rows, attention_mask.sum(dim=1) - 1]


def load_judge(name: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Judge:
    """Loads a judge and its tokenizer.

    Args:
        name: Hub id, local folder, `package:NAME/FOLDER` or `package:NAME/FILE.gguf`; GGUF weights are dequantised.
        device: where to put it; `None` is CUDA where there is one, and the CPU elsewhere.
        dtype: of its weights; `None` is float32, for a lower precision changes the scores.

    Raises:
        ValueError: there is no such judge, or it is not a causal language model.
    """
    try:
        source = resolve_pretrained_source(name)
        tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **source.kwargs)
        model = AutoModelForCausalLM.from_pretrained(
            source.name_or_path, dtype=dtype or torch.float32, **source.kwargs
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`judge` {name!r} cannot be loaded: {error} A judge is a causal language model, named by its Hub id, a "
            "local folder, `package:NAME/FOLDER` or `package:NAME/FILE.gguf` of an installed Python package."
        ) from error
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]  # transformers wraps `Module.to` and loses its types
    return Judge(model.eval(), tokenizer, name)


def as_judge(judge: Any, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Judge:
    """The judge that an argument means: a name to load, a `Judge`, or a loaded pair `(model, tokenizer)`.

    All else is a ValueError, and so is `device` or `dtype` for one that is loaded already.
    """
    if isinstance(judge, str):
        return load_judge(judge, device, dtype)
    if device is not None or dtype is not None:
        raise ValueError(
            f"`device` is {device!r} and `dtype` is {dtype!r}, but the judge is already loaded: leave them out, or "
            "move and cast its model yourself."
        )
    if isinstance(judge, Judge):
        return judge
    if isinstance(judge, (tuple, list)) and len(judge) == 2:
        model, tokenizer = judge
        return Judge(model, tokenizer, name=model.name_or_path or type(model).__name__)
    raise ValueError(f"`judge` is {judge!r}, but it must be a name, a `Judge` or a pair (model, tokenizer).")
