"""Loads hostile repositories, each in a process of its own, and writes what came of it to hostile_repositories.md.

    python checks/hostile_repositories.py

Every case changes a copy of an honest repository and loads it in one or more ways. It has to end with ValueError or
OSError and the expected message (or, where the hostile part must be ignored, with a model), leave the canary alone,
which pickles and code files would write, and stay within the limits of memory and time. Exits with 1 if any does not.

Processes are forked from one that has imported the package and done nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import ldlm_hf
from ldlm_hf.evaluation.machine import device_name, versions
from ldlm_hf.evaluation.markdown import markdown_table
from tiny_pipeline import build_pipeline


TRANSFORMER, LATENT_ENCODER, LATENT_DECODER = "transformer", "latent_encoder", "latent_decoder"
TOKEN_ENCODER, TOKEN_DECODER = "token_encoder", "token_decoder"
COMPONENTS: dict[str, Any] = {
    TRANSFORMER: ldlm_hf.LDLMTransformer1DModel,
    LATENT_ENCODER: ldlm_hf.LDLMLatentEncoder,
    LATENT_DECODER: ldlm_hf.LDLMLatentDecoder,
    TOKEN_DECODER: ldlm_hf.LDLMTokenDecoder,
    TOKEN_ENCODER: ldlm_hf.LDLMTokenEncoder,
    "scheduler": ldlm_hf.TangentEulerMaruyamaScheduler,
}
PIPELINES = ("LDLMPipeline", "DiffusionPipeline")
CANARY = "canary"

# what a case may take beyond an honest load, as a safety net: address space, which torch needs much of, and time
ADDRESS_SPACE_BYTES = 32 * 2**30
TIME_LIMIT_SECONDS = 120
# above the peak of an honest load in the same way; the largest allowed slack of a construction is 2**24 elements
MEMORY_SLACK_MIB = 256


# of a file; a function where it is large, so that it takes no memory of the process that forks
Content = str | bytes | Callable[[], str | bytes]


@dataclass(frozen=True)
class Case:
    """A change that makes an honest repository hostile.

    Attributes:
        name: what the change is.
        change: makes it, in a folder that may be written to.
        match: pattern that the error's message must hold; None if the repository must load nevertheless.
        component: the one that is changed, and loaded alone too; None for the pipeline as a whole.
        ways: ways of loading; see [`load`].
        arguments: further arguments of `from_pretrained`.
    """

    name: str
    change: Callable[[Path], Any]
    match: str | None
    component: str | None = None
    ways: tuple[str, ...] = ("component", "LDLMPipeline", "DiffusionPipeline")
    arguments: dict[str, Any] = field(default_factory=dict)


def load(way: str, repository: Path, component: str | None, arguments: dict[str, Any]) -> Any:
    """Loads a repository, or one component of it.

    Args:
        way: `"LDLMPipeline"` or `"DiffusionPipeline"`; `"component"`: the class of the component, with the subfolder;
            `"AutoModel"`: of transformers.
    """
    if way in PIPELINES:
        pipeline_class = ldlm_hf.LDLMPipeline if way == "LDLMPipeline" else DiffusionPipeline
        return pipeline_class.from_pretrained(repository, **arguments)
    assert component is not None
    if way == "AutoModel":
        return AutoModel.from_pretrained(repository / component, **arguments)
    return COMPONENTS[component].from_pretrained(repository, subfolder=component, **arguments)


def make_repository(folder: Path, width: int = 384, num_layers: int = 4, vocab_size: int = 8192) -> None:
    """Saves an honest pipeline with random weights."""
    build_pipeline(0, width, num_layers, vocab_size).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- changes


def config_file(component: str) -> str:
    return f"{component}/scheduler_config.json" if component == "scheduler" else f"{component}/config.json"


def weights_file(component: str) -> str:
    return f"{component}/{'diffusion_pytorch_model' if component == TRANSFORMER else 'model'}.safetensors"


def write(repository: Path, name: str, content: Content) -> None:
    """Replaces a file; the honest repository's own stays as it is where the copy is a link to it."""
    path = repository / name
    if callable(content):
        content = content()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(name: str, **settings: Any) -> Callable[[Path], None]:
    """Changes settings of a JSON file."""

    def change(repository: Path) -> None:
        content = json.loads((repository / name).read_text())
        write(repository, name, json.dumps(content | settings))

    return change


