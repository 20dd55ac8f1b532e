"""The demo's configuration under `accelerate launch`, in processes of its own: killed, resumed, and sampled from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def command(repository: Path, output_dir: Path, *more: str) -> list[str]:
    """A short run of the demo: six steps of eight sequences, a checkpoint every second one."""
    return [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--config_file",
        str(repository / "training/accelerate/one_cpu.yaml"),
        str(repository / "training/train_joint.py"),
        "--config",
        str(repository / "training/configs/demo.yaml"),
        f"loop.output_dir={output_dir}",
        "loop.max_steps=6",
        "optimizer.lr_decay_steps=2",
        "loop.batch_size=8",
        "loop.logging_steps=1",
        "loop.checkpointing_steps=2",
        "loop.checkpoints_total_limit=null",
        "timestep_sampler.update_every=2",
        "warmup.steps=4",
        "conditioning.start_step=3",
        "evaluation.every=0",
        "evaluation.num_sequences=16",
        "evaluation.num_samples=2",
        "evaluation.num_inference_steps=4",
        "evaluation.judge=null",
        "model.statistics_sequences=32",
        *more,
    ]


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows if "loss" in row]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(repository: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished = subprocess.run(
        command(repository, whole), cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "held-out real texts" in finished.stdout

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command(repository, killed),
            cwd=repository,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        deadline = time.monotonic() + 240
        while not (killed / "checkpoint-2").is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert (killed / "checkpoint-2").is_dir(), (tmp_path / "log").read_text()[-2000:]
    assert not (killed / "pipeline").exists()

    resumed = subprocess.run(
        command(repository, killed, "--resume_from_checkpoint", "latest"),
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "resumed from" in resumed.stdout
    assert [step for step, *_ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert losses(whole) == losses(killed)

    sampled = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, ldlm_hf; pipe = ldlm_hf.LDLMPipeline.from_pretrained(sys.argv[1]);"
            "print(len(pipe(batch_size=2, num_inference_steps=2).texts))",
            str(killed / "pipeline"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert sampled.stdout.strip().endswith("2"), sampled.stderr[-2000:]
