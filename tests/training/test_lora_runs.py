"""`train_lora.py`: an adapter of a trained pipeline's denoiser, on its frozen autoencoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldlm_hf import LDLMPipeline
from ldlm_hf.loading.settings_reader import load_settings
from ldlm_hf.training.recipes.lora import LoraRunSettings
from loopback_hub import LoopbackHub


Run = Callable[..., None]


@pytest.fixture
def lora(run_script: Run, tiny_overrides: list[str], randomize: Callable, tmp_path: Path) -> list[str]:
    """Settings of a run that fine-tunes a trained pipeline, at `tmp_path/trained`."""
    settings = [*tiny_overrides, "evaluation.num_samples=0"]
    run_script("train_joint", *settings, "model.transformer={num_layers: 2}")
    pipeline = load(tmp_path / "run" / "pipeline")
    torch.manual_seed(0)
    # after so few steps its blocks are almost the identity still
    randomize(pipeline.transformer, 0.2)
    pipeline.save_pretrained(tmp_path / "trained")
    settings = [one for one in settings if not one.startswith("model.transformer")]
    text = (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines()
    # another kind of text: the words of each line in order
    (tmp_path / "sorted.txt").write_text("\n".join(" ".join(sorted(line.split())) for line in text), encoding="utf-8")
    return [
        *settings,
        f"components={tmp_path / 'trained'}",
        f"data.source={tmp_path / 'sorted.txt'}",
        f"base_data={{source: {tmp_path / 'corpus.txt'}, holdout_documents: 8, cache_dir: {tmp_path / 'cache'}}}",
        f"loop.output_dir={tmp_path / 'lora'}",
        "lora.rank=2",
        "optimizer.learning_rate=1e-2",
    ]


def load(folder: Path) -> LDLMPipeline:
    pipeline = LDLMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def held_out(run: Path) -> dict[str, float]:
    """The final evaluation."""
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["held_out"]


def test_an_adapter_that_has_learned_nothing_changes_nothing(run_script: Run, lora: list[str], tmp_path: Path) -> None:
    run_script("train_lora", *lora, "optimizer.learning_rate=1e-30")
    results = held_out(tmp_path / "lora")
    for name in ("diffusion_loss", "base_diffusion_loss"):
        assert results[name] == pytest.approx(results[f"{name}_without_adapter"], rel=1e-6)
    pipeline = load(tmp_path / "trained")
    arguments: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 3, "output_type": "latent"}
    expected = pipeline(**arguments, generator=torch.Generator().manual_seed(0)).latents
    pipeline.load_lora_weights(tmp_path / "lora" / "lora")
    found = pipeline(**arguments, generator=torch.Generator().manual_seed(0)).latents
    torch.testing.assert_close(found, expected)


def test_it_learns_the_new_text_and_leaves_an_adapter_with_a_card(
    run_script: Run, lora: list[str], tmp_path: Path
) -> None:
    changes = ["loop.max_steps=60", "optimizer.ema_decay=0.9", "evaluation.num_samples=4", "lora.alpha=4"]
    run_script("train_lora", *lora, *changes)
    run = tmp_path / "lora"
    assert sorted(path.name for path in (run / "lora").iterdir() if path.suffix != ".png") == [
        "README.md",
        "pytorch_lora_weights.safetensors",
    ]
    weights = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert {name.split(".lora_")[0] for name in weights} == {
        f"transformer.blocks.{block}.attention.{layer}" for block in (0, 1) for layer in ("to_qkv", "to_out")
    }
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    losses = held_out(run)
    assert losses["diffusion_loss"] < losses["diffusion_loss_without_adapter"]
    assert losses["base_diffusion_loss"] != losses["base_diffusion_loss_without_adapter"]
    assert results["components"] == {"name": "trained", "is_hub_id": False}
    assert len(results["samples"]) == 4

    card = (run / "lora" / "README.md").read_text(encoding="utf-8")
    assert "LoRA adapter** (rank 2, alpha 4.0, layers to_qkv, to_out)" in card
    assert 'pipe.load_lora_weights("path/to/this/folder")' in card
    assert "diffusion loss without adapter" in card
    assert "- lora" in card and str(tmp_path) not in card

    run_script("score_run", str(run), "evaluation.num_samples=2")
    again = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert again["samples"] == results["samples"][:2] and again["held_out"] == losses
    assert not (run / "pipeline").exists()

    pipeline = load(tmp_path / "trained")
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    pipeline.load_lora_weights(run / "lora")
    assert next(iter(pipeline.transformer.peft_config.values())).lora_alpha == 4
    pipeline.unload_lora_weights()
    torch.testing.assert_close(pipeline.transformer.state_dict(), before, rtol=0, atol=0)


def test_a_resumed_run_ends_with_the_same_adapter(run_script: Run, lora: list[str], tmp_path: Path) -> None:
    settings = [*lora, "loop.max_steps=6", "loop.checkpointing_steps=3", "loop.checkpoints_total_limit=null"]
    run_script("train_lora", *settings)
    whole = load_file(tmp_path / "lora" / "lora" / "pytorch_lora_weights.safetensors")
    checkpoint = tmp_path / "lora" / "checkpoint-3"
    assert not any("base_layer" in name for name in load_file(checkpoint / "model.safetensors"))
    run_script(
        "train_lora", *settings, f"loop.output_dir={tmp_path / 'again'}", "--resume_from_checkpoint", str(checkpoint)
    )
    resumed = load_file(tmp_path / "again" / "lora" / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert held_out(tmp_path / "again") == held_out(tmp_path / "lora")


def test_a_pipeline_without_its_token_encoder_gets_the_statistics_of_its_own_text(
    run_script: Run, lora: list[str], tmp_path: Path
) -> None:
    run_script("train_lora", *lora)
    with_own = held_out(tmp_path / "lora")
    LDLMPipeline.from_pretrained(tmp_path / "trained", token_encoder=None).save_pretrained(tmp_path / "without")
    run_script("train_lora", *lora, f"components={tmp_path / 'without'}", f"loop.output_dir={tmp_path / 'again'}")
    found = held_out(tmp_path / "again")
    for name in ("diffusion_loss_without_adapter", "base_diffusion_loss_without_adapter"):
        assert found[name] == pytest.approx(with_own[name], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.target_modules=[to_q]", "no linear layer of the denoiser is named 'to_q'.*attention.to_qkv"),
        ("lora.target_modules=[]", "names no layer"),
        ("lora.rank=0", "rank=0"),
        ("components=", "names no pipeline"),
        ("stage=joint", "stage 'diffusion'"),
        ("model.transformer={num_layers: 3}", "an adapter is trained by the diffusion loss alone"),
        ("consistency.weight=1", "consistency.weight"),
        ("conditioning.prefix_share=0.5", "role_embeds=False"),
        ("data.documents=separate", "text of another kind"),
        ("evaluation.sampler=TangentDDIMScheduler", "an adapter has no sampler"),
        ("model.sequence_length=16", "not that of components"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(run_script: Run, lora: list[str], change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_script("train_lora", *lora, change)


def test_a_flow_map_is_refused(run_script: Run, lora: list[str], tmp_path: Path) -> None:
    config_file = tmp_path / "trained" / "transformer" / "config.json"
    pipeline = load(tmp_path / "trained")
    student = type(pipeline.transformer).from_config(pipeline.transformer.config, next_timestep_conditioning=True)
    student.save_pretrained(config_file.parent)
    with pytest.raises(ValueError, match="distilled student"):
        run_script("train_lora", *lora)


LOAD = """
import sys
from ldlm_hf import LDLMPipeline

