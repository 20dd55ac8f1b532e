"""Saving over a save: what is superseded goes, all else stays, and what could not be loaded again is not written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.nn.parallel import DataParallel

from ldlm_hf import LDLMPipeline, LDLMTransformer1DModel
from loopback_hub import LoopbackHub


SAVES: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"max_shard_size": "10KB"},
    "fp16 whole": {"variant": "fp16"},
    "fp16 sharded": {"variant": "fp16", "max_shard_size": "10KB"},
}
COMPONENTS = ["transformer", "token_decoder"]  # one of diffusers' models, one of transformers'

# argument: the folder of a pipeline
PUSH = """
import json, sys
from huggingface_hub import HfApi
from ldlm_hf import LDLMPipeline

pipe = LDLMPipeline.from_pretrained(sys.argv[1])
found = {}
for name, push in {
    "whole": lambda: pipe.push_to_hub("org/tiny"),
    "fp16": lambda: pipe.push_to_hub("org/tiny", variant="fp16"),
    "sharded": lambda: pipe.push_to_hub("org/tiny", max_shard_size="10KB"),
    "whole again": lambda: pipe.save_pretrained(sys.argv[1] + "-again", push_to_hub=True, repo_id="org/tiny"),
}.items():
    push()
    files = HfApi().list_repo_files("org/tiny")
    found[name] = sorted(file for file in files if file.startswith("transformer/") and "safetensors" in file)
    LDLMPipeline.from_pretrained("org/tiny")
print(json.dumps(found))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(files: dict[str, bytes]) -> set[str]:
    return {name for name in files if ".safetensors" in name}


def saved(model: nn.Module, folder: Path, save: str) -> set[str]:
    """Names of the weights of a save into an empty folder."""
    model.save_pretrained(folder, **SAVES[save])
    return weights_of(contents(folder))


@pytest.mark.parametrize("second", SAVES)
@pytest.mark.parametrize("first", SAVES)
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_save_removes_what_it_supersedes_and_nothing_else(
    make_components: Callable[..., dict], tmp_path: Path, component: str, first: str, second: str
):
    model, successor = make_components(seed=0)[component], make_components(seed=1)[component]
    folder = tmp_path / "saved"
    model.save_pretrained(folder, **SAVES[first])
    for name in ("notes.txt", "samples-00001-of-00002.safetensors.txt", "model.ema-00001-of-00002.safetensors"):
        (folder / name).write_text(name)
    before = contents(folder)
    successor.save_pretrained(folder, **SAVES[second])
    after = contents(folder)

    is_superseded = SAVES[first].get("variant") == SAVES[second].get("variant")
    gone = saved(model, tmp_path / "first alone", first) if is_superseded else set()
    new = saved(successor, tmp_path / "second alone", second)
    assert after.keys() == (before.keys() - gone) | new
    assert all(after[name] == content for name, content in before.items() if name not in new | gone | {"config.json"})
    for save, expected in ((second, successor), *(() if is_superseded else ((first, model),))):
        loaded = type(model).from_pretrained(folder, variant=SAVES[save].get("variant"))
        torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("second", SAVES)
@pytest.mark.parametrize("first", SAVES)
def test_a_pipeline_saved_over_another_loads(make_pipeline, tmp_path: Path, first: str, second: str):
    make_pipeline().save_pretrained(tmp_path, **SAVES[first])
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path, **SAVES[second])
    for save in (first, second):
        loaded = LDLMPipeline.from_pretrained(tmp_path, variant=SAVES[save].get("variant"))
        found, expected = loaded.transformer.state_dict(), pipe.transformer.state_dict()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_a_push_replaces_the_weights_of_its_variant(make_pipeline, loopback_hub: LoopbackHub, tmp_path: Path):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    environment = loopback_hub.environment(tmp_path / "home", token="hf_org") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PUSH, str(tmp_path / "pipeline")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    whole, half = (f"transformer/diffusion_pytorch_model{infix}.safetensors" for infix in ("", ".fp16"))
    assert found["whole"] == [whole]
    assert found["fp16"] == found["whole again"] == [half, whole]
    assert whole not in found["sharded"] and half in found["sharded"] and len(found["sharded"]) > 3


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_save_that_fails_leaves_the_one_before(make_components: Callable[..., dict], tmp_path: Path, component: str):
    model = make_components()[component]
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    before = contents(tmp_path)
    for parameter_name, parameter in list(model.named_parameters())[-1:]:
        owner, _, name = parameter_name.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.Parameter(parameter.to("meta")))
    with pytest.raises(Exception, match="meta"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("loader", [LDLMPipeline, DiffusionPipeline])
def test_a_mix_of_variants_is_refused(make_pipeline, tmp_path: Path, loader: type[DiffusionPipeline]):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path, variant="fp16")
    for component in COMPONENTS:
        (path,) = (tmp_path / component).glob("*.fp16.safetensors")
        hidden = path.rename(tmp_path / path.name)
        with pytest.raises(OSError, match=rf"{component} holds no {path.name}"):
            loader.from_pretrained(tmp_path, variant="fp16")
        # a component of one's own is no mix
        given = {component: getattr(pipe, component)}
        assert getattr(loader.from_pretrained(tmp_path, variant="fp16", **given), component) is given[component]
        hidden.rename(path)
    loader.from_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="variant=ema"):
        loader.from_pretrained(tmp_path, variant="ema")


