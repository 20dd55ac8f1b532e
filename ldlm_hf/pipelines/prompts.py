"""Prompts, endings and texts with gaps as rows of tokens, of which some are given."""

from __future__ import annotations

import reprlib
import unicodedata
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GivenTokens:
    """Rows of L tokens, some of which are given.

    Attributes:
        sequences: token ids (B, L); those that are to be written say nothing.
        given: bool (B, L).
        lengths: tokens of each row that belong to its text; the model writes on behind them, and that is cut off.
    """

    sequences: torch.Tensor
    given: torch.Tensor
    lengths: list[int]

    @classmethod
    def of_rows(cls, rows: list[list[int | None]], sequence_length: int) -> GivenTokens:
        """Rows of at most L token ids, None where a token is to be written, filled up with tokens to be written."""
        filled = [row + [None] * (sequence_length - len(row)) for row in rows]
        return cls(
            torch.tensor([[0 if token is None else token for token in row] for row in filled]),
            torch.tensor([[token is not None for token in row] for row in filled]),
            [len(row) for row in rows],
        )

    def check(self, sequence_length: int) -> None:
        """Raises ValueError for rows that are not those of a model of L tokens."""
        sequences, given = self.sequences, self.given
        are_tensors = isinstance(sequences, torch.Tensor) and isinstance(given, torch.Tensor)
        if not are_tensors or sequences.ndim != 2 or sequences.shape[1] != sequence_length:
            raise ValueError(f"`given_tokens.sequences` must be token ids of shape (batch_size, {sequence_length}).")
        if given.shape != sequences.shape or given.dtype != torch.bool:
            raise ValueError(
                f"`given_tokens.given` must be bool of the shape of the sequences, {tuple(sequences.shape)}, got "
                f"{given.dtype} of shape {tuple(given.shape)}."
            )
        ends = self.ends_of_given
        fit = [end <= length <= sequence_length for end, length in zip(ends, self.lengths, strict=False)]
        if len(self.lengths) != len(sequences) or not all(fit):
            raise ValueError(
                f"`given_tokens.lengths`={reprlib.repr(self.lengths)} must be one for each of {len(sequences)} rows, "
                f"from the end of what is given, {reprlib.repr(ends)}, to {sequence_length}."
            )

    def repeat(self, times: int) -> GivenTokens:
        """Rows of which each comes so many times, one behind the other."""
        return GivenTokens(
            self.sequences.repeat_interleave(times, dim=0),
            self.given.repeat_interleave(times, dim=0),
            [length for length in self.lengths for _ in range(times)],
        )

    def __getitem__(self, rows: torch.Tensor) -> GivenTokens:
        """Some rows, by their indices (n,)."""
        return GivenTokens(self.sequences[rows], self.given[rows], [self.lengths[row] for row in rows.tolist()])

    @property
    def ends_of_given(self) -> list[int]:
        """The place behind the last given token of each row; 0 where none is given."""
        places = torch.arange(1, self.given.shape[1] + 1, device=self.given.device)
        return (self.given * places).amax(1).tolist()


def cut_rows(sequences: torch.Tensor, lengths: list[int], fill: int) -> torch.Tensor:
    """Token ids (B, L) cut to the rows' own lengths: (B, T), shorter rows filled up with the token `fill`."""
    longest = max(lengths)
    ends = torch.tensor(lengths, device=sequences.device)[:, None]
    behind = torch.arange(longest, device=sequences.device) >= ends
    return sequences[:, :longest].masked_fill(behind, fill)


