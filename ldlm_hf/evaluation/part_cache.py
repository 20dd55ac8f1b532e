"""Finished parts of a long evaluation, as files, so that one that was killed goes on where it stopped.

What a part is filed under is a digest of everything that its content depends on. A part that was made under other
settings, by other weights or with other versions has another digest: it is never found, so parts cannot be mixed.
Files are renamed into place when they are whole. Processes share the work through this folder, so all of them must
see it. The digest knows packages by their versions: after changing their code, delete the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn


# ending of a file that is not whole yet
UNFINISHED = ".unfinished"


def digest(value: Any) -> str:
    """Digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def module_digest(module: nn.Module) -> str:
    """Digest of a model's configuration and weights, wherever they were loaded from."""
    state = hashlib.sha256(digest(public_config(module)).encode())
    for name, tensor in module.state_dict().items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:24]


def public_config(component: Any) -> Any:
    """The configuration of a model or scheduler, without what says where it was loaded from."""
    config = component.config.to_dict() if hasattr(component.config, "to_dict") else dict(component.config)
    dropped = ("_", "transformers_version", "torch_dtype", "dtype")
    return json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith(dropped)}, default=str))


class Rows:
    """Rows 0, 1, 2, ... of some tensors, made in batches of any rows by any process: a folder with a file a batch."""

    def __init__(self, folder: Path):
        self.folder = folder

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        for file in sorted(self.folder.glob("*.pt")):
            yield torch.load(file, weights_only=True, mmap=True)

    def missing(self, count: int) -> list[int]:
        """Which of the first `count` rows are not there yet."""
        found = {row for batch in self.batches() for row in batch["rows"].tolist()}
        return [row for row in range(count) if row not in found]

    def missing_batches(self, count: int, size: int) -> list[list[int]]:
        """These rows in batches of at most `size`."""
        rows = self.missing(count)
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def save(self, rows: list[int], tensors: dict[str, torch.Tensor]) -> None:
        """Keeps some rows: tensors of shape (rows, ...)."""
        values = {"rows": torch.tensor(rows)} | {name: tensor.cpu() for name, tensor in tensors.items()}
        write_whole(self.folder / f"{rows[0]:08d}.pt", lambda file: torch.save(values, file))

    def load(self, count: int) -> dict[str, torch.Tensor]:
        """The first `count` rows, none of which is missing, in order, each once."""
        batches = list(self.batches())
        places = {row: place for place, row in enumerate(torch.cat([batch["rows"] for batch in batches]).tolist())}
        order = torch.tensor([places[row] for row in range(count)])
        return {name: torch.cat([batch[name] for batch in batches])[order] for name in batches[0] if name != "rows"}


class FinishedParts:
    """The folder of all parts, and versions of the packages that they are made with; those of others are not found."""

    def __init__(self, folder: Path, versions: dict[str, str]):
        self.folder = folder
        self.versions = versions

    def rows(self, kind: str, **depends_on: Any) -> Rows:
        """Rows of tensors that depend on these values."""
        return Rows(self.folder / f"{kind}-{digest([depends_on, self.versions])}")

    def value(self, kind: str, make: Callable[[], Any], **depends_on: Any) -> Any:
        """What JSON can hold and depends on these values: read if it is there, or else made and kept."""
        file = self.folder / f"{kind}-{digest([depends_on, self.versions])}.json"
        if not file.is_file():
            content = json.dumps(make())
            write_whole(file, lambda path: path.write_text(content, encoding="utf-8"))
        return json.loads(file.read_text(encoding="utf-8"))


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file that is either whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}{UNFINISHED}")
    write(unfinished)
    unfinished.replace(file)


def remove_half_written(*folders: Path) -> None:
    """Removes the files that processes that were killed have left half-written; none may be writing there now."""
    for folder in folders:
        for file in folder.glob(f"*{UNFINISHED}"):
            file.unlink()
