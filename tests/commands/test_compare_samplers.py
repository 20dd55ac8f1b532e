"""The report on samplers, from results whose best sampler is known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


# it starts the command as a process
pytestmark = pytest.mark.slow
TRAINING = Path(__file__).parents[2] / "training"
EULER = "model, TangentEulerMaruyamaScheduler:time_grid=uniform"
DDIM = "model, TangentDDIMScheduler:eta=1.0,time_grid=learned"
GUIDED = "model, own:self_condition_scale=1.5"


def scored_set(nfe: int, perplexity: float, entropy: float) -> dict[str, Any]:
    mean = {"generative_perplexity": perplexity, "entropy": entropy, "diversity": 0.7, "mauve": 0.1}
    return {"nfe": nfe, "steps": nfe, "mean": mean, "std": dict.fromkeys(mean, 0.5), "seeds": [{}, {}, {}]}


def results(entries: dict[str, list[tuple[int, float, float]]], judge: str = "judge") -> dict[str, Any]:
    real = {"generative_perplexity": 100.0, "entropy": 3.2, "diversity": 0.8, "mauve": 0.97}
    return {
        "settings": {"num_samples": 100, "dtype": "float32"},
        "hardware": "a processor",
        "judge": {"name": judge},
        "real_text": real,
        "pipelines": [
            {"name": name, "sequence_length": 32, "sets": [scored_set(*one) for one in sets]}
            for name, sets in entries.items()
        ],
    }


def compare(folder: Path, files: list[dict[str, Any]], *options: str) -> subprocess.CompletedProcess[str]:
    paths = []
    for number, values in enumerate(files):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(values))
    command = [sys.executable, "compare_samplers.py", *map(str, paths), "--output_dir", str(folder / "out"), *options]
    return subprocess.run(command, cwd=TRAINING, capture_output=True, text=True)


def best_rows(folder: Path) -> dict[str, list[str]]:
    """Rows of the first table by their first cell."""
    table = (folder / "out" / "samplers.md").read_text().split("Highest MAUVE")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_best_sampler_has_the_lowest_perplexity_at_matched_entropy(tmp_path: Path) -> None:
    first = results({EULER: [(2, 900, 3.0), (4, 500, 3.0), (8, 300, 3.0)], DDIM: [(2, 800, 2.95), (4, 200, 2.5)]})
    # three evaluations are of the budget of four; a lower perplexity in a budget of two
    second = results({GUIDED: [(1, 1000, 3.0), (3, 400, 2.96), (7, 310, 3.1)]})
    done = compare(tmp_path, [first, second], "--reference_nfe", "8")
    assert done.returncode == 0, done.stderr
    rows = best_rows(tmp_path)
    assert [rows[budget][:3] for budget in ("1", "2", "4", "8")] == [
        ["`model, own:self_condition_scale=1.5`", "1", "1,000.0 ± 0.5"],
        ["`model, DDIM:eta=1.0,time_grid=learned`", "2", "800.0 ± 0.5"],
        # 200 has too little entropy
        ["`model, own:self_condition_scale=1.5`", "3", "400.0 ± 0.5"],
        ["`model, EulerMaruyama:time_grid=uniform`", "8", "300.0 ± 0.5"],
    ]
    assert rows["reference"][:2] == ["`model, EulerMaruyama:time_grid=uniform`", "8"]
    for name in ("samplers_perplexity", "samplers_mauve"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000


def test_mauve_ranks_samplers_of_any_entropy(tmp_path: Path) -> None:
    scores = results({EULER: [(4, 500, 3.0)], DDIM: [(4, 200, 2.5)]})
    scores["pipelines"][1]["sets"][0]["mean"]["mauve"] = 0.2
    assert compare(tmp_path, [scores], "--reference_nfe", "4").returncode == 0
    assert best_rows(tmp_path)["4"][0] == "`model, EulerMaruyama:time_grid=uniform`"
    by_mauve = (tmp_path / "out" / "samplers.md").read_text().split("Highest MAUVE")[1]
    assert "| 4 | `model, DDIM:eta=1.0,time_grid=learned` | 4 | 200.0 ± 0.5 |" in by_mauve.split("##")[0]


def test_a_wider_tolerance_lets_in_less_entropy(tmp_path: Path) -> None:
    done = compare(
        tmp_path,
        [results({EULER: [(4, 500, 3.0)], DDIM: [(4, 200, 2.5)]})],
        *("--reference_nfe", "4", "--entropy_tolerance", "0.2"),
    )
    assert done.returncode == 0, done.stderr
    assert best_rows(tmp_path)["4"][0] == "`model, DDIM:eta=1.0,time_grid=learned`"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            [results({EULER: [(4, 500, 3.0)]})],
            ["--reference_nfe", "128"],
            "EulerMaruyamaScheduler:time_grid=uniform (4)",
        ),
        (
            [results({DDIM: [(4, 500, 3.0)]})],
            ["--reference_nfe", "4"],
            "No reference the paper's solver or a pipeline's own",
        ),
        ([results({EULER: [(4, 500, 3.0)]})] * 2, ["--reference_nfe", "4"], "scored twice with 4 evaluations"),
        (
            [results({EULER: [(4, 500, 3.0)]}), results({DDIM: [(4, 500, 3.0)]}, judge="other")],
            ["--reference_nfe", "4"],
            "do not compare",
        ),
    ],
)
def test_results_that_cannot_be_compared_are_refused(
    tmp_path: Path, files: list[dict[str, Any]], options: list[str], message: str
) -> None:
    done = compare(tmp_path, files, *options)
    assert done.returncode != 0
    assert message in done.stderr


def test_results_of_a_pipelines_own_sampler_are_their_own_reference(tmp_path: Path) -> None:
    done = compare(tmp_path, [results({"model": [(4, 500, 3.0), (16, 400, 3.0)]})], "--reference_nfe", "16")
    assert done.returncode == 0, done.stderr
    assert best_rows(tmp_path)["reference"][:2] == ["`model`", "16"]
