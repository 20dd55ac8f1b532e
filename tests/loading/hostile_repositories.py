"""Hostile repositories: an honest one, what is changed in it, and what must come of loading it.

Loading has to end with ValueError or OSError and the expected message (or, where the hostile part must be ignored,
with a model), and to leave the canary alone, which pickles and code files would write.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import re
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import ldlm_hf
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

# of a file; a function where it is large
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


def make_repository(folder: Path, width: int, num_layers: int, vocab_size: int) -> None:
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


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ---------------------------------------------------------------------------------------------- cases


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
    for setting in ("2.0", [2.0], ["ldlm_hf", "LDLMTokenDecoder"], {"a": 1}, True):
        change = edit("model_index.json", self_condition_scale=setting)
        yield Case(f"model_index.json: self_condition_scale={setting}", change, "must be a number", ways=PIPELINES)
    for setting in (1, "yes", None, ["ldlm_hf", "LDLMTokenDecoder"]):
        change = edit("model_index.json", ends_texts=setting)
        yield Case(f"model_index.json: ends_texts={setting}", change, "must be true or false", ways=PIPELINES)
    for setting in ("4", True, 2.5):
        change = edit("model_index.json", source_length=setting)
        yield Case(f"model_index.json: source_length={setting}", change, "must be a number", ways=PIPELINES)
    for setting in (0, 10**9):
        change = edit("model_index.json", source_length=setting)
        yield Case(f"model_index.json: source_length={setting}", change, "must lie in", ways=PIPELINES)
    change = edit("model_index.json", guidance_rescale=2)
    yield Case("model_index.json: a share above 1", change, r"must be a number in \[0, 1\]", ways=PIPELINES)
    change = edit("model_index.json", self_condition_scale=-1)
    yield Case("model_index.json: a negative scale", change, "must be a finite number that is", ways=PIPELINES)
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

    def empty_tensors() -> dict[str, Any]:
        return {f"{index:06}": tensor([0], 0, 0) for index in range(100_000)}

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
        ("100 000 tensors", "holds 100000 tensors", empty_tensors, None, b""),
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
    deep = '{"x": ' + "[" * 10**5 + "]" * 10**5 + "}"
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
    # diffusers hands a file that names our class to that
    of_pipelines: list[tuple[str, Content, str]] = [
        ("48 MiB", lambda: json.dumps({"_class_name": "LDLMPipeline", "x": [0] * 2**24}), too_long),
        ("nested 10^5 deep", deep.replace("x", "LDLMPipeline"), nested),
        ("a list", '["LDLMPipeline"]', not_an_object),
    ]
    for what, content, match in of_pipelines:
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
        ("tangent_d", -1.0, "must lie in"),
        ("t_min", True, mistyped),
        ("t_min", 2.0, "must lie in"),
        ("beta_t_max", 1.0, "must lie in"),
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


# ---------------------------------------------------------------------------------------------- loading


@dataclass
class Outcome:
    """What came of loading: the error's type and message (None if it loaded), and the process's peak memory."""

    error: str | None
    message: str
    canary_untouched: bool
    peak_mib: float

    def is_expected(self, match: str | None) -> bool:
        """Whether the repository was refused with the right error, or loaded if it has to."""
        if not self.canary_untouched:
            return False
        if match is None or self.error is None:
            return match is None and self.error is None
        return self.error in ("ValueError", "OSError") and re.search(match, self.message, re.DOTALL) is not None


def attempt(case: Case, way: str, repository: Path) -> Outcome:
    """Loads a changed copy in this process."""
    error, message = None, ""
    try:
        load(way, repository, case.component, case.arguments)
    except Exception as exception:
        # subclasses such as FileNotFoundError and JSONDecodeError count as what they are
        base = next((one for one in (ValueError, OSError) if isinstance(exception, one)), type(exception))
        error, message = base.__name__, str(exception)
    return Outcome(error, message, not (repository / CANARY).exists(), peak_memory())


def peak_memory() -> float:
    """Largest resident memory that this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
