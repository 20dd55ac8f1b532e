"""Where models and texts came from, and what a result was measured with: in words that name no folder of a machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate.state import PartialState

import accelerate
import ldlm_hf
from ldlm_hf.data.sources import is_local
from ldlm_hf.hub.model_card import Source
from ldlm_hf.pretrained_sources import PACKAGE_PREFIX


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


def device_name(device: torch.device) -> str:
    """The kind of processor that a torch device is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def hardware(device: torch.device) -> str:
    """The processors of a run, in words."""
    processes = PartialState().num_processes
    if device.type == "cuda":
        return f"{processes} × {device_name(device)}"
    return f"{device_name(device)} (CPU; processes: {processes}, threads of each: {torch.get_num_threads()})"


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    packages = (ldlm_hf, torch, diffusers, transformers, accelerate)
    return {"Python": platform.python_version()} | {package.__name__: package.__version__ for package in packages}