def edit_backbone(**settings: Any) -> Callable[[Path], None]:
    """Changes settings of the language model inside the token encoder's configuration."""

    def change(repository: Path) -> None:
        name = config_file(TOKEN_ENCODER)
        content = json.loads((repository / name).read_text())
        content["backbone_config"] |= settings
        write(repository, name, json.dumps(content))

    return change


def put(name: str, content: Content) -> Callable[[Path], None]:
    return lambda repository: write(repository, name, content)


class Explosive:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


def explosive_code(repository: Path) -> str:
    return f"open({str(repository / CANARY)!r}, 'w').close()\n"


def put_code(name: str, *others: Callable[[Path], None]) -> Callable[[Path], None]:
    """Puts a Python file that writes the canary, and makes further changes."""

    def change(repository: Path) -> None:
        write(repository, name, explosive_code(repository))
        for other in others:
            other(repository)

    return change


def put_pickle(name: str, in_zip: bool, instead_of: str | None = None) -> Callable[[Path], None]:
    """Puts weights that write the canary when they are unpickled: a plain pickle, or torch's archive of one."""

    def change(repository: Path) -> None:
        if instead_of is not None:
            (repository / instead_of).unlink()
        content = {"weight": Explosive(repository / CANARY)}
        write(repository, name, b"")
        if in_zip:
            torch.save(content, repository / name)
        else:
            (repository / name).write_bytes(pickle.dumps(content))

    return change


def put_index(component: str, shard: str, *others: Callable[[Path], None]) -> Callable[[Path], None]:
    """Lets an index say that the weights lie in `shard`."""

    def change(repository: Path) -> None:
        weights = repository / weights_file(component)
        weight_map = dict.fromkeys(load_file(weights), shard)
        weights.rename(repository / "outside.safetensors")
        write(
            repository,
            f"{weights_file(component)}.index.json",
            json.dumps({"metadata": {}, "weight_map": weight_map}),
        )
        for other in others:
            other(repository)

    return change


def put_header(
    component: str, header: Callable[[], Any], size: int | None = None, body: bytes = b""
) -> Callable[[Path], None]:
    """Writes a safetensors file with any header: an object, or bytes; `size` is what the file says of its length."""

    def content() -> bytes:
        value = header()
        encoded = value if isinstance(value, bytes) else json.dumps(value).encode()
        return struct.pack("<Q", len(encoded) if size is None else size) + encoded + body

    return put(weights_file(component), content)


