"""The README's lines for sampling run as they stand, and nothing warns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


REPOSITORY = Path(__file__).parents[1]


def test_the_sampling_lines_give_texts_without_a_warning() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Sample\n")[2].partition("\n### ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    command = [sys.executable, "-W", "default", "-c", code]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['")
    ours = [line for line in done.stderr.splitlines() if "deprecat" in line.lower() or "<string>" in line]
    assert not ours, done.stderr