pipe = LDLMPipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights("org/adapter", adapter_name="sorted")
print(pipe.get_active_adapters(), pipe(num_inference_steps=2).sequences.shape)
"""


@pytest.mark.slow
def test_an_adapter_is_pushed_and_loads_from_the_hub(lora: list[str], tmp_path: Path, repository: Path) -> None:
    with LoopbackHub({"hf_org": "org"}) as hub:
        environment = os.environ | hub.environment(tmp_path / "home", token="hf_org")
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}

        def run(*arguments: str) -> str:
            command = [sys.executable, *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout

        pushing = ["--push_to_hub", "--hub_model_id", "org/adapter"]
        assert "/org/adapter/commit/" in run(str(repository / "training/train_lora.py"), *lora, *pushing)
        assert 'pipe.load_lora_weights("org/adapter")' in (tmp_path / "lora/lora/README.md").read_text("utf-8")
        assert "['sorted'] torch.Size([1, 8])" in run("-c", LOAD, str(tmp_path / "trained"))


def test_the_demos_settings_are_those_of_its_base(repository: Path) -> None:
    """Forgetting is measured on the text of ldlm-demo, split as for its training."""
    demo, base = (
        yaml.safe_load((repository / "training" / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("lora_demo", "ldlm-demo")
    )
    settings = load_settings(LoraRunSettings, str(repository / "training" / "configs" / "lora_demo.yaml"), [])
    assert (repository / settings.data.source).is_file()
    assert demo["base_data"] == base["data"]
    assert demo["model"]["sequence_length"] == base["model"]["sequence_length"]
