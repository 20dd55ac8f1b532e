"""LoRA adapters by diffusers' names: on models and pipelines, in its files, fused, weighted, saved, safely loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from ldlm_hf import LDLMPipeline, MDLMScheduler, TokenDiffusionPipeline, TokenDiffusionTransformer
from ldlm_hf.loading.lora_file import lora_config


LAYERS = ["to_qkv", "to_out"]
FILE = "pytorch_lora_weights.safetensors"


def add_adapter(model: Any, name: str = "default", learned: bool = True, seed: int = 0, **settings: Any) -> None:
    """A new adapter; it changes nothing until its second matrix has learned something."""
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": LAYERS} | settings), name)
    if learned:
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:
                nn.init.normal_(parameter, std=0.5)


def sample(pipe: Any) -> torch.Tensor:
    """Latents, or token ids of a token-level pipeline."""
    pipe.set_progress_bar_config(disable=True)
    output_type = "latent" if isinstance(pipe, LDLMPipeline) else "seq"
    generator = torch.Generator().manual_seed(0)
    output = pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type=output_type)
    return output.latents if output_type == "latent" else output.sequences


def save_adapter(pipe: Any, folder: Path, name: str = "default", **arguments: Any) -> None:
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name=name)
    metadata = pipe.transformer.peft_config[name].to_dict()
    pipe.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata, **arguments)


@pytest.fixture
def make_token_pipeline(tiny_tokenizer, randomize: Callable) -> Callable[[], TokenDiffusionPipeline]:
    def make() -> TokenDiffusionPipeline:
        torch.manual_seed(0)
        sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
        transformer = TokenDiffusionTransformer(len(tiny_tokenizer), **sizes, condition_size=8).eval()
        return TokenDiffusionPipeline(randomize(transformer, 0.5), MDLMScheduler(), tiny_tokenizer)

    return make


@pytest.fixture(params=["ldlm", "token diffusion"])
def make_pipe(request: pytest.FixtureRequest, make_pipeline: Callable, make_token_pipeline: Callable) -> Callable:
    return make_pipeline if request.param == "ldlm" else make_token_pipeline


# 1. Models


def test_a_new_adapter_changes_nothing_and_a_trained_one_does(make_pipe: Callable) -> None:
    pipe = make_pipe()
    expected = sample(pipe)
    add_adapter(pipe.transformer, learned=False)
    assert torch.equal(sample(pipe), expected)
    assert pipe.get_active_adapters() == ["default"]
    add_adapter(pipe.transformer, "other")
    assert not torch.equal(sample(pipe), expected)
    pipe.disable_lora()
    assert torch.equal(sample(pipe), expected)
    pipe.enable_lora()
    pipe.delete_adapters("other")
    assert pipe.get_list_adapters() == {"transformer": ["default"]}
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), expected)
    assert not any("lora" in name for name in pipe.transformer.state_dict())


def test_fused_equals_unfused(make_pipe: Callable) -> None:
    pipe = make_pipe()
    plain = sample(pipe)
    add_adapter(pipe.transformer)
    expected = sample(pipe)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"default"} and pipe.num_fused_loras == 1
    torch.testing.assert_close(sample(pipe), expected, rtol=1e-3, atol=1e-4)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    torch.testing.assert_close(sample(pipe), expected, rtol=1e-3, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe), plain, rtol=1e-3, atol=1e-4)


def test_adapters_train_and_nothing_else_does(make_components: Callable) -> None:
    transformer = make_components()["transformer"].requires_grad_(False)
    add_adapter(transformer)
    transformer(torch.randn(2, 6, 16), torch.rand(2)).sample.square().sum().backward()
    trained = {name for name, parameter in transformer.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2  # blocks, layers, matrices
    assert all(".lora_" in name for name in trained)


def test_two_adapters_are_weighted(make_pipeline: Callable, tmp_path: Path) -> None:
    """W + 0.5 B1 A1 + 0.25 B2 A2, times alpha / r = 2."""
    pipe = make_pipeline()
    weight = pipe.transformer.blocks[1].attention.to_out.weight.detach().clone()
    expected = weight.clone()
    for seed, (name, scale) in enumerate({"one": 0.5, "two": 0.25}.items()):
        add_adapter(pipe.transformer, name, seed=seed)
        layers = get_peft_model_state_dict(pipe.transformer, adapter_name=name)
        layer = "blocks.1.attention.to_out"
        expected += 2 * scale * layers[f"{layer}.lora_B.weight"] @ layers[f"{layer}.lora_A.weight"]
    pipe.set_adapters(["one", "two"], [0.5, 0.25])
    assert pipe.get_active_adapters() == ["one", "two"]
    both = sample(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(pipe.transformer.blocks[1].attention.to_out.weight, expected)
    torch.testing.assert_close(sample(pipe), both, rtol=1e-3, atol=1e-4)


def test_attention_processors_are_those_of_diffusers_models(make_pipe: Callable) -> None:
    transformer = make_pipe().transformer
    processors = transformer.attn_processors
    assert list(processors) == ["blocks.0.attention.processor", "blocks.1.attention.processor"]
    before = transformer.state_dict()
    transformer.fuse_qkv_projections()  # they are fused
    transformer.unfuse_qkv_projections()
    assert transformer.state_dict().keys() == before.keys()

    class Counting(type(next(iter(processors.values())))):  # type: ignore[misc]
        calls = 0

        def __init__(self, other: Any):
            vars(self).update(vars(other))

        def __call__(self, *arguments: Any) -> torch.Tensor:
            Counting.calls += 1
            return super().__call__(*arguments)

    inputs = [torch.randn(1, 6, 16), 0.5] if hasattr(transformer, "proj_in") else [torch.randint(0, 9, (1, 8))]
    expected = transformer(*inputs)[0]
    transformer.set_attn_processor({name: Counting(one) for name, one in processors.items()})
    assert torch.equal(transformer(*inputs)[0], expected) and Counting.calls == 2
    with pytest.raises(ValueError, match="number of attention layers: 2"):
        transformer.set_attn_processor({})


# 2. Files


def test_a_file_has_diffusers_layout_and_gives_the_same_samples(make_pipe: Callable, tmp_path: Path) -> None:
    pipe = make_pipe()
    add_adapter(pipe.transformer, alpha_pattern={"blocks.0.attention.to_out": 9}, rank_pattern={"to_qkv": 3})
    expected = sample(pipe)
    save_adapter(pipe, tmp_path)
    weights = load_file(tmp_path / FILE)
    assert "transformer.blocks.0.attention.to_qkv.lora_A.weight" in weights and len(weights) == 8
    other = make_pipe()
    other.load_lora_weights(tmp_path)
    assert torch.equal(sample(other), expected)
    assert other.get_active_adapters() == ["default_0"]
    with pytest.raises(ValueError, match="default_0 already in use"):
        other.load_lora_weights(tmp_path / FILE, adapter_name="default_0")
    other.load_lora_weights(weights, adapter_name="without metadata")  # alpha is the rank then
    assert not torch.equal(sample(other), expected)
    other.set_adapters("default_0")
    assert torch.equal(sample(other), expected)
    alone = make_pipe().transformer
    pipe.transformer.save_lora_adapter(tmp_path / "alone")
    alone.load_lora_adapter(tmp_path / "alone", prefix=None)
    found = get_peft_model_state_dict(alone, adapter_name="default_0")
    saved = get_peft_model_state_dict(pipe.transformer)
    torch.testing.assert_close(found, saved, rtol=0, atol=0)


EVERY_LAYER = ["to_qkv", "to_out", "linear", "linear_1", "linear_2", "linear_in", "linear_out", "proj_in", "proj_out"]


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"r": 5}, {"target_modules": EVERY_LAYER}],
)
def test_kinds_of_lora_load_as_they_were(make_pipeline: Callable, tmp_path: Path, settings: dict[str, Any]) -> None:
    pipe = make_pipeline()
    add_adapter(pipe.transformer, **settings)
    save_adapter(pipe, tmp_path)
    other = make_pipeline()
    other.load_lora_weights(tmp_path)
    torch.testing.assert_close(sample(other), sample(pipe))


def test_hotswapping_puts_an_adapter_in_anothers_place(make_pipeline: Callable, tmp_path: Path) -> None:
    pipe = make_pipeline()
    add_adapter(pipe.transformer, seed=1)
    expected = sample(pipe)
    save_adapter(pipe, tmp_path)
    other = make_pipeline()
    add_adapter(other.transformer, seed=2)
    other.load_lora_weights(tmp_path, adapter_name="default", hotswap=True)
    assert torch.equal(sample(other), expected)


def test_a_half_precision_model_gets_adapters_of_its_type(make_pipeline: Callable, tmp_path: Path) -> None:
    pipe = make_pipeline()
    add_adapter(pipe.transformer)
    save_adapter(pipe, tmp_path)
    other = make_pipeline()
    other.transformer.to(torch.bfloat16)
    other.load_lora_weights(tmp_path)
    assert {parameter.dtype for parameter in other.transformer.parameters()} == {torch.bfloat16}
    assert torch.isfinite(sample(other)).all()


# 3. Pipelines that have adapters


@pytest.mark.parametrize("names", [["default"], ["one", "two"]])
def test_a_pipeline_is_saved_with_its_adapters_beside_it(
    make_pipe: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str]
) -> None:
    pipe = make_pipe()
    plain = sample(pipe)
    for seed, name in enumerate(names):
        add_adapter(pipe.transformer, name, seed=seed)
    expected = sample(pipe)
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path)
    assert torch.equal(sample(pipe), expected)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    files = index["_lora_weights"]
    assert list(files) == names and (
        files == {"default": FILE} or "pytorch_lora_weights_one.safetensors" in files["one"]
    )
    assert all(f"weight_name={file!r}, adapter_name={name!r}" in caplog.text for name, file in files.items())
    for loader in (type(pipe), DiffusionPipeline):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = loader.from_pretrained(tmp_path)
        assert "saved with adapters" in caplog.text
        assert torch.equal(sample(loaded), plain)
        for name, file in files.items():
            loaded.load_lora_weights(tmp_path, weight_name=file, adapter_name=name)
        assert torch.equal(sample(loaded), expected)

    # of what lies there already nothing is removed, and a variant is of the same pipeline
    loaded.unload_lora_weights()
    for variant, listed in (("fp16", files), (None, None)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded.save_pretrained(tmp_path, variant=variant)
        assert ("stay in their files" in caplog.text) == (variant is None)
        index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
        assert index.get("_lora_weights") == listed
        assert all((tmp_path / file).is_file() for file in files.values())


def test_fused_adapters_are_saved_in_the_weights(make_pipeline: Callable, tmp_path: Path) -> None:
    pipe = make_pipeline()
    add_adapter(pipe.transformer)
    pipe.fuse_lora()
    expected = sample(pipe)
    (tmp_path / FILE).write_text("one's own")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_text() == "one's own"
    loaded = LDLMPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(sample(loaded), expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("default", {"modules_to_save": ["proj_out"]}, "no LoRA weight"),
        ("default", {"bias": "all"}, "no LoRA weight"),
        ("a/b", {}, "letters, digits"),
    ],
)
def test_adapters_that_would_not_load_again_are_refused(
    make_pipeline: Callable, tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    pipe = make_pipeline()
    add_adapter(pipe.transformer, name, learned=False, **settings)
    with pytest.raises(ValueError, match=f"{name}' of transformer would not load again: .*{message}"):
        pipe.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="holds adapters of peft.*save_lora_adapter"):
        pipe.transformer.save_pretrained(tmp_path)


# 4. Files of others


def plain_weights() -> dict[str, torch.Tensor]:
    layer = "transformer.blocks.0.attention.to_out"  # of width 24
    return {f"{layer}.lora_A.weight": torch.randn(2, 24), f"{layer}.lora_B.weight": torch.randn(24, 2)}


def put(folder: Path, weights: dict[str, torch.Tensor], metadata: Any = None) -> Path:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(weights, folder / FILE, metadata=None if metadata is None else {LORA_ADAPTER_METADATA_KEY: text})
    return folder


def of_transformer(metadata: dict[str, Any]) -> dict[str, Any]:
    return {f"transformer.{key}": value for key, value in ({"lora_alpha": 2} | metadata).items()}


FOREIGN_WEIGHTS = {
    "of another part": ({"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, "begin with transformer."),
    "of no layer": ({"transformer.blocks.7.attention.to_out.lora_A.weight": torch.ones(2, 24)}, "no LoRA weight"),
    "of a parameter": ({"transformer.positions.lora_A.weight": torch.ones(2, 24)}, "no LoRA weight"),
    "whole weights": ({"transformer.proj_in.weight": torch.ones(24, 32)}, "no LoRA weight"),
    "one half": ({"transformer.blocks.0.attention.to_out.lora_A.weight": torch.ones(2, 24)}, "lacks one of"),
    "another width": (
        plain_weights() | {"transformer.blocks.0.attention.to_out.lora_B.weight": torch.ones(25, 2)},
        "of another model",
    ),
    "two ranks": (
        plain_weights() | {"transformer.blocks.0.attention.to_out.lora_B.weight": torch.ones(24, 3)},
        "of another model",
    ),
    "a number": (
        plain_weights() | {"transformer.blocks.0.attention.to_out.lora_A.weight": torch.tensor(1.0)},
        "of another model",
    ),
}
FOREIGN_METADATA = {
    "no JSON": ("{", "not valid JSON"),
    "no object": ("[]", "flat JSON object"),
    "deep": ('{"transformer.a":' + 40 * "[" + 40 * "]" + "}", "flat JSON object"),
    "modules to import": (of_transformer({"megatron_config": {"a": 1}}), "megatron_config"),
    "copied layers": (of_transformer({"layer_replication": [[0, 9]]}), "layer_replication"),
    "other weights": (of_transformer({"modules_to_save": ["proj_in"]}), "modules_to_save"),
    "biases": (of_transformer({"bias": "all"}), "bias"),
    "changed layers": (of_transformer({"init_lora_weights": "pissa"}), "init_lora_weights"),
    "another kind": (of_transformer({"peft_type": "LOHA"}), "peft_type"),
    "what no version knows": (of_transformer({"use_something": True}), "use_something"),
    "an expression": (of_transformer({"alpha_pattern": {"(a+)+$": 2}}), "alpha_pattern"),
    "no number": (of_transformer({"lora_alpha": "2"}), "finite number"),
    "infinity": (of_transformer({"lora_alpha": float("inf")}), "finite number"),
    "no alpha": (of_transformer({"lora_alpha": None}), "finite number"),
}


@pytest.mark.parametrize("case", [*FOREIGN_WEIGHTS, *FOREIGN_METADATA])
def test_files_that_are_no_adapter_of_this_model_change_nothing(
    make_pipeline: Callable, tmp_path: Path, case: str
) -> None:
    pipe = make_pipeline()
    expected = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    weights, message = FOREIGN_WEIGHTS.get(case, (plain_weights(), ""))
    metadata, message = FOREIGN_METADATA.get(case, (None, message))
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(put(tmp_path, weights, metadata))
    torch.testing.assert_close(pipe.transformer.state_dict(), expected, rtol=0, atol=0)
    assert not getattr(pipe.transformer, "peft_config", {})


def test_ranks_and_expressions_of_metadata_are_not_read(make_pipeline: Callable, tmp_path: Path) -> None:
    """Neither may ask for memory or time."""
    hostile = {
        "r": 10**12,
        "rank_pattern": {"to_out": 10**12},
        "target_modules": "(a+)+$",
        "exclude_modules": "(a+)+$",
    }
    config = lora_config(
        make_pipeline().transformer,
        {name.removeprefix("transformer."): value for name, value in plain_weights().items()},
        {"lora_alpha": 2} | hostile,
    )
    assert config["r"] == 2 and config["rank_pattern"] == {}
    assert config["target_modules"] == ["blocks.0.attention.to_out"]
    pipe = make_pipeline()
    pipe.load_lora_weights(put(tmp_path, plain_weights(), of_transformer(hostile)))
    assert sum("lora_A" in name for name in pipe.transformer.state_dict()) == 1


@pytest.mark.parametrize("arguments", [{"weight_name": "pytorch_lora_weights.bin"}, {"use_safetensors": False}])
def test_pickles_are_never_read(make_pipeline: Callable, tmp_path: Path, arguments: dict[str, Any]) -> None:
    pipe = make_pipeline()
    torch.save(plain_weights(), tmp_path / "pytorch_lora_weights.bin")
    for loads in (pipe.load_lora_weights, pipe.transformer.load_lora_adapter):
        with pytest.raises(ValueError, match="safetensors only"):
            loads(tmp_path, **arguments)
        with pytest.raises(ValueError, match="safetensors only"):
            loads(tmp_path / "pytorch_lora_weights.bin")
        with pytest.raises(OSError, match="no such file"):
            loads(tmp_path)
        with pytest.raises(OSError, match="no such folder or file, and a repository on the Hub is OWNER/NAME"):
            loads("runs/never-trained/lora")
    with pytest.raises(ValueError, match="safetensors only"):
        pipe.save_lora_weights(tmp_path, plain_weights(), safe_serialization=False)
    with pytest.raises(ValueError, match="no weights"):
        pipe.save_lora_weights(tmp_path)


def test_an_index_names_adapters_and_no_other_files(make_pipeline: Callable, tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "victim.safetensors").write_text("stays")
    index_file = tmp_path / "pipeline" / "model_index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    for files in ({"default": "../victim.safetensors"}, {"../victim": FILE}, ["default"], "default"):
        index_file.write_text(json.dumps(index | {"_lora_weights": files}), encoding="utf-8")
        LDLMPipeline.from_pretrained(tmp_path / "pipeline").save_pretrained(tmp_path / "pipeline")
        assert (tmp_path / "victim.safetensors").exists()


# 5. The code of a repository


# arguments: the folder of a pipeline that was saved with an adapter
OWN_CODE = """
import importlib.util, json, sys
if "blocked" in sys.argv:
    sys.modules["peft"] = None
