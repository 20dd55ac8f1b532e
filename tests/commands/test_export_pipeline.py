"""A pipeline without its frozen language model, in half precision, does what the whole one does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldlm_hf import LDLMPipeline, LDLMTransformer1DModel, TangentEulerMaruyamaScheduler


# it starts the command as a process
pytestmark = pytest.mark.slow
TRAINING = Path(__file__).parents[2] / "training"


def export(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "export_pipeline.py", *map(str, arguments)]
    return subprocess.run(command, cwd=TRAINING, capture_output=True, text=True, env=os.environ | (environment or {}))


@pytest.fixture
def saved(make_pipeline: Callable[..., LDLMPipeline], tmp_path: Path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def latents(pipeline: LDLMPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=2, num_inference_steps=4, generator=generator, output_type="latent").latents


def test_an_exported_pipeline_samples_without_its_token_encoder(saved: Path, tmp_path: Path) -> None:
    done = export(saved, tmp_path / "small", "--without_token_encoder")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "pipeline_ldlm.py").read_text() == (saved / "pipeline_ldlm.py").read_text()
    files = list((tmp_path / "small").rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"transformer", "latent_decoder", "latent_encoder", "token_decoder"}
    for file in files:
        assert {weight.dtype for weight in load_file(file).values()} == {torch.float16}, file
    small = LDLMPipeline.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert small.missing_encoders == ["token_encoder"]
    torch.testing.assert_close(latents(small), latents(LDLMPipeline.from_pretrained(saved)), rtol=0.01, atol=0.01)
    assert all(isinstance(text, str) for text in small(batch_size=2, num_inference_steps=2).texts)


def test_an_exported_pipeline_names_its_language_model(
    make_conditional_pipeline: Callable[[], LDLMPipeline], backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Which an installed package has, here one of the test's own."""
    package = tmp_path / "packages" / "tiny_language_model"
    shutil.copytree(backbone_folders["gpt2"], package / "model")
    (package / "__init__.py").touch()
    saved, small = tmp_path / "saved", tmp_path / "small"
    make_conditional_pipeline().save_pretrained(saved)
    refused = export(saved, small)
    assert refused.returncode != 0 and "--without_token_encoder" in refused.stderr
    places = {"PYTHONPATH": os.pathsep.join([str(package.parent), str(TRAINING.parent)])}
    done = export(saved, small, "--backbone", "package:tiny_language_model/model", environment=places)
    assert done.returncode == 0, done.stderr
    assert (small / "token_encoder" / "model.safetensors").stat().st_size < 1000
    code = (
        "import sys, torch; from ldlm_hf import LDLMPipeline\n"
        "pipe = LDLMPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "print(pipe('w5 w6', num_inference_steps=2, generator=torch.Generator().manual_seed(0)).texts[0])"
    )
    command = [sys.executable, "-c", code, str(small)]
    read = subprocess.run(command, capture_output=True, text=True, env=os.environ | places)
    assert read.stdout.startswith("w5 w6"), read.stderr


def test_denoiser_and_scheduler_alone_take_the_place_of_others(saved: Path, tmp_path: Path) -> None:
    done = export(saved, tmp_path / "student", "--transformer_only", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "student").iterdir()} == {"transformer", "scheduler"}
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "student").rglob("*.json"))
    for name in ("transformer/ldlm_hf.py", "scheduler/ldlm_hf.py"):
        assert (tmp_path / "student" / name).read_text() == (saved / name).read_text()
    student = LDLMPipeline.from_pretrained(
        saved,
        transformer=LDLMTransformer1DModel.from_pretrained(tmp_path / "student", subfolder="transformer"),
        scheduler=TangentEulerMaruyamaScheduler.from_pretrained(tmp_path / "student", subfolder="scheduler"),
    )
    torch.testing.assert_close(latents(student), latents(LDLMPipeline.from_pretrained(saved)), rtol=0.1, atol=0.1)


def test_a_folder_that_holds_something_is_left_alone(saved: Path) -> None:
    done = export(saved, saved)
    assert done.returncode != 0
    assert "is not empty" in done.stderr
