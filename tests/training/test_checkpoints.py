"""A checkpoint is whole or it is refused, by the name of the file that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldlm_hf.training.checkpoints import (
    damage,
    find_checkpoints,
    remove_unfinished,
    resolve_checkpoint,
    write_checkpoint,
)


def write(folder: Path, step: int, limit: int | None = None) -> Path:
    def save(target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"weights" * 100)

    return write_checkpoint(folder, step, limit, is_main=True, save=save, agree=lambda problem: problem)


def test_oldest_are_removed_beyond_the_limit(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write(tmp_path, step, limit=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    # a run that was taken back to step 5
    assert write(tmp_path, 8, limit=1).is_dir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-10", "checkpoint-15"]


def test_latest_is_the_highest_step(tmp_path: Path) -> None:
    assert resolve_checkpoint(tmp_path, "latest") is None
    for step in (9, 10):
        write(tmp_path, step)
    assert resolve_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert resolve_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"


def test_truncated_file_is_named_and_the_checkpoint_before_is_offered(tmp_path: Path) -> None:
    write(tmp_path, 5)
    broken = write(tmp_path, 10) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(
        OSError, match=r"checkpoint-10.*model\.safetensors is truncated: 50 bytes of 700.*checkpoint-5"
    ):
        resolve_checkpoint(tmp_path, "latest")


def test_missing_file_and_manifest_are_named(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 5)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors is missing.*start anew"):
        resolve_checkpoint(tmp_path, "latest")
    (checkpoint / "manifest.json").unlink()
    assert damage(checkpoint) == "manifest.json is missing"


def test_unknown_path_is_refused_with_what_there_is(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with pytest.raises(OSError, match="holds: checkpoint-5"):
        resolve_checkpoint(tmp_path, "checkpoint-6")


def test_a_save_that_fails_leaves_the_checkpoint_before_whole(tmp_path: Path) -> None:
    write(tmp_path, 5)

    def save(target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match=r"step 10 could not be written: OSError: no space.*Earlier ones are untouched"):
        write_checkpoint(tmp_path, 10, None, is_main=True, save=save, agree=lambda problem: problem)
    assert resolve_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (tmp_path / ".writing-checkpoint-10").mkdir()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_problem_of_another_process_is_everybodys(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"rank 3 has no space"):
        write_checkpoint(
            tmp_path, 10, None, is_main=True, save=lambda folder: None, agree=lambda problem: "rank 3 has no space"
        )
    assert not list(tmp_path.iterdir())
