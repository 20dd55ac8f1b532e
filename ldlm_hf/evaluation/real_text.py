"""The real text that generated text is measured beside, and controls made of it that good metrics tell from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate
from transformers import PreTrainedTokenizerBase

from ..data import DataSettings, TextCorpora, TokenChunks, load_held_out
from ..loading.settings_reader import load_settings
from ..metrics.mauve import MIN_MAUVE_TEXTS


# of the random numbers that controls are made with
CONTROL_SEED = 0
# words of the phrase that a text of the control `repeated_words` consists of
REPEATED_WORDS = 4


@dataclass(frozen=True)
class RealText:
    """Held-out text: token ids (n, L) and texts of a row of their own, as many others for MAUVE, or none without it.

    `num_held_out` are the sequences that there were to choose from.
    """

    sequences: torch.Tensor
    texts: list[str]
    reference_texts: list[str]
    num_held_out: int


def load_real_text(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    count: int,
    with_references: bool,
) -> RealText:
    """`count` held-out texts, and as many between them as references; both spread evenly over the held-out part."""
    validation = load_held_out(settings, tokenizer, sequence_length)
    needed = 2 * count if with_references else count
    if len(validation) < needed:
        purpose = f"{count} for the row of real text" + (f" and {count} others for MAUVE" if with_references else "")
        raise ValueError(
            f"data.source={settings.source!r} holds {len(validation)} sequences of {sequence_length} tokens out, but "
            f"--num_samples {count} needs {needed} of them: {purpose}. Hold out more text, ask for fewer samples"
            + (", or leave MAUVE out with --no_mauve." if with_references else ".")
        )
    sequences = held_out_sequences(validation, needed)
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    if not with_references:
        return RealText(sequences, texts, [], len(validation))
    blank = sum(not text.strip() for text in texts[1::2])
    if blank:
        raise ValueError(
            f"{blank} of the {count} held-out texts of data.source={settings.source!r} that MAUVE would compare with "
            "are blank: clean the corpus, or leave MAUVE out with --no_mauve."
        )
    return RealText(sequences[::2], texts[::2], texts[1::2], len(validation))


def check_mauve_size(num_samples: int) -> None:
    """Raises ValueError where MAUVE could not be measured."""
    if num_samples < MIN_MAUVE_TEXTS:
        raise ValueError(
            f"--num_samples {num_samples}: MAUVE needs at least {MIN_MAUVE_TEXTS} texts of each set. Ask for more "
            "samples, or leave MAUVE out with --no_mauve."
        )


def shuffled_words(words: list[str], random: np.random.Generator) -> list[str]:
    """The same words in random order: as diverse as before, and no text any more."""
    return [words[place] for place in random.permutation(len(words))]


def repeated_words(words: list[str], random: np.random.Generator) -> list[str]:
    """`REPEATED_WORDS` neighbouring words, drawn at random, over and over up to the same number of words.

    A judge soon expects them; entropy and diversity see what they are. One word over and over would not show that:
    without a BOS, some judges find it most unlikely, however often it comes.
    """
    first = random.integers(max(1, len(words) - REPEATED_WORDS + 1))
    repeated = words[first : first + REPEATED_WORDS]
    return [repeated[place % len(repeated)] for place in range(len(words))]


CONTROLS: dict[str, Callable[[list[str], np.random.Generator], list[str]]] = {
    "shuffled_words": shuffled_words,
    "repeated_words": repeated_words,
}


def control_set(control: str, real: RealText, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[str]]:
    """Token ids and texts of a control of the real texts.

    A text is split at white space; its words are changed and joined with single spaces. The result is tokenised, cut
    to L tokens, and decoded: its row differs from that of real text by its words alone. Text i draws from a generator
    seeded with (`CONTROL_SEED`, i).
    """
    make = CONTROLS[control]
    changed = [
        " ".join(make(text.split(), np.random.default_rng((CONTROL_SEED, index))))
        for index, text in enumerate(real.texts)
    ]
    rows = tokenizer(changed, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [row[: real.sequences.shape[1]] for row in rows]
    return rows, tokenizer.batch_decode(rows, skip_special_tokens=True)


@dataclass
class DataSection:
    """The settings of a script that reads a run's text and nothing else of its settings."""

    data: DataSettings = field(default_factory=DataSettings)


def load_data_settings(config: str | None, overrides: Sequence[str]) -> DataSettings:
    """The section `data` of a run's YAML file, whatever else the file holds, and over it `data.key=value`."""
    return load_settings(DataSection, config, overrides, ignore_other_sections=True).data


def held_out_rows(dataset: Dataset[dict[str, torch.Tensor]], count: int) -> dict[str, torch.Tensor]:
    """`count` items (or all, if there are fewer), spread evenly over a data set: `input_ids`, and of pairs `given`, of
    shape (count, L)."""
    length = len(dataset)  # type: ignore[arg-type]
    indices = torch.linspace(0, length - 1, min(count, length)).round().long().unique()
    return default_collate([dataset[int(index)] for index in indices])


def held_out_sequences(dataset: Dataset[dict[str, torch.Tensor]], count: int) -> torch.Tensor:
    """The token ids of [`held_out_rows`]."""
    return held_out_rows(dataset, count)["input_ids"]


def training_rows(dataset: Dataset, count: int) -> dict[str, torch.Tensor]:
    """`count` training items as of [`held_out_rows`]: spread evenly over a data set, or the first ones of a stream."""
    if isinstance(dataset, IterableDataset):
        return default_collate(list(itertools.islice(dataset, count)))
    return held_out_rows(dataset, count)


def held_out_part(corpora: TextCorpora) -> TokenChunks:
    """The held-out part of a corpus; ValueError where the settings hold no text out."""
    if corpora.validation is None:
        raise ValueError(
            "Evaluation needs held-out text, and the settings hold none out: set data.validation_split, "
            "data.holdout_documents or data.holdout_fraction."
        )
    return corpora.validation