def as_texts(name: str, texts: Any) -> list[str]:
    """The texts of an argument; ValueError unless it is a text or a list of at least one."""
    is_list = isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)
    if not (isinstance(texts, str) or is_list):
        raise ValueError(
            f"`{name}` must be a text or a list of at least one text, got {reprlib.repr(texts)}. How many are written "
            "without a prompt says batch_size."
        )
    return [texts] if isinstance(texts, str) else list(texts)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> list[int]:
    """Token ids of a text as it stands: what looks like a special token is text, too.

    Raises:
        ValueError: no string, or text that the tokenizer has no tokens for.
    """
    if not isinstance(text, str):
        raise ValueError(f"`{name}` must be a text or a list of texts, got {reprlib.repr(text)}.")
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise ValueError(f"`{name}` is no valid Unicode: it has half of a surrogate pair. {reprlib.repr(text)}")
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = encoded["input_ids"]
    is_unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    if is_unknown or (tokenizer.is_fast and loses_characters(text, encoded["offset_mapping"])):
        raise ValueError(
            f"`{name}` has characters or words that the tokenizer does not know, and would be lost: "
            f"{reprlib.repr(text)}. Leave them out."
        )
    return ids


def loses_characters(text: str, offsets: list[tuple[int, int]]) -> bool:
    """Whether a character of a text belongs to no token, other than spaces and accents that are written apart."""
    end = 0
    for first, last in [*offsets, (len(text), len(text))]:
        if any(not (one.isspace() or unicodedata.combining(one)) for one in text[end:first]):
            return True
        end = max(end, last)
    return False


def tokenize_suffix(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text behind another one: of a word with the space before it, where that is a part of its token.

    Raises:
        ValueError: as of [`tokenize`].
    """
    ids = tokenize(tokenizer, text, "suffix")
    if not text[:1].isalnum():
        return ids
    spaced = tokenize(tokenizer, f" {text}", "suffix")
    # other tokenizers put a space before every text by themselves
    return spaced if tokenize(tokenizer, f"{text} {text}", "suffix")[-len(spaced) :] == spaced else ids


def whole_characters(text: str) -> str:
    """A decoded text without the character at its end of which some bytes are still to come."""
    return text.rstrip("\ufffd")


def continued_rows(
    prompts: list[list[int]], suffixes: list[list[int]], sequence_length: int, max_new_tokens: int | None
) -> list[list[int | None]]:
    """Rows of a prompt, tokens to be written and a suffix, which ends the row, or stands behind `max_new_tokens`.

    Raises:
        ValueError: prompt and suffix leave no room, or less than was asked for.
    """
    rows: list[list[int | None]] = []
    for prompt, suffix in zip(prompts, suffixes, strict=True):
        room = sequence_length - len(prompt) - len(suffix)
        wanted = room if max_new_tokens is None else max_new_tokens
        if room < 1 or (suffix and wanted > room):
            parts = f"`prompt` has {len(prompt)} tokens" + (f" and `suffix` {len(suffix)}" if suffix else "")
            lacking = "no room for others" if room < 1 else f"room for {room} of the {wanted} to be written"
            raise ValueError(
                f"{parts}, which leaves {lacking}: this model's texts have {sequence_length} tokens. Shorten what is "
                "given."
            )
        rows.append([*prompt, *[None] * min(room, wanted), *suffix])
    return rows


def rows_with_gaps(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], gap: str, gap_tokens: int, sequence_length: int
) -> list[list[int | None]]:
    """Rows of texts with `gap_tokens` tokens to be written in the place of each gap marker.

    Raises:
        ValueError: a text without a gap, or too long.
    """
    if gap_tokens > sequence_length:
        raise ValueError(f"`gap_tokens`={gap_tokens} are more than this model's {sequence_length} tokens.")
    rows: list[list[int | None]] = []
    for text in texts:
        if gap not in text:
            raise ValueError(f"`gap`={gap!r} does not occur in {reprlib.repr(text)}; mark the gaps with it.")
        row: list[int | None] = []
        *before, last = text.split(gap)
        for part in before:
            # a space before a word is often a part of its token, and the gap writes its own
            row += [*tokenize(tokenizer, part.rstrip(" "), "texts"), *[None] * gap_tokens]
        row += tokenize(tokenizer, last, "texts")
        if len(row) > sequence_length:
            raise ValueError(
                f"{reprlib.repr(text)} with {text.count(gap)} gaps of `gap_tokens`={gap_tokens} has {len(row)} "
                f"tokens, more than this model's {sequence_length}. Shorten it, or its gaps."
            )
        rows.append(row)
    return rows
