"""A pipeline is published and loaded again over HTTP: the short form of checks/hub_round_trip.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hub_round_trip import NO_TRUST, PLAIN, Case, RoundTrip, load, load_trusting, run_chain
from loopback_hub import LoopbackHub


@pytest.mark.slow
def test_a_published_pipeline_loads_in_fresh_processes(tmp_path: Path):
    trip = RoundTrip(tmp_path)
    trip.publish()
    chains = [
        [load("org/tiny"), load("org/tiny", offline=True, silent=True)],
        [Case(PLAIN, error=NO_TRUST, installed=False), load_trusting("org/tiny")],
    ]
    with ThreadPoolExecutor(2) as executor:
        rows = [row for chain in executor.map(partial(run_chain, trip), chains) for row in chain]
    assert [row for row in rows if row.wrong] == []
    assert len(rows) == 4


LOAD = load("org/tiny").code
PUBLISHED = {"sequences": [[1, 2]], "latents": [0.5, -0.5], "weights": {"transformer": "abc"}}
FOUND = {"installed": True, "executed": [], "value": PUBLISHED}
FAILED = {"installed": True, "executed": [], "error": "OSError: no such file"}


def changed(**parts: Any) -> dict[str, Any]:
    """What a process found, its pipeline changed."""
    return FOUND | {"value": PUBLISHED | parts}


@pytest.mark.parametrize(
    ("case", "found", "seen", "expected"),
    [
        (Case(LOAD), changed(latents=[0.5, -0.500001]), [], None),
        (Case(LOAD), changed(latents=[0.5, -0.51]), [], "expected: float32"),
        (Case(LOAD), changed(sequences=[[1, 3]]), [], "expected: float32"),
        (Case(LOAD), changed(weights={"transformer": "abd"}), [], "expected: float32"),
        (Case(LOAD), changed(weights={}), [], "expected: float32"),
        (Case(LOAD), FOUND | {"value": {"transformer": "abc"}}, [], None),
        (Case(LOAD, error="OSError"), FAILED, [], None),
        (Case(LOAD, error="ValueError"), FAILED, [], "expected: ValueError"),
        (Case(LOAD, error="OSError"), FOUND, [], "expected: OSError"),
        (Case(LOAD, installed=False), FOUND, [], "the package could be imported"),
        (Case(LOAD), FOUND | {"executed": ["diffusers_modules.evil"]}, [], "executed: diffusers_modules.evil"),
        (load_trusting("org/tiny"), FOUND | {"installed": False}, [], "executed: none"),
        (Case(LOAD, not_fetched=("*.py",)), FOUND, ["config.json", "a/b.py"], "downloaded: a/b.py"),
        (Case(LOAD, silent=True), FOUND, ["config.json"], "asked the hub"),
    ],
)
def test_what_is_not_as_expected_is_reported(
    tmp_path: Path, case: Case, found: dict[str, Any], seen: list[str], expected: str | None
):
    hub = LoopbackHub(
        downloads=[("org/tiny", name) for name in seen],
        requests=[("GET", f"/org/tiny/resolve/main/{name}", 200) for name in seen],
    )
    wrong = RoundTrip(tmp_path, published={"float32": PUBLISHED}).judge(case, found, hub).wrong
    if expected is None:
        assert wrong == []
    else:
        assert len(wrong) == 1
        assert expected in wrong[0]
