"""Results that `evaluate.py` has written, read to be drawn in one picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from figures.style import save_figure


def read_results(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Results of evaluations whose numbers compare.

    A file that is not there is an OSError; a ValueError is what `evaluate.py` has not written, what it measured
    without a judge, or with another judge or sequence length than the first file.
    """
    results: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    for file in files:
        if not file.is_file():
            raise OSError(f"{file} is not there: training/evaluate.py writes it at its end.")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            lengths = {entry["sequence_length"] for entry in values["pipelines"]}
            conditions = {"judge": values["judge"], "sequence_length": sorted(lengths)}
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} does not hold the results of training/evaluate.py ({error!r}).") from error
        if conditions["judge"] is None:
            raise ValueError(f"{file} was made with --judge none: without a judge there is no generative perplexity.")
        first = first or conditions
        if conditions != first:
            raise ValueError(
                f"{file} has {conditions} and {files[0]} has {first}: perplexities of different judges, and entropies "
                "of texts of different lengths, do not compare. Draw them apart."
            )
        results.append(values)
    return results


def draw(description: str, plot: Callable[[list[dict[str, Any]]], Figure]) -> None:
    """The command line of a script that draws one figure from results files."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("results", nargs="+", type=Path, help="results.json of evaluations")
    parser.add_argument("--output", type=Path, required=True, help="the figure, a PNG file")
    options = parser.parse_args()
    save_figure(plot(read_results(options.results)), options.output)
