"""`python -m ldlm_hf` as a person calls it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldlm_hf import LDLMPipeline


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What it prints for a command line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["ldlm_hf", *map(str, arguments), "--device", "cpu"])
        runpy.run_module("ldlm_hf", run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def folder(make_conditional_pipeline: Callable[[], LDLMPipeline], tmp_path: Path) -> Path:
    make_conditional_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_texts_are_those_of_the_pipeline(write: Callable[..., str], folder: Path) -> None:
    pipe = LDLMPipeline.from_pretrained(folder)
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0}
    generator = torch.Generator().manual_seed(3)
    expected = pipe("w5 w6", suffix="w7", num_texts_per_prompt=2, generator=generator, **arguments).texts
    options = ["--pipeline", folder, "--num_inference_steps", 2, "--seed", 3, "--guidance_scale", 2]
    assert write("w5 w6", "--suffix", "w7", "--num_texts", 2, *options) == "\n\n".join(expected) + "\n"
    expected = pipe(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(3)).texts
    assert write("--num_texts", 2, *options) == "\n\n".join(expected) + "\n"


def test_a_long_text_appears_whole(write: Callable[..., str], folder: Path) -> None:
    pipe = LDLMPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    expected = pipe("w5 w6", max_new_tokens=20, num_inference_steps=2, generator=generator).texts[0]
    options = ["--pipeline", folder, "--num_inference_steps", 2, "--seed", 3]
    assert write("w5 w6", "--max_new_tokens", 20, *options) == expected + "\n"


def test_a_target_may_be_shorter(write: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    pipe = LDLMPipeline(**LDLMPipeline.from_pretrained(folder).components, ends_texts=True, source_length=3)
    pipe.save_pretrained(tmp_path / "pairs")
    generator = torch.Generator().manual_seed(3)
    expected = pipe("w5 w6", max_new_tokens=2, num_inference_steps=2, generator=generator).texts[0]
    options = ["--pipeline", tmp_path / "pairs", "--num_inference_steps", 2, "--seed", 3]
    assert write("w5 w6", "--max_new_tokens", 2, *options) == expected + "\n"


def test_nothing_is_written_where_something_is_wrong(
    write: Callable[..., str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="does not know"):
        write("hello", "--max_new_tokens", 20, "--pipeline", folder)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["hello"], "does not know"), (["w5", "--max_new_tokens", 0], "`max_new_tokens`"), (["w5 " * 9], "no room")],
)
def test_what_is_wrong_is_said_in_a_line(
    write: Callable[..., str], folder: Path, arguments: list[object], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        write(*arguments, "--pipeline", folder)
    with pytest.raises(SystemExit, match="nowhere"):
        write("w5", "--pipeline", folder / "nowhere")
