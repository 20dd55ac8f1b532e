"""A saved pipeline loads again: here, and in a process that has never seen it and only imports ldlm_hf."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from ldlm_hf import LDLMLatentDecoder, LDLMPipeline, LDLMTransformer1DModel, TangentEulerMaruyamaScheduler


ENCODERS = {"token_encoder": None, "latent_encoder": None}


def sample(pipe: LDLMPipeline) -> list[list[int]]:
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).sequences.tolist()


@pytest.fixture
def saved(make_pipeline, tmp_path: Path) -> tuple[Path, list[list[int]]]:
    """The folder of a whole pipeline, and what it sampled."""
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole", sample(pipe)


def test_model_index_names_the_package(saved: tuple[Path, list]):
    index = json.loads((saved[0] / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_ldlm", "LDLMPipeline"]
    expected = {
        "transformer": "LDLMTransformer1DModel",
        "latent_decoder": "LDLMLatentDecoder",
        "token_decoder": "LDLMTokenDecoder",
        "scheduler": "TangentEulerMaruyamaScheduler",
        "token_encoder": "LDLMTokenEncoder",
        "latent_encoder": "LDLMLatentEncoder",
    }
    assert {name: index[name] for name in expected} == {name: ["ldlm_hf", cls] for name, cls in expected.items()}
    assert index["tokenizer"][0] == "transformers"


def test_weights_are_safetensors_and_no_file_names_a_place_on_this_machine(
    saved: tuple[Path, list], backbone_folders: dict[str, Path]
):
    files = [path for path in saved[0].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".py"}
    assert sum(path.suffix == ".safetensors" for path in files) == 5
    for path in files:
        if path.suffix != ".safetensors":
            assert str(saved[0].parent) not in path.read_text(), path.name
            assert str(backbone_folders["gpt2"]) not in path.read_text(), path.name


@pytest.mark.parametrize("pipeline_class", [LDLMPipeline, DiffusionPipeline])
def test_loading(saved: tuple[Path, list], pipeline_class: type[DiffusionPipeline]):
    path, expected = saved
    pipe = pipeline_class.from_pretrained(path)
    assert type(pipe) is LDLMPipeline
    assert sample(pipe) == expected
    assert not any(parameter.requires_grad for parameter in pipe.token_encoder.parameters())
    assert pipe.encode("w5").shape == (1, 6, 16)


def test_loading_without_the_encoders(saved: tuple[Path, list]):
    path, expected = saved
    pipe = LDLMPipeline.from_pretrained(path, token_encoder=None, latent_encoder=None)
    assert pipe.token_encoder is None
    assert pipe.latent_encoder is None
    assert sample(pipe) == expected
    pipe.save_pretrained(path.parent / "again")
    assert sample(LDLMPipeline.from_pretrained(path.parent / "again")) == expected


@pytest.mark.parametrize("pipeline_class", [LDLMPipeline, DiffusionPipeline])
def test_a_pipeline_without_its_denoiser_encodes_and_decodes(saved: tuple[Path, list], pipeline_class, tmp_path: Path):
    whole = LDLMPipeline.from_pretrained(saved[0])
    pipe = pipeline_class.from_pretrained(saved[0], transformer=None, scheduler=None)
    latents = whole.encode(["w5 w6", "w7"])
    assert torch.equal(pipe.encode(["w5 w6", "w7"]), latents)
    assert pipe.decode(latents) == whole.decode(latents)
    with pytest.raises(ValueError, match=r"\(batch_size, 6, 16\)"):
        pipe.decode(torch.zeros(1, 7, 16))
    pipe.save_pretrained(tmp_path / "again")
    again = LDLMPipeline.from_pretrained(tmp_path / "again")
    assert again.transformer is None
    assert again.decode(latents) == whole.decode(latents)


@pytest.mark.parametrize("pipeline_class", [LDLMPipeline, DiffusionPipeline])
@pytest.mark.parametrize(
    ("missing", "calls"),
    [
        ("transformer", ["text", "seq", "latent"]),
        ("scheduler", ["text", "seq", "latent"]),
        ("token_decoder", ["text", "seq", "decode"]),
        ("tokenizer", ["text", "decode", "encode"]),
    ],
)
def test_what_needs_a_missing_component_names_it(saved: tuple[Path, list], pipeline_class, missing: str, calls: list):
    pipe = pipeline_class.from_pretrained(saved[0], **{missing: None})
    pipe.set_progress_bar_config(disable=True)
    uses = {
        kind: lambda kind=kind: pipe(num_inference_steps=2, output_type=kind) for kind in ("text", "seq", "latent")
    }
    uses |= {"decode": lambda: pipe.decode(torch.zeros(1, 6, 16)), "encode": lambda: pipe.encode("w5")}
    for name, use in uses.items():
        if name in calls:
            with pytest.raises(ValueError, match=f"this pipeline lacks {missing}"):
                use()
        else:
            use()


def test_loading_with_a_component_of_ones_own(saved: tuple[Path, list]):
    scheduler = TangentEulerMaruyamaScheduler(tangent_d=9.0)
    pipe = LDLMPipeline.from_pretrained(saved[0], scheduler=scheduler)
    assert pipe.scheduler is scheduler


def test_loading_in_other_types(saved: tuple[Path, list]):
    pipe = LDLMPipeline.from_pretrained(saved[0], dtype=torch.bfloat16)
    for name in ("transformer", "latent_decoder", "token_decoder", "latent_encoder", "token_encoder"):
        assert getattr(pipe, name).dtype == torch.bfloat16, name
    assert pipe.token_encoder.mean.dtype == torch.float32
    assert pipe(num_inference_steps=2, output_type="latent").latents.dtype == torch.float32
    assert pipe.encode("w5").shape == (1, 6, 16)

    mixed = LDLMPipeline.from_pretrained(saved[0], dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert mixed.transformer.dtype == torch.bfloat16
    assert mixed.latent_decoder.dtype == mixed.token_decoder.dtype == torch.float32
    assert len(sample(mixed)) == 2


def test_a_variant_saved_later_does_not_change_the_type_of_the_full_weights(saved: tuple[Path, list]):
    path, expected = saved
    LDLMPipeline.from_pretrained(path, dtype=torch.float16).save_pretrained(path, variant="fp16")
    full = LDLMPipeline.from_pretrained(path)
    assert full.latent_decoder.dtype == full.token_decoder.dtype == torch.float32
    assert sample(full) == expected
    half = LDLMPipeline.from_pretrained(path, variant="fp16", dtype=torch.float16)
    assert half.token_decoder.dtype == half.transformer.dtype == torch.float16


def test_single_components_load_from_their_folders(saved: tuple[Path, list]):
    transformer = LDLMTransformer1DModel.from_pretrained(saved[0], subfolder="transformer")
    latent_decoder = LDLMLatentDecoder.from_pretrained(saved[0], subfolder="latent_decoder")
    scheduler = TangentEulerMaruyamaScheduler.from_pretrained(saved[0], subfolder="scheduler")
    pipe = LDLMPipeline.from_pretrained(
        saved[0], transformer=transformer, latent_decoder=latent_decoder, scheduler=scheduler
    )
    assert pipe.transformer is transformer
    assert sample(pipe) == saved[1]


def test_from_pipe_shares_the_components(saved: tuple[Path, list]):
    pipe = LDLMPipeline.from_pretrained(saved[0])
    assert LDLMPipeline.from_pipe(pipe).transformer is pipe.transformer


FRESH_PROCESS = """
import json, sys
import torch
from diffusers import DiffusionPipeline
import ldlm_hf

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).sequences.tolist()

whole, small = sys.argv[1:]
torch.set_num_threads(1)
print(json.dumps({
    "class": type(DiffusionPipeline.from_pretrained(whole)).__name__,
    "whole": sample(ldlm_hf.LDLMPipeline.from_pretrained(whole)),
    "whole, by diffusers": sample(DiffusionPipeline.from_pretrained(whole)),
    "small": sample(ldlm_hf.LDLMPipeline.from_pretrained(small)),
    "small, by diffusers": sample(DiffusionPipeline.from_pretrained(small)),
    "left out": sample(ldlm_hf.LDLMPipeline.from_pretrained(whole, token_encoder=None, latent_encoder=None)),
    "half": len(sample(DiffusionPipeline.from_pretrained(whole, dtype=torch.bfloat16))),
}))
"""


@pytest.mark.slow
def test_a_fresh_process_loads_and_samples_the_same(make_pipeline, saved: tuple[Path, list]):
    path, expected = saved
    small = path.parent / "small"
    make_pipeline(**ENCODERS).save_pretrained(small)
    result = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(path), str(small)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("class") == "LDLMPipeline"
    assert found.pop("half") == 2
    assert found == dict.fromkeys(found, expected)
    assert len(found) == 5
