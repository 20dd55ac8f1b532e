"""Every hostile repository in every way of loading, in a process of its own, whose memory is bounded.

Processes are forked from one that has imported the package and done nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hostile_repositories import CANARY, CASES, PIPELINES, Case, Outcome, attempt, make_repository, peak_memory


# as a safety net: address space, which torch needs much of, and seconds
ADDRESS_SPACE_BYTES, TIME_LIMIT = 32 * 2**30, 120
# beyond what an honest load takes; the largest allowed slack of a construction is 2**24 elements
MEMORY_SLACK_MIB = 256

pytestmark = pytest.mark.slow
Run = Callable[..., Any]


def forked(function: Run, *arguments: Any) -> Any:
    """What a function returns in a fork of this process; None if that ended otherwise or took too long."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        os.environ["HF_HUB_OFFLINE"] = "1"
        sender.send(function(*arguments))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(TIME_LIMIT) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def in_process() -> Iterator[Run]:
    """Runs a function in a process of its own, as [`forked`] does."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as clean:
        yield lambda *call: clean.submit(forked, *call).result()


def make_and_change(case: str, honest: Path, repository: Path) -> bool:
    """A copy that is made hostile; files that the change leaves alone are links to the honest repository's."""
    shutil.copytree(honest, repository, copy_function=os.link)
    BY_ID[case].change(repository)
    return True


def load_changed(case: str, way: str, repository: Path) -> Outcome:
    return attempt(BY_ID[case], way, repository)


def load_honest(way: str, repository: Path) -> Outcome:
    return attempt(Case("", lambda _: None, None), way, repository)


def case_id(case: Case) -> str:
    return f"{case.component}: {case.name}"


BY_ID = {case_id(case): case for case in CASES}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 148 MiB of weights."""
    folder = tmp_path_factory.mktemp("honest") / "repository"
    make_repository(folder, 384, 4, 8192)
    return folder


@pytest.fixture(scope="module")
def allowed_mib(honest: Path, in_process: Run) -> float:
    """The memory that a process may take."""
    outcomes = [in_process(load_honest, way, honest) for way in PIPELINES]
    assert all(outcome.error is None for outcome in outcomes)
    return max(outcome.peak_mib for outcome in outcomes) + MEMORY_SLACK_MIB


def test_every_case_has_a_name_of_its_own(allowed_mib: float, in_process: Run):
    assert len(BY_ID) == len(CASES)
    assert in_process(peak_memory) < allowed_mib


@pytest.mark.parametrize("case", BY_ID)
def test_case(case: str, honest: Path, allowed_mib: float, in_process: Run, tmp_path: Path):
    for way in BY_ID[case].ways:
        repository = tmp_path / way / "repository"
        assert in_process(make_and_change, case, honest, repository)
        outcome = in_process(load_changed, case, way, repository)
        assert outcome is not None, f"{way}: ended by a limit of memory or time"
        assert outcome.is_expected(BY_ID[case].match), (way, outcome)
        assert not (repository / CANARY).exists()
        assert outcome.peak_mib < allowed_mib, (way, outcome)
        shutil.rmtree(repository)