def edit_weights(component: str, change_tensors: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(repository: Path) -> None:
        path = repository / weights_file(component)
        tensors = load_file(path)
        change_tensors(tensors)
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def move_weights(component: str, name: str) -> Callable[[Path], Any]:
    return lambda repository: (repository / weights_file(component)).rename(repository / component / name)


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(repository: Path) -> None:
        (repository / name).unlink(missing_ok=True)
        (repository / name).symlink_to(target)

    return change


def make_pipe(name: str) -> Callable[[Path], None]:
    def change(repository: Path) -> None:
        (repository / name).unlink()
        os.mkfifo(repository / name)

    return change


def change_nothing(repository: Path) -> None:
    pass


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def empty_tensors(count: int) -> dict[str, Any]:
    return {f"{index:06}": tensor([0], 0, 0) for index in range(count)}


# ---------------------------------------------------------------------------------------------- cases


def honest_cases() -> Iterator[Case]:
    yield Case("the honest repository", change_nothing, None, None, PIPELINES)
    for component in COMPONENTS:
        yield Case("the honest repository", change_nothing, None, component, ("component",))
    yield Case("the honest repository", change_nothing, None, LATENT_DECODER, ("AutoModel",))


def pickle_cases() -> Iterator[Case]:
    for component in (TRANSFORMER, LATENT_DECODER):
        weights = weights_file(component)
        pickled = f"{component}/{'diffusion_pytorch_model' if component == TRANSFORMER else 'pytorch_model'}.bin"
        in_index = put_index(component, "pickled.bin", put_pickle(f"{component}/pickled.bin", True))
        garbage = "no safetensors file|no valid safetensors"
        changes = (
            ("pickle instead of safetensors", put_pickle(pickled, True, weights), "holds no .*safetensors"),
            ("pickle named .safetensors", put_pickle(weights, False), garbage),
            ("torch archive named .safetensors", put_pickle(weights, True), garbage),
            ("shard index that names a pickle", in_index, "'pickled.bin' is no safetensors file"),
        )
        ways = ("component", *PIPELINES, *(() if component == TRANSFORMER else ("AutoModel",)))
        for name, change, match in changes:
            yield Case(name, change, match, component, ways)
        yield Case("pickle beside safetensors", put_pickle(pickled, True), None, component)
        yield Case(
            "pickle beside safetensors, use_safetensors=False",
            put_pickle(pickled, True),
            "use_safetensors=False asks for pickled",
            component,
            arguments={"use_safetensors": False},
        )


def code_cases() -> Iterator[Case]:
    index, tokenizer_config = "model_index.json", "tokenizer/tokenizer_config.json"
    classes = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    by_path = {"AutoTokenizer": ["modeling.T", "modeling.T"]}
    evil_index = edit(index, _class_name=["evil", "LDLMPipeline"])

    def code_outside(repository: Path) -> None:
        write(repository.parent, f"{repository.name}.py", explosive_code(repository))
        edit(index, _class_name=[f"../{repository.name}", "LDLMPipeline"])(repository)

    of_pipelines: list[tuple[str, Callable[[Path], Any], str | None]] = [
        (
            "code of the pipeline in the published layout",
            put_code("pipeline_ldlm.py", edit(index, _class_name=["pipeline_ldlm", "LDLMPipeline"])),
            None,
        ),
        ("code of a pipeline of another name", put_code("evil.py", evil_index), "trust_remote_code"),
        ("code of a pipeline outside of the repository", code_outside, "trust_remote_code"),
        (
            "code of a component of another name",
            put_code("transformer/evil.py", edit(index, transformer=["evil", "LDLMTransformer1DModel"])),
            "transformer=.*is not what",
        ),
        (
            "auto_map of the tokenizer, to be loaded by AutoTokenizer",
            put_code(
                "tokenizer/modeling.py",
                edit(tokenizer_config, auto_map=by_path),
                edit(index, tokenizer=["transformers", "AutoTokenizer"]),
            ),
            "tokenizer=.*is not what",
        ),
    ]
    for name, change, match in of_pipelines:
        yield Case(name, change, match, ways=PIPELINES)
    yield Case(
        "custom_pipeline given, in the repository",
        put_code("evil.py"),
        "trust_remote_code",
        ways=PIPELINES,
        arguments={"custom_pipeline": "evil"},
    )
    for component in (TRANSFORMER, LATENT_DECODER, "scheduler"):
        code = put_code(f"{component}/ldlm_hf.py")
        yield Case("code of a component in the published layout", code, None, component)

    config, code_file = config_file(LATENT_DECODER), f"{LATENT_DECODER}/modeling.py"
    ways = ("component", *PIPELINES, "AutoModel")
    known = put_code(code_file, edit(config, auto_map=classes))
    yield Case("auto_map beside a known model_type", known, None, LATENT_DECODER, ways)
    unknown = put_code(code_file, edit(config, auto_map=classes, model_type="evil"))
    yield Case("auto_map and an unknown model_type", unknown, "trust_remote_code", LATENT_DECODER, ("AutoModel",))
    for key, value in (
        ("attn_implementation", "evil/kernel"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("transformers_weights", "../outside.safetensors"),
    ):
        change = edit(config, **{key: value})
        yield Case(f"{key} in config.json", change, f"{key}=.*is not allowed", LATENT_DECODER)
    for key, value in (("auto_map", classes), ("_attn_implementation", "evil/kernel")):
        change = put_code(f"{TOKEN_ENCODER}/modeling.py", edit_backbone(**{key: value}))
        name = f"{key} in the backbone's configuration"
        yield Case(name, change, f"{key}=.*is not allowed", TOKEN_ENCODER)
    adapter = put(f"{LATENT_DECODER}/adapter_config.json", '{"base_model_name_or_path": "evil/model"}')
    match = "adapter_config.json, which would be loaded instead"
    yield Case("adapter that names another model", adapter, match, LATENT_DECODER)


def index_cases() -> Iterator[Case]:
    no_component, no_pair = "is not what", "must be"
    for component, entry, match in (
        (TRANSFORMER, ["os", "system"], no_component),
        (TRANSFORMER, ["transformers", "BertModel"], no_component),
        (TRANSFORMER, ["ldlm_hf", "load_corpora"], no_component),
        (TRANSFORMER, ["ldlm_hf", None], no_component),
        (TRANSFORMER, [None, "LDLMTransformer1DModel"], no_component),
        (LATENT_DECODER, ["ldlm_hf", "LDLMTokenDecoder"], no_component),
        ("scheduler", ["diffusers", "DDPMScheduler"], no_component),
        ("tokenizer", ["transformers", "no_such_class"], no_component),
        ("tokenizer", ["transformers", ["list"]], no_component),
        (TRANSFORMER, "LDLMTransformer1DModel", no_pair),
        (TRANSFORMER, ["ldlm_hf"], no_pair),
        (TRANSFORMER, 5, no_pair),
        (TRANSFORMER, {"ldlm_hf": "LDLMTransformer1DModel"}, no_pair),
    ):
        change = edit("model_index.json", **{component: entry})
        yield Case(f"model_index.json: {component}={json.dumps(entry)}", change, match, ways=PIPELINES)
    for name in ("../outside", "/etc", "safety_checker"):
        change = edit("model_index.json", **{name: ["ldlm_hf", "LDLMTokenDecoder"]})
        yield Case(f"model_index.json: a component {name!r}", change, "names a component", ways=PIPELINES)
    for component in (TRANSFORMER, LATENT_DECODER):
        for shard in ("../outside.safetensors", "/etc/outside.safetensors", "..", "sub/x.safetensors"):
            name = f"shard index: {shard!r}"
            yield Case(name, put_index(component, shard), "is no safetensors file beside", component)
        missing = put_index(component, "missing.safetensors")
        yield Case("shard index: a file that is missing", missing, "but there is no such file", component)
        other = put_index(
            component,
            "x.safetensors",
            put_header(component, lambda: {"x": tensor([1], 0, 4)}, body=bytes(4)),
            move_weights(component, "x.safetensors"),
        )
        name = "shard index: tensors that its file does not hold"
        yield Case(name, other, "do not hold the same tensors", component)
        index = f"{weights_file(component)}.index.json"
        yield Case("shard index beside whole weights", put(index, "{}"), "holds both", component)
        yield Case("weights: link to a device", link(weights_file(component), "/dev/zero"), "holds no", component)
        yield Case("weights: named pipe", make_pipe(weights_file(component)), "holds no", component)


def header_cases() -> Iterator[Case]:
    invalid, too_long, value = "no valid safetensors", "would have a header", bytes(4)

    def blanks() -> bytes:
        return b"{}" + b" " * (2**23 - 2)

    def overlapping() -> dict[str, Any]:
        return {"x": tensor([2], 0, 8), "y": tensor([2], 4, 12)}

    # name, pattern of the message, header, its declared size, the bytes behind it
    headers: list[tuple[str, str, Callable[[], Any], int | None, bytes]] = [
        ("length 2^60", too_long, dict, 2**60, b""),
        ("length beyond the file", invalid, dict, 2**16, b""),
        ("100 MB of blanks", too_long, lambda: b" " * 10**8, None, b""),
        ("8 MiB of blanks", "outgrows|weights lack", blanks, None, b""),
        ("empty file", invalid, bytes, 0, b""),
        ("no JSON", invalid, lambda: b"\xff" * 64, None, b""),
        ("nested 10^6 deep", invalid, lambda: b'{"x":' * 10**6, None, b""),
        ("[2^40] beyond the file", invalid, lambda: {"x": tensor([2**40], 0, 2**42)}, None, b""),
        ("[2^40] on 4 bytes", invalid, lambda: {"x": tensor([2**40], 0, 4)}, None, value),
        ("[2^40, 2^40]", invalid, lambda: {"x": tensor([2**40, 2**40], 0, 4)}, None, value),
        ("negative shape", invalid, lambda: {"x": tensor([-1], 0, 4)}, None, value),
        ("negative offset", invalid, lambda: {"x": tensor([1], -4, 0)}, None, value),
        ("overlapping tensors", invalid, overlapping, None, bytes(12)),
        ("bytes of no tensor", invalid, lambda: {"x": tensor([1], 0, 4)}, None, bytes(1000)),
        ("unknown type", invalid, lambda: {"x": tensor([1], 0, 4, "OBJECT")}, None, value),
        ("10^6 tensors", too_long, lambda: empty_tensors(10**6), None, b""),
        ("100 000 tensors", "holds 100000 tensors", lambda: empty_tensors(100_000), None, b""),
    ]
    for component, ways in (
        (TRANSFORMER, ("component", "LDLMPipeline")),
        (LATENT_DECODER, ("component", "AutoModel")),
    ):
        for name, match, header, size, body in headers:
            change = put_header(component, header, size, body)
            yield Case(f"safetensors header: {name}", change, match, component, ways)


def config_cases() -> Iterator[Case]:
    outgrown = "outgrows its weights|can be built from it|by config.json"
    mistyped = "=.* must be of type"
    latent = [("hidden_size", 2**40), ("num_hidden_layers", 10**9)]
    settings: dict[str, list[tuple[str, Any]]] = {
        TRANSFORMER: [("attention_head_dim", 2**40), ("num_layers", 10**9), ("sample_size", 2**50)],
        LATENT_ENCODER: [*latent, ("num_latents", 2**50)],
        LATENT_DECODER: [*latent, ("sequence_length", 2**50)],
        TOKEN_DECODER: [*latent, ("vocab_size", 2**50)],
        TOKEN_ENCODER: [("hidden_size", 2**40)],
    }
    for component, values in settings.items():
        name = config_file(component)
        ways = ("component", *PIPELINES, *(() if component == TRANSFORMER else ("AutoModel",)))
        for key, value in values:
            yield Case(f"config.json: {key}={value}", edit(name, **{key: value}), outgrown, component, ways)
        key = values[-1][0] if component != TOKEN_ENCODER else "vocab_size"
        for value in ("12", [2], True, 2.5, None):
            change = edit(name, **{key: value})
            yield Case(f"config.json: {key}={json.dumps(value)}", change, f"{key}{mistyped} int", component, ways)
        yield Case("config.json: no settings", put(name, "{}"), "", component, ways[:1])

    transformer, decoder, encoder = map(config_file, (TRANSFORMER, LATENT_DECODER, TOKEN_ENCODER))
    for key in ("num_attention_heads", "attention_head_dim", "in_channels"):
        for value in (0, -1):
            change = edit(transformer, **{key: value})
            match = f"{outgrown}|do not belong"
            yield Case(f"config.json: {key}={value}", change, match, TRANSFORMER, ("component",))
    for value, match in ((math.inf, "must be of type float"), (math.nan, "must be of type float"), (1e300, outgrown)):
        yield Case(f"config.json: mlp_ratio={value}", edit(transformer, mlp_ratio=value), match, TRANSFORMER)
    yield Case("config.json: a billion labels", edit(decoder, num_labels=10**9), "num_labels", LATENT_DECODER)

    def many_tensors() -> dict[str, Any]:
        return {f"{index}": tensor([1], index, index + 1, "U8") for index in range(2**15)}

    def many_layers(repository: Path) -> None:
        edit(transformer, num_layers=2**15)(repository)
        put_header(TRANSFORMER, many_tensors, body=bytes(2**15))(repository)

    yield Case("2^15 tensors of one element, and as many layers", many_layers, "outgrows its weights", TRANSFORMER)

    for key, value in (
        ("n_layer", 10**9),
        ("n_layer", 10**4),
        ("n_embd", 2**40),
        ("vocab_size", 2**50),
        ("n_positions", 2**40),
        ("n_inner", 2**40),
        ("num_labels", 10**9),
    ):
        change = edit_backbone(**{key: value})
        yield Case(f"backbone_config: {key}={value}", change, "too large|is not allowed|outgrows", TOKEN_ENCODER)
    for model_type in ("vit", "no_such_type", ["gpt2"]):
        change = edit_backbone(model_type=model_type)
        yield Case(f"backbone_config: model_type={model_type!r}", change, "language model", TOKEN_ENCODER)
    qwen = {"model_type": "qwen2", "num_hidden_layers": 10**9}
    name = "backbone_config: Qwen2, which lists its layers, with 10^9 of them"
    yield Case(name, edit(encoder, backbone_config=qwen), "too large", TOKEN_ENCODER)
    change = edit(encoder, backbone_config=[1])
    yield Case("backbone_config: a list", change, f"backbone_config{mistyped}", TOKEN_ENCODER)


def json_cases() -> Iterator[Case]:
    too_long, not_an_object = "bytes; a file of this kind", "where a JSON object is due"
    broken, nested = "not valid JSON", "not valid JSON|nested more than"
    deep = '{"_class_name": ' + "[" * 10**5 + "]" * 10**5 + "}"
    contents: list[tuple[str, Content, str]] = [
        ("64 MiB of blanks", lambda: "{}" + " " * 2**26, too_long),
        ("a list of 2^20 numbers", lambda: json.dumps({"x": [0] * 2**20}), too_long),
        ("nested 10^5 deep", deep, nested),
        ("nested 100 deep", '{"x": ' * 100 + "0" + "}" * 100, nested),
        ("cut off", '{"x": ', broken),
        ("a list", "[1, 2]", not_an_object),
        ("no UTF-8", b"\xff\xfe{}", broken),
    ]
    for component in (TRANSFORMER, LATENT_DECODER, "scheduler"):
        name = config_file(component)
        for what, content, match in contents:
            ways = ("component", "LDLMPipeline")
            yield Case(f"{Path(name).name}: {what}", put(name, content), match, component, ways)
    for what, content, match in (contents[0], contents[2], contents[5]):
        yield Case(f"model_index.json: {what}", put("model_index.json", content), match, ways=PIPELINES)


def weights_cases() -> Iterator[Case]:
    changes: tuple[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str | None], ...] = (
        ("a tensor is missing", lambda held: held.pop(min(held)), "the weights lack 1 tensors"),
        (
            "one tensor too many",
            lambda held: held.update(surplus=torch.zeros(1)),
            "1 tensors that .* has no place for",
        ),
        (
            "a tensor of another shape",
            lambda held: held.update({min(held): torch.zeros(3)}),
            "of shape .* do not belong together",
        ),
        ("not a number", lambda held: [value.fill_(math.nan) for value in held.values()], None),
    )
    for component in (TRANSFORMER, LATENT_DECODER, TOKEN_ENCODER):
        for name, change, match in changes:
            yield Case(f"weights: {name}", edit_weights(component, change), match, component)


def scheduler_cases() -> Iterator[Case]:
    mistyped = "must be of type float"
    for key, value, match in (
        ("tangent_d", math.nan, mistyped),
        ("tangent_d", "3", mistyped),
        ("tangent_d", [3.0], mistyped),
        ("tangent_d", -1.0, "must be positive"),
        ("t_min", True, mistyped),
        ("t_min", 2.0, "must lie in"),
        ("beta_t_max", 1.0, "must lie between"),
    ):
        change = edit(config_file("scheduler"), **{key: value})
        yield Case(f"scheduler: {key}={json.dumps(value)}", change, match, "scheduler")


def tokenizer_cases() -> Iterator[Case]:
    file, link_name = "tokenizer/tokenizer.json", "tokenizer/special_tokens_map.json"

    def shorten(repository: Path) -> None:
        content = json.loads((repository / file).read_text())
        content["model"]["vocab"] = {"w0": 0}
        write(repository, file, json.dumps(content))

    changes: list[tuple[str, Callable[[Path], Any], str]] = [
        ("tokenizer.json: garbage", put(file, b"\xff" * 1000), "is no tokenizer"),
        ("tokenizer.json: no tokenizer", put(file, "{}"), "is no tokenizer"),
        ("tokenizer.json: nested 10^5 deep", put(file, "[" * 10**5 + "]" * 10**5), "is no tokenizer"),
        ("tokenizer.json: 65 MiB", put(file, lambda: "{}" + " " * 65 * 2**20), "bytes; a file of this kind"),
        ("tokenizer.json: another vocabulary", shorten, "The tokenizer has 1 tokens"),
        ("special_tokens_map.json: link to a device", link(link_name, "/dev/zero"), "there is no such file"),
        ("tokenizer_config.json: a pickle", put_pickle("tokenizer/tokenizer_config.json", False), "not valid JSON"),
    ]
    for name, change, match in changes:
        yield Case(name, change, match, ways=PIPELINES)


CASES = list(
    itertools.chain(
        honest_cases(),
        pickle_cases(),
        code_cases(),
        index_cases(),
        header_cases(),
        config_cases(),
        json_cases(),
        weights_cases(),
        scheduler_cases(),
        tokenizer_cases(),
    )
)


# ---------------------------------------------------------------------------------------------- running


@dataclass
class Outcome:
    """What came of loading: the error's type and message (None if it loaded), and the process's peak memory."""

    error: str | None
    message: str
    canary_untouched: bool
    peak_mib: float
    seconds: float

    def is_expected(self, match: str | None) -> bool:
        """Whether the repository was refused with the right error, or loaded if it has to."""
        if not self.canary_untouched:
            return False
        if match is None or self.error is None:
            return match is None and self.error is None
        return self.error in ("ValueError", "OSError") and re.search(match, self.message, re.DOTALL) is not None


def attempt(case: Case, way: str, repository: Path) -> Outcome:
    """Loads a changed copy in this process."""
    error, message, start = None, "", time.perf_counter()
    try:
        load(way, repository, case.component, case.arguments)
    except Exception as exception:
        # subclasses such as FileNotFoundError and JSONDecodeError count as what they are
        base = next((one for one in (ValueError, OSError) if isinstance(exception, one)), type(exception))
        error, message = base.__name__, str(exception)
    seconds = time.perf_counter() - start
    return Outcome(error, message, not (repository / CANARY).exists(), peak_memory(), seconds)


def peak_memory() -> float:
    """Largest resident memory that this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own; None if that ended otherwise or took too long."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        sender.send(function(*arguments))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(TIME_LIMIT_SECONDS) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def copy_repository(honest: Path, case: Case, scratch: Path) -> Path:
    """A changed copy of the honest repository; files that the change leaves alone are links to its own."""
    repository = Path(tempfile.mkdtemp(dir=scratch)) / "repository"
    shutil.copytree(honest, repository, copy_function=os.link)
    case.change(repository)
    return repository


def run_case(case: Case, way: str, honest: Path, scratch: Path) -> Outcome:
    """Makes a changed copy in one process and loads it in another."""
    repository = in_process(copy_repository, honest, case, scratch)
    outcome = in_process(attempt, case, way, repository)
    untouched = not (repository / CANARY).exists()
    shutil.rmtree(repository.parent)
    if outcome is None:
        return Outcome("killed", f"more than {TIME_LIMIT_SECONDS} s, or memory", untouched, math.inf, math.inf)
    outcome.message = outcome.message.replace(str(repository), "REPO").replace(str(repository.parent), "..")
    return outcome


def unpickle(path: Path) -> None:
    torch.load(path, weights_only=False)


def canary_is_alive(honest: Path, scratch: Path) -> dict[str, bool]:
    """Whether the canary is written where pickles and code are let loose; without that, its silence means nothing."""
    pickled = Case("", put_pickle("pickled.bin", True), None)
    code = Case("", put_code("evil.py", edit("model_index.json", _class_name=["evil", "LDLMPipeline"])), None)
    pickled_copy, code_copy = copy_repository(honest, pickled, scratch), copy_repository(honest, code, scratch)
    trusting = Case("", change_nothing, None, arguments={"trust_remote_code": True})
    in_process(unpickle, pickled_copy / "pickled.bin")
    in_process(attempt, trusting, "DiffusionPipeline", code_copy)
    return {
        "torch.load(weights_only=False)": (pickled_copy / CANARY).exists(),
        "trust_remote_code=True": (code_copy / CANARY).exists(),
    }


# ---------------------------------------------------------------------------------------------- report


def table_row(case: Case, outcomes: dict[str, Outcome]) -> list[str]:
    """One row for all ways of loading: the message of the first, the largest of times and memories."""
    message = next(iter(outcomes.values())).message.strip().split("\n")[0]
    message = message if len(message) <= 200 else f"{message[:200]}…"
    errors = " / ".join(dict.fromkeys(outcome.error or "loads" for outcome in outcomes.values()))
    return [
        case.name,
        case.component or "pipeline",
        ", ".join(outcomes),
        errors + (f": {message}" if message else ""),
        "untouched" if all(outcome.canary_untouched for outcome in outcomes.values()) else "**WRITTEN**",
        f"{max(outcome.peak_mib for outcome in outcomes.values()):.0f}",
        f"{max(outcome.seconds for outcome in outcomes.values()):.1f}",
    ]


def report(
    results: list[tuple[Case, dict[str, Outcome]]], alive: dict[str, bool], imported_mib: float, weights_mib: float
) -> str:
    """The page, with the honest loads first."""
    loads = [(case, outcome) for case, outcomes in results for outcome in outcomes.values()]
    honest = [outcome for case, outcome in loads if case.change is change_nothing]
    hostile = [(case, outcome) for case, outcome in loads if case.change is not change_nothing]
    refused = [outcome for _, outcome in hostile if outcome.error is not None]
    written = sum(not outcome.canary_untouched for _, outcome in hostile)
    num_hostile = sum(case.change is not change_nothing for case, _ in results)
    largest_case, largest = max(hostile, key=lambda pair: pair[1].peak_mib)
    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    columns = ["case", "part", "loaded by", "outcome", "canary", "peak MiB", "s"]
    lines = [
        "# Hostile repositories",
        "",
        "What comes of loading them. Written by `python checks/hostile_repositories.py`, which says how it measures.",
        "",
        f"Machine: {device_name(torch.device('cpu'))}, {os.cpu_count()} cores; {installed}. Seed 0; one thread.",
        "",
        f"* {len(hostile)} loads of {num_hostile} hostile repositories: {len(refused)} refused, "
        f"{len(hostile) - len(refused)} loaded, the hostile part ignored or harmless; canary written in {written}.",
        "* The canary is written by " + ", by ".join(f"`{name}`: {found}" for name, found in alive.items()) + ".",
        f"* Peak memory: {imported_mib:.0f} MiB with the package imported, {max(one.peak_mib for one in honest):.0f} "
        f"MiB for the honest repository ({weights_mib:.0f} MiB of weights), {largest.peak_mib:.0f} MiB for the worst "
        f"of the hostile ones ({largest_case.name}).",
        f"* Longest refusal: {max(one.seconds for one in refused):.1f} s.",
        "",
        "REPO is the repository. Where a case has several ways of loading, the message is that of the first; memory "
        "and time are the largest.",
        "",
        *markdown_table(columns, [table_row(case, outcomes) for case, outcomes in results]),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="run the cases of these names only, and write no file")
    only = parser.parse_args().only
    chosen = [case for case in CASES if only is None or case.change is change_nothing or re.search(only, case.name)]

    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    sys.stdin.close()  # nobody is there to be asked whether code may run

    failures = 0
    results: list[tuple[Case, dict[str, Outcome]]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        honest = scratch / "honest"
        in_process(make_repository, honest)
        weights_mib = sum(path.stat().st_size for path in honest.rglob("*.safetensors")) / 2**20
        alive = canary_is_alive(honest, scratch)
        imported_mib = in_process(peak_memory)
        allowed = MEMORY_SLACK_MIB + in_process(attempt, CASES[0], "LDLMPipeline", honest).peak_mib
        for case in chosen:
            outcomes = {way: run_case(case, way, honest, scratch) for way in case.ways}
            results.append((case, outcomes))
            for way, outcome in outcomes.items():
                if not outcome.is_expected(case.match) or outcome.peak_mib > allowed:
                    failures += 1
                    print(f"NOT AS EXPECTED: {case.name} ({case.component}, {way}): {outcome}")
    page = report(results, alive, imported_mib, weights_mib)
    if only is None:
        Path(__file__).with_suffix(".md").write_text(page, encoding="utf-8")
    print("\n".join(line for line in page.splitlines() if line.startswith("*")))
    print(f"{failures} not as expected")
    return int(failures > 0 or not all(alive.values()))


if __name__ == "__main__":
    sys.exit(main())
