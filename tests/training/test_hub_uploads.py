"""A run uploads what it was asked to: checkpoints as they are made, the pipeline and its card at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard

from ldlm_hf.training import launch
from ldlm_hf.training.checkpoints import MANIFEST
from loopback_hub import LoopbackHub


LOAD = """
import sys
from ldlm_hf import LDLMPipeline
print(LDLMPipeline.from_pretrained(sys.argv[1])(num_inference_steps=2).sequences.shape)
"""


@pytest.mark.slow
def test_a_run_pushes_its_checkpoints_and_its_pipeline(
    tiny_overrides: list[str], tmp_path: Path, repository: Path
) -> None:
    with LoopbackHub({"hf_org": "org"}) as hub:
        environment = os.environ | hub.environment(tmp_path / "home", token="hf_org")
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
        pushing = ["--push_to_hub", "--push_checkpoints", "--hub_model_id", "org/tiny", "--hub_private"]
        finished = subprocess.run(
            [
                sys.executable,
                str(repository / "training/train_joint.py"),
                *tiny_overrides,
                "loop.checkpointing_steps=2",
                *pushing,
                *("--license", "apache-2.0", "--language", "en"),
            ],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        assert "/org/tiny/commit/" in finished.stdout

        api = HfApi(hub.endpoint, token="hf_org")
        assert api.model_info("org/tiny").private
        files = set(api.list_repo_files("org/tiny"))
        assert {"model_index.json", "pipeline_ldlm.py", "README.md", "training_curves.png"} <= files
        card = ModelCard.load(tmp_path / "run/pipeline/README.md")
        assert (card.data.license, card.data.language) == ("apache-2.0", "en")
        assert 'from_pretrained("org/tiny")' in card.text
        checkpoints = set(api.list_repo_files("org/tiny", revision="checkpoints"))
        assert {f"checkpoint-{step}/{MANIFEST}" for step in (2, 4)} <= checkpoints

        loaded = subprocess.run(
            [sys.executable, "-c", LOAD, "org/tiny"], env=environment, capture_output=True, text=True, check=False
        )
        assert "[1, 8]" in loaded.stdout, loaded.stderr[-2000:]


def test_an_upload_that_would_not_happen_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_joint.py", "--hub_model_id", "org/tiny"])
    with pytest.raises(SystemExit):
        launch.parse_arguments("")
    assert "--push_to_hub" in capsys.readouterr().err