@pytest.mark.parametrize("form", [{"safe_serialization": False}, {"use_flashpack": True}])
def test_weights_in_forms_that_are_never_loaded_are_not_written(make_pipeline, tmp_path: Path, form: dict[str, bool]):
    pipe = make_pipeline()
    for part in (pipe, *(getattr(pipe, component) for component in COMPONENTS)):
        with pytest.raises(ValueError, match="safetensors only"):
            part.save_pretrained(tmp_path / "saved", **form)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("variant", ["", "a.b", "a/b"])
def test_variants_that_would_not_load_are_not_written(make_pipeline, tmp_path: Path, variant: str):
    pipe = make_pipeline()
    for part in (pipe, *(getattr(pipe, component) for component in COMPONENTS)):
        with pytest.raises(ValueError, match=f"variant='{variant}' must be"):
            part.save_pretrained(tmp_path / "saved", variant=variant)
    assert not (tmp_path / "saved").exists()


def test_pickles_are_not_pushed(make_pipeline, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="safetensors only"):
        make_pipeline().push_to_hub("org/tiny", safe_serialization=False)


TARGETS = {"transformer": ["proj_in", "proj_out"], "token_decoder": ["proj_in"]}


@pytest.mark.parametrize(
    ("component", "is_wrapped"), [("transformer", True), ("token_decoder", True), ("token_decoder", False)]
)
def test_adapters_are_refused_until_they_are_merged(make_pipeline, tmp_path: Path, component: str, is_wrapped: bool):
    """Whether the pipeline holds peft's wrapper, or the model that peft has put its layers into; those of a denoiser
    itself are saved beside it (test_lora.py)."""
    pipe = make_pipeline()
    model = getattr(pipe, component)
    config = peft.LoraConfig(target_modules=TARGETS[component], init_lora_weights=False)
    wrapper = peft.get_peft_model(model, config)
    if is_wrapped:
        setattr(pipe, component, wrapper)
    with pytest.raises(ValueError, match="adapters of peft"):
        model.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=rf"{component} holds adapters of peft.*merge_and_unload"):
        pipe.save_pretrained(tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []

    expected = pipe(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).sequences
    setattr(pipe, component, wrapper.merge_and_unload())
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = LDLMPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(
        loaded(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).sequences, expected
    )


def test_components_of_classes_that_do_not_load_again_are_refused(make_pipeline, tmp_path: Path):
    class OwnTransformer(LDLMTransformer1DModel):
        pass

    pipe = make_pipeline()
    given = pipe.transformer
    for other in (DataParallel(given), OwnTransformer.from_config(given.config)):
        pipe.transformer = other
        with pytest.raises(ValueError, match=rf"transformer is a {type(other).__name__} .*LDLMTransformer1DModel"):
            pipe.save_pretrained(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_compiled_component_is_saved_as_the_model_that_it_is(make_pipeline, tmp_path: Path):
    pipe = make_pipeline()
    expected = pipe.transformer.state_dict()
    pipe.transformer = torch.compile(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    loaded = LDLMPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is LDLMTransformer1DModel
    torch.testing.assert_close(loaded.transformer.state_dict(), expected, rtol=0, atol=0)
