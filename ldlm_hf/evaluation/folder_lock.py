"""Folders that one process at a time writes to.

Not by `filelock`: it does not hand out the lock's descriptor, and its release unlocks the file for child processes
that hold the descriptor, too. Ablations need both: what a killed call has left running keeps the folder locked.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import TextIO


LOCK = ".lock"


def lock_folder(folder: Path, remedy: str | None = None) -> TextIO:
    """Takes a folder, which is made if it is not there, for as long as the file that is returned is open.

    The system closes it with the process, however that ends. Processes that are started with its descriptor
    (`pass_fds`) keep the folder taken until they have ended, too. If another process has it, this is an OSError that
    says the `remedy`, or without one this waits until it is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if remedy is None else fcntl.LOCK_NB))
    except BlockingIOError as error:
        lock.close()
        raise OSError(f"{folder} is in use by another process, which has locked {folder / LOCK}: {remedy}") from error
    return lock