import torch
from diffusers import DiffusionPipeline

assert importlib.util.find_spec("ldlm_hf") is None
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)

def sample():
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="latent").latents.tolist()

found = {"plain": sample()}
try:
    pipe.load_lora_weights(sys.argv[1])
    found["adapted"] = sample()
    pipe.save_pretrained(sys.argv[1] + "-again")
    pipe.unload_lora_weights()
    found["unloaded"] = sample()
except ValueError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def test_a_repositorys_code_loads_adapters_and_needs_no_peft_without(
    make_pipeline: Callable, run_python: Callable, tmp_path: Path
) -> None:
    pipe = make_pipeline()
    plain = sample(pipe)
    add_adapter(pipe.transformer)
    adapted = sample(pipe)
    pipe.save_pretrained(tmp_path / "pipeline")
    found = run_python(OWN_CODE, tmp_path / "pipeline", installed=False)
    for name, expected in {"plain": plain, "adapted": adapted, "unloaded": plain}.items():
        torch.testing.assert_close(torch.tensor(found[name]), expected)
    assert (tmp_path / "pipeline-again" / FILE).is_file()

    found = run_python(OWN_CODE, tmp_path / "pipeline", "blocked", installed=False)
    torch.testing.assert_close(torch.tensor(found["plain"]), plain)
    assert "pip install peft" in found["error"]
