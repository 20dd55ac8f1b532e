"""A recipe that is no pipeline, as docs/architecture.md shows one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ldlm_hf.training import Evaluation


def test_the_recipe_of_the_page_trains(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (repository / "docs/architecture.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n([^`]*class Bigrams.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {"__name__": "bigrams"}
    exec(compile(code, "bigrams", "exec", dont_inherit=True), found)
    result = found["result"]
    assert isinstance(result, Evaluation)
    assert result.values["loss"] > 0
    records = [json.loads(line) for line in Path("runs/bigrams/metrics.jsonl").read_text().splitlines()]
    lines = [record for record in records if "loss" in record]
    assert [record["step"] for record in lines] == [5, 10, 15, 20]
    assert lines[-1]["tokens"] == 20 * 4 * 16
    assert "model_flops_utilization" not in lines[-1]
    assert torch.load("runs/bigrams/weights.pt")["weight"].shape == (40, 40)
    assert Path("runs/bigrams/checkpoint-20").is_dir()
