"""Where models and texts came from, and what a result was measured with: in words that name no folder of a machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..data.sources import is_local
from ..hub.run_files import Source
from ..loading.pretrained_sources import PACKAGE_PREFIX


def without_path(value: Any) -> Any:
    """A setting's value; of a path on this machine only its last part."""
    if not isinstance(value, str):
        return value
    # os.path says no, and raises nothing, of what is too long to be a path
    is_path = value.startswith((".", "~")) or Path(value).is_absolute() or os.path.exists(value)
    return Path(value).name if is_path else value


def source(name: str) -> Source:
    """Where a model or a corpus came from. To be called where the run takes place: it looks whether a path exists."""
    if name.startswith(PACKAGE_PREFIX):
        return Source(name, is_hub_id=False)
    if is_local(name):
        return Source(Path(name).name, is_hub_id=False)
    return Source(name, is_hub_id=True)
