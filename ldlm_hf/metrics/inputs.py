"""What the metrics accept, texts or sequences of token ids, and what their classes for `evaluate` share.

`evaluate` casts what it is given to the declared features without a word: token probabilities of 0.7 become token 0,
and a single string becomes a list of characters. So these classes check their inputs before `evaluate` converts them.
The mixins below are no `evaluate.Metric` themselves, because `evaluate.load` takes the first one that it finds in a
module.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from ldlm_hf.loading.checks import whole_number


def check_positive_int(name: str, value: Any) -> int:
    """Returns a whole number of at least 1 as an int; a `ValueError` that names the argument for all else."""
    number = whole_number(value)
    if number is None or number < 1:
        raise ValueError(f"`{name}` is {value!r}, but it must be an integer of at least 1.")
    return number


def check_texts(name: str, texts: Any) -> None:
    """Raises a `ValueError` unless `texts` is a list of at least one string."""
    if texts is None:
        raise ValueError(f"`{name}` is missing: pass a list of texts.")
    if isinstance(texts, str):
        raise ValueError(f"`{name}` is the single string {texts[:40]!r}: pass a list, [text], not a text.")
    if len(texts) == 0:
        raise ValueError(f"`{name}` is empty: pass at least one text.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"`{name}[{index}]` is {text!r}, not a text: decode token ids with the tokenizer first.")


def check_references(predictions: Any, references: Any) -> None:
    """Raises a `ValueError` unless `references` are as many texts as there are `predictions`."""
    check_texts("references", references)
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} `predictions` and {len(references)} `references`, but this metric compares "
            "sets of equal size: shorten the longer one."
        )


def check_token_sequence(name: str, sequence: Any) -> list[int]:
    """Returns one sequence of token ids as a list; anything but integers >= 0 in one dimension is a `ValueError`."""
    ids = np.asarray(sequence.detach().cpu() if hasattr(sequence, "detach") else sequence)
    if ids.ndim != 1:
        raise ValueError(f"`{name}` has {ids.ndim} dimensions, but a sequence of token ids has one.")
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"`{name}` holds {ids.dtype} values such as {ids[0]!r}, not integer token ids.")
    if ids.size and ids.min() < 0:
        raise ValueError(
            f"`{name}` holds {ids.min()}, which is no token id: remove ignored positions and padding first."
        )
    return ids.tolist()


def check_token_sequences(predictions: Any) -> list[list[int]]:
    """Returns sequences of token ids as lists; a `ValueError` for anything but a list of lists or a 2-D array."""
    if predictions is None or len(predictions) == 0:
        raise ValueError("`predictions` is empty: pass at least one sequence of token ids.")
    return [check_token_sequence(f"predictions[{index}]", sequence) for index, sequence in enumerate(predictions)]


class FunctionMetric:
    """A function, `_compute`, as a metric of `evaluate`, which its docstring describes.

    `columns` are the arguments of the function, with their types, that `evaluate` gathers in batches.
    """

    citation_text: ClassVar[str]
    columns: ClassVar[dict[str, Any]]

    def _info(self) -> evaluate.MetricInfo:
        documentation = inspect.getdoc(self._compute) or ""  # type: ignore[attr-defined]
        return evaluate.MetricInfo(
            description=documentation.partition("\n")[0],
            citation=self.citation_text,
            inputs_description=documentation,
            features=datasets.Features(self.columns),
        )


class TextMetric(FunctionMetric):
    """A metric that reads texts."""

    columns = {"predictions": datasets.Value("string")}

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds texts to the set that `compute` measures; raises a `ValueError` if they are not lists of strings."""
        check_texts("predictions", predictions)
        if "references" in self.columns:
            check_references(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)  # type: ignore[misc]


class TokenMetric(FunctionMetric):
    """A metric that reads token ids."""

    columns = {"predictions": datasets.Sequence(datasets.Value("int64"))}

    def add_batch(self, *, predictions: Any = None, **kwargs: Any) -> None:
        """Adds sequences of token ids, a list of lists or a 2-D array or tensor; raises a `ValueError` otherwise."""
        super().add_batch(predictions=check_token_sequences(predictions), **kwargs)  # type: ignore[misc]

    def add(self, *, prediction: Any = None, **kwargs: Any) -> None:
        """Adds one sequence of token ids; raises a `ValueError` if it is none."""
        super().add(prediction=check_token_sequence("prediction", prediction), **kwargs)  # type: ignore[misc]
