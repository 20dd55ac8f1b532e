"""Freed memory stays with the process, and is used again without page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest


# prints the page faults of a tensor of 32 MiB behind one of 64 MiB that has been freed
COUNT_FAULTS = """
import resource
import torch
from ldlm_hf.evaluation.machine import keep_freed_memory

if {keep}:
    assert keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(keep: bool) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert page_faults(keep=False) > 1000
    assert page_faults(keep=True) < 100
