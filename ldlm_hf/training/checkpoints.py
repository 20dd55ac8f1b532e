"""Checkpoints that are whole or not there: written under a temporary name, then renamed, and checked when read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".writing-"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def write_checkpoint(
    output_dir: Path,
    step: int,
    total_limit: int | None,
    is_main: bool,
    save: Callable[[Path], None],
    agree: Callable[[str | None], str | None],
) -> Path:
    """Writes a checkpoint, gives it its name once every file is there, and removes the oldest beyond the limit.

    Those of later steps, which a run that was taken back to an earlier one has left, neither count nor are removed.
    Every process calls `save`, the main one renames and removes, and `agree` waits for all processes and turns what
    went wrong in one of them into what every one of them knows: an OSError, the checkpoints before untouched.
    """
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f"{TEMPORARY_PREFIX}{final.name}"

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files_below(temporary)}
        (temporary / MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        for path in [*files_below(temporary), temporary]:
            write_through(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        write_through(output_dir)

    problem = agree(attempt(prepare) if is_main else None)
    if problem is None:
        problem = agree(attempt(lambda: save(temporary)))
    if problem is None:
        problem = agree(attempt(finish) if is_main else None)
    if problem is not None:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"The checkpoint of step {step} could not be written: {problem}. Earlier ones are untouched.")
    if is_main and total_limit is not None:
        written = [path for path in find_checkpoints(output_dir) if step_of(path) <= step]
        for outdated in written[: max(0, len(written) - total_limit)]:
            shutil.rmtree(outdated)
    return final


def attempt(action: Callable[[], None]) -> str | None:
    """Does something that writes files; what went wrong, if anything did."""
    try:
        action()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError for a full disk
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def write_through(path: Path) -> None:
    """Waits until a file's contents, or a folder's names, are on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its folders."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a process that was killed while saving has left."""
    for path in output_dir.glob(f"{TEMPORARY_PREFIX}checkpoint-*"):
        shutil.rmtree(path)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a missing or truncated file by name; None if it is whole."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        sizes = json.loads(manifest.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return f"{MANIFEST} is truncated"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is truncated: {path.stat().st_size} bytes of {size}"
    return None


def resolve_checkpoint(output_dir: Path, request: str) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint latest|PATH` names; None for `latest` where there is none.

    OSError where it is missing or damaged; the message names the file, and the whole one before it.
    """
    if request == "latest":
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            return None
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(request)
        if not checkpoint.is_dir() and (output_dir / request).is_dir():
            checkpoint = output_dir / request
        if not checkpoint.is_dir():
            known = ", ".join(path.name for path in find_checkpoints(output_dir)) or "none"
            raise OSError(
                f"--resume_from_checkpoint {request!r}: there is no such folder; {output_dir} holds: {known}."
            )
    problem = damage(checkpoint)
    if problem is not None:
        whole = [
            path
            for path in find_checkpoints(checkpoint.parent)
            if damage(path) is None and step_of(path) < step_of(checkpoint)
        ]
        remedy = (
            f"Resume from the one before: --resume_from_checkpoint {whole[-1]}"
            if whole
            else "No earlier whole one exists; start anew without --resume_from_checkpoint."
        )
        raise OSError(f"{checkpoint} cannot be resumed from: {problem}. {remedy}")
    return checkpoint
