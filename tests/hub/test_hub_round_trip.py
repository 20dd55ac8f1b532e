"""A pipeline is published and loaded again over HTTP: the short form of checks/hub_round_trip.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hub_round_trip import NO_TRUST, Case, judge, load, load_trusting, run_cases


@pytest.mark.slow
def test_a_published_pipeline_loads_in_fresh_processes(tmp_path: Path):
    cases = [load("org/tiny"), load("org/tiny", offline=True), NO_TRUST, load_trusting("org/tiny")]
    rows, num_wrong = run_cases(cases, tmp_path)
    assert num_wrong == 0, rows
    assert len(rows) == 4


LOAD = load("org/tiny").code
PUBLISHED = {"sequences": [[1, 2]], "weights": {"transformer": "abc"}}
FOUND = PUBLISHED | {"executed": []}
FAILED = {"executed": [], "error": "OSError: no such file"}


@pytest.mark.parametrize(
    ("case", "found", "downloads", "expected"),
    [
        (Case(LOAD), FOUND, [], None),
        (Case(LOAD), FOUND | {"sequences": [[1, 3]]}, [], "expected: float32"),
        (Case(LOAD), FOUND | {"weights": {"transformer": "abd"}}, [], "expected: float32"),
        (Case(LOAD), FOUND | {"weights": {}}, [], "expected: float32"),
        (Case(LOAD), {"weights": {"transformer": "abc"}, "executed": []}, [], None),
        (Case(LOAD, error="OSError"), FAILED, [], None),
        (Case(LOAD, error="ValueError"), FAILED, [], "expected: ValueError"),
        (Case(LOAD, error="OSError"), FOUND, [], "expected: OSError"),
        (Case(LOAD), FOUND | {"executed": ["diffusers_modules.evil"]}, [], "executed: diffusers_modules.evil"),
        (load_trusting("org/tiny"), FOUND, [], "executed: none"),
        (Case(LOAD, not_fetched=("*.py",)), FOUND, ["config.json", "a/b.py"], "downloaded: a/b.py"),
    ],
)
def test_what_is_not_as_expected_is_reported(
    case: Case, found: dict[str, Any], downloads: list[str], expected: str | None
):
    _, wrong = judge(case, found, {"float32": PUBLISHED}, downloads)
    if expected is None:
        assert wrong == []
    else:
        assert len(wrong) == 1
        assert expected in wrong[0]
