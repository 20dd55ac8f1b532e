"""The machine of a run: its processors, the versions of its packages, and how it treats freed memory."""

from __future__ import annotations

import ctypes
import platform
from importlib import import_module
from pathlib import Path

import torch
from accelerate.state import PartialState


# <malloc.h> of glibc
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tells glibc to give no freed memory back to the system, for the rest of this process; False without glibc.

    On the CPU torch allocates each tensor by malloc, which by default maps a large one anew each time and unmaps it
    when it is freed, so that every page of every result is first touched through a page fault; these take a good part
    of a training step. The process stays as large as it once was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no handle of the process itself
        return False
    # 1 says that the value was taken; -1 as a threshold means never
    return bool(mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1)


def device_name(device: torch.device) -> str:
    """The kind of processor that a torch device is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_info("model name") or platform.processor() or platform.machine()


def multiplies_in_bfloat16() -> bool:
    """Whether this machine's GPU, or its CPU where there is none, has bfloat16 products of its own.

    Without them torch emulates these on a CPU, which takes longer than in float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cpu_info(key: str) -> str | None:
    """What Linux says of the first processor; None where it does not."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), None)


def hardware(device: torch.device) -> str:
    """The processors of a run, in words."""
    processes = PartialState().num_processes
    if device.type == "cuda":
        return f"{processes} × {device_name(device)}"
    return f"{device_name(device)} (CPU; processes: {processes}, threads of each: {torch.get_num_threads()})"


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    packages = ("ldlm_hf", "torch", "diffusers", "transformers", "accelerate")
    return {"Python": platform.python_version()} | {name: import_module(name).__version__ for name in packages}
