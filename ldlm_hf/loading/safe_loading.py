"""Loading of what others have published, so that a repository can be wrong or hostile without doing harm; and saving
of what can be loaded so.

By default diffusers and transformers unpickle weights where there are no safetensors, start missing tensors at random
with a warning, and build whatever size a configuration asks for. Here

* weights come from safetensors files only, that lie beside the configuration;
* a configuration cannot ask for more than the weights can fill: headers are read first, and the model is built without
  memory (on the meta device) under a limit that follows from them, before anything is loaded;
* every tensor of the model must be in the files and the other way round, each with its shape.

So memory stays below a small multiple of the size of the files. Repositories carry copies of this code.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import reprlib
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from .checks import has_type


COMPONENT_LIBRARY = "ldlm_hf"
CONFIG_FILE = "config.json"
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "force_download", "local_files_only")

MAX_JSON_BYTES = 2**20
MAX_JSON_DEPTH = 32
# of a file with an entry for each tensor, 256 bytes for each of the most that a model may have, or each special token
MAX_TABLE_BYTES = 2**23
MAX_TENSORS = 2**15
MAX_TOKENIZER_BYTES = 2**26

# settings with which a file could make transformers or diffusers load code, other weights or other classes, or (the
# last) write a list of any length; none of them describes a model of this package
FORBIDDEN_SETTINGS = frozenset(
    {
        "_attn_implementation",
        "_experts_implementation",
        "attn_implementation",
        "compression_config",
        "experts_implementation",
        "fusion_config",
        "per_layer_config",
        "quantization_config",
        "transformers_weights",
        "num_labels",
    }
)
# files that transformers takes for weights before it looks for the usual ones
FORBIDDEN_FILES = ("adapter_config.json", "shard-*.safetensors")


def check_size(path: Path, max_bytes: int) -> None:
    """Raises OSError unless there is such a file, no pipe or device, and ValueError if it is too large."""
    if not path.is_file():
        raise OSError(f"{path}: there is no such file.")
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size} bytes; a file of this kind has at most {max_bytes}.")


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object of bounded size and depth.

    Raises:
        OSError: no such file.
        ValueError: too large, nested too deep, or no JSON object.
    """
    path = Path(path)
    check_size(path, max_bytes)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {reprlib.repr(content)} where a JSON object is due.")
    if any(depth > MAX_JSON_DEPTH for _, _, depth in nested_settings(content)):
        raise ValueError(f"{path} is nested more than {MAX_JSON_DEPTH} deep.")
    return content


def nested_settings(settings: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any, int]]:
    """Key, value and depth of every value in a tree of dictionaries and lists; an element has its list's key."""
    items = settings.items() if isinstance(settings, Mapping) else ((key, value) for value in settings)
    for name, value in items:
        yield name, value, depth
        if isinstance(value, (Mapping, list, tuple)):
            yield from nested_settings(value, name, depth + 1)


def check_model_index(pipeline_class: type, model_index: Mapping[str, Any]) -> None:
    """Raises ValueError unless each component of a model_index.json is one of the pipeline's, of a class it loads."""
    parameters = inspect.signature(pipeline_class.__init__).parameters  # type: ignore[misc]
    for name, entry in model_index.items():
        if name.startswith("_"):
            continue
        if name not in parameters:
            raise ValueError(f"model_index.json names a component {name!r}, which {pipeline_class.__name__} lacks.")
        if name in getattr(pipeline_class, "saved_settings", ()):
            hint = get_type_hints(pipeline_class.__init__)[name]  # type: ignore[misc]
            if not has_type(entry, hint):
                kind = "true or false" if hint is bool else "a number"
                raise ValueError(f"model_index.json: {name}={reprlib.repr(entry)} must be {kind}.")
            continue
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2):
            raise ValueError(f"model_index.json: {name}={reprlib.repr(entry)} must be [library, class].")
        library, class_name = entry
        if library is None and class_name is None:
            continue
        expected = component_classes(pipeline_class, name)
        if not is_loaded(expected, library, class_name):
            raise ValueError(
                f"model_index.json: {name}={reprlib.repr(entry)} is not what {pipeline_class.__name__} loads as its "
                f"{name}, {' | '.join(expected)}. Load a component of another class yourself, and give all components "
                "to the constructor."
            )


def component_classes(pipeline_class: type[Any], name: str) -> list[str]:
    """Names of the classes that a pipeline loads as a component: those of its constructor's annotation, or for any
    `SchedulerMixin` those that `pipeline_class.scheduler_classes` lists.
    """
    annotation = inspect.signature(pipeline_class.__init__).parameters[name].annotation
    classes = re.findall(r"\w+", str(annotation))
    return [*pipeline_class.scheduler_classes, "None"] if "SchedulerMixin" in classes else classes


def is_loaded(classes: list[str], library: Any, class_name: Any) -> bool:
    """Whether a class of a library is one of those that [`component_classes`] names."""
    if library == COMPONENT_LIBRARY:
        return class_name != "None" and class_name in classes
    if library == "diffusers":
        return class_name in classes and is_class(class_name, diffusers, diffusers.SchedulerMixin)
    if library == "transformers" and "PreTrainedTokenizerBase" in classes:
        return is_class(class_name, transformers, transformers.PreTrainedTokenizerBase)
    if library == "transformers":
        return class_name in classes and is_class(class_name, transformers, transformers.PreTrainedModel)
    return False


def check_serialization(safe_serialization: bool, use_flashpack: bool, variant: str | None) -> None:
    """Raises ValueError where weights would be written in a form, or under a name, that is never loaded."""
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant={variant!r} must be letters, digits, - and _, such as fp16, or None.")
    if not safe_serialization or use_flashpack:
        raise ValueError(
            f"safe_serialization={safe_serialization}, use_flashpack={use_flashpack}: models of {COMPONENT_LIBRARY} "
            "are loaded from safetensors only; leave both out."
        )


def check_adapters(name: str, model: nn.Module) -> None:
    """Raises ValueError for a model that peft has wrapped, or put adapters into."""
    if any(map(is_of_peft, model.modules())):
        raise ValueError(
            f"{name} holds adapters of peft, which do not load with a model: merge them into it (`merge_and_unload()` "
            "of the PeftModel returns the model; `fuse_lora()` and then `unload_lora()` of a denoiser), or save them "
            "alone (`save_pretrained` of the PeftModel, `save_lora_adapter` of a denoiser). A pipeline's "
            "`save_pretrained` saves both the denoiser and its LoRA adapters."
        )


def is_of_peft(module: nn.Module) -> bool:
    """Whether a module is a wrapper or a layer of peft."""
    return type(module).__module__.partition(".")[0] == "peft"


def is_class(name: Any, library: ModuleType, base_class: type) -> bool:
    """Whether a library has a class of this name that is derived from `base_class`."""
    found = getattr(library, str(name), None)
    return inspect.isclass(found) and issubclass(found, base_class)


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError or OSError where files of a tokenizer are no files, too large, or cannot be read as one."""
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_size(path, MAX_TOKENIZER_BYTES)
    if (folder / "tokenizer_config.json").exists():
        read_json(folder / "tokenizer_config.json", MAX_TABLE_BYTES)
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more special
            raise ValueError(f"{path} is no tokenizer: {error}. Download it again.") from error


class SafeLoadingMixin:
    """Makes `from_pretrained` of a model of diffusers or transformers safe, and `save_pretrained` write what it loads;
    to stand before their base class.
    """

    @classmethod
    def weights_name(cls) -> str:
        """Name of the weights file, if it is one and of no variant."""
        return SAFETENSORS_WEIGHTS_NAME if issubclass(cls, ModelMixin) else SAFE_WEIGHTS_NAME

    def saved_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights that are saved, where they are not all of them."""
        return None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves a model into a folder, with the arguments of the base class's `save_pretrained`.

        Of a model that the folder holds already, the weights of the same variant go once the new ones are there,
        whether they are one file or several; everything else stays. Until then both take space.

        Raises:
            ValueError: what `from_pretrained` would refuse: `safe_serialization=False`, `use_flashpack=True`, a
                variant with other signs than letters, digits, - and _, or a model with adapters of peft.
        """
        check_serialization(safe_serialization, use_flashpack, variant)
        check_adapters(type(self).__name__, self)  # type: ignore[arg-type]
        if max_shard_size is not None:
            kwargs["max_shard_size"] = max_shard_size
        if (weights := self.saved_weights()) is not None:
            kwargs["state_dict"] = weights
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # the base class would remove shards of other variants, and not a single file, nor an index
        with tempfile.TemporaryDirectory(dir=folder) as parent:
            new = Path(parent, folder.resolve().name)  # by which `push_to_hub` names a repository
            super().save_pretrained(str(new), is_main_process, variant=variant, **kwargs)  # type: ignore[misc]
            replace_weights(new, folder, self.weights_name(), variant)
            for path in new.iterdir():
                path.replace(folder / path.name)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a model from a folder or from the Hub, with the arguments of the base class's `from_pretrained`.

        Raises:
            ValueError: `use_safetensors=False`, files that are no safetensors or lie elsewhere, or a configuration
                and weights that do not belong together.
            OSError: no such model, or no safetensors in it.
        """
        load = super().from_pretrained  # type: ignore[misc]
        if pretrained_model_name_or_path is None:  # transformers' way to load a given `state_dict`
            return load(None, *args, **kwargs)
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError(
                "use_safetensors=False asks for pickled weights, which can run any code; leave it out. Convert such "
                "weights to safetensors where you can trust them."
            )
        weights_name, variant = cls.weights_name(), kwargs.get("variant")
        folder = resolve_folder(pretrained_model_name_or_path, weights_name, variant, kwargs)
        check_files(cls, folder, weights_name, variant, bool(kwargs.get("ignore_mismatched_sizes")))

        wants_info = kwargs.pop("output_loading_info", False)
        model, info = load(str(folder), *args, use_safetensors=True, output_loading_info=True, **kwargs)
        for keys, before, after in (
            (info["missing_keys"], "lack", "needs"),
            (info["unexpected_keys"], "hold, beside others,", "has no place for"),
        ):
            if keys:
                raise ValueError(
                    f"{folder}: the weights {before} {len(keys)} tensors that {cls.__name__} {after}, the first of "
                    f"them {min(keys)!r}. Weights and {CONFIG_FILE} do not belong together; get both from the same "
                    "source."
                )
        return (model, info) if wants_info else model


def weights_patterns(weights_name: str, variant: str | None) -> tuple[str, str, str]:
    """Patterns of the names of a variant's weights: in one file, in several, and the index of these."""
    stem, infix = weights_name.removesuffix(".safetensors"), "" if variant is None else f".{variant}"
    digits = 5 * "[0-9]"
    return (
        f"{stem}{infix}.safetensors",
        f"{stem}{infix}-{digits}-of-{digits}.safetensors",
        f"{stem}.safetensors.index{infix}.json",
    )


def find_weights(folder: Path, weights_name: str, variant: str | None) -> list[Path]:
    """The files of a variant's weights in a folder, and their index."""
    return [path for pattern in weights_patterns(weights_name, variant) for path in folder.glob(pattern)]


def replace_weights(new: Path, folder: Path, weights_name: str, variant: str | None) -> None:
    """Moves a variant's weights from one folder to another, and removes those that they supersede there."""
    moved = [path.replace(folder / path.name) for path in find_weights(new, weights_name, variant)]
    if moved:  # in a distributed run not every process has written weights
        for path in set(find_weights(folder, weights_name, variant)) - set(moved):
            path.unlink()


def resolve_folder(
    name_or_path: str | os.PathLike[str], weights_name: str, variant: str | None, kwargs: dict[str, Any]
) -> Path:
    """The local folder of a component, downloaded from the Hub if need be. What names it is taken out of `kwargs`."""
    subfolder = kwargs.pop("subfolder", None) or ""
    if os.path.isdir(name_or_path):
        return Path(name_or_path, subfolder)
    if os.path.exists(name_or_path):
        raise ValueError(f"{name_or_path} is a file; name the folder that holds {CONFIG_FILE} and {weights_name}.")
    options = {key: value for key in HUB_ARGUMENTS if (value := kwargs.pop(key, None)) is not None}
    names = [CONFIG_FILE, *weights_patterns(weights_name, variant)]
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
    return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **options), subfolder)


def check_files(
    model_class: Any, folder: Path, weights_name: str, variant: str | None, ignore_mismatched_sizes: bool
) -> None:
    """Raises ValueError or OSError unless a component's configuration and the headers of its weights fit each other.

    Shapes may differ with `ignore_mismatched_sizes`.
    """
    config_file = folder / CONFIG_FILE
    config = read_json(config_file)
    shapes = read_shapes(folder, weights_name, variant)
    num_elements = sum(math.prod(shape) for shape in shapes.values())
    for key, value, depth in nested_settings(config):
        if key in FORBIDDEN_SETTINGS or (key == "auto_map" and depth > 0):
            raise ValueError(f"{config_file}: {key}={reprlib.repr(value)} is not allowed in a published model.")
        # sizes of models of this package are limited below; those of language models may be used before any tensor is
        limit = max(len(shapes), 2**10) if "layer" in key else max(num_elements, 2**20)
        if depth > 0 and isinstance(value, int) and value > limit:
            raise ValueError(
                f"{config_file}: {key}={reprlib.repr(value)} is too large for a model whose weights are "
                f"{len(shapes)} tensors of {num_elements} elements."
            )
    try:
        with torch.device("meta"), limited_construction(len(shapes), num_elements):
            if issubclass(model_class, ModelMixin):
                model = model_class.from_config(config)
            else:
                model = model_class(model_class.config_class.from_dict(config))
    except Exception as error:
        raise ValueError(
            f"{config_file}: no {model_class.__name__} can be built from it: {type(error).__name__}: {error}"
        ) from error
    for name, tensor in model.state_dict().items():
        if name in shapes and shapes[name] != tuple(tensor.shape) and not ignore_mismatched_sizes:
            raise ValueError(
                f"{folder}: the weights hold {name} of shape {shapes[name]}, but by {CONFIG_FILE} it has the shape "
                f"{tuple(tensor.shape)}. The two do not belong together; get both from the same source."
            )


@contextmanager
def limited_construction(num_tensors: int, num_elements: int) -> Iterator[None]:
    """Raises ValueError as soon as a model that this thread builds outgrows the weights that it is built for."""
    # the slack is for modules without weights, for parts that are dropped, and for buffers that are not saved
    parts, elements = 4 * num_tensors + 2**8, 2 * num_elements + 2**24
    thread = threading.get_ident()

    def charge(module: nn.Module, name: str, registered: nn.Module | torch.Tensor | None) -> None:
        nonlocal parts, elements
        if threading.get_ident() != thread or registered is None:
            return
        parts -= 1
        elements -= registered.numel() if isinstance(registered, torch.Tensor) else 0
        if parts < 0 or elements < 0:
            raise ValueError(
                f"the model outgrows its weights, which are {num_tensors} tensors of {num_elements} elements"
            )

    with (
        register_module_parameter_registration_hook(charge),
        register_module_buffer_registration_hook(charge),
        register_module_module_registration_hook(charge),
    ):
        yield


def read_shapes(folder: Path, weights_name: str, variant: str | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a component, from one safetensors file or from several with an index."""
    forbidden = [path.name for pattern in FORBIDDEN_FILES for path in folder.glob(pattern)]
    if forbidden:
        raise ValueError(f"{folder} holds {forbidden[0]}, which would be loaded instead of {weights_name}; remove it.")
    name, _, index_name = weights_patterns(weights_name, variant)
    whole, index = folder / name, folder / index_name
    if whole.exists() and index.exists():
        raise ValueError(f"{folder} holds both {whole.name} and {index.name}; remove the one that is out of date.")
    if not index.exists():
        if not whole.is_file():
            raise OSError(
                f"{folder} holds no {whole.name}. Other files than safetensors are never read, since pickled weights "
                "can run any code; convert such weights where you can trust them."
            )
        return read_header(whole)

    content = read_json(index, MAX_TABLE_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index} lacks its objects 'weight_map' and 'metadata'; write the weights again.")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is no safetensors file beside the index; write the weights again.")
        if not (folder / name).is_file():
            raise OSError(f"{index} names {name}, but there is no such file; download it again.")
        shapes |= read_header(folder / name)
        if len(shapes) > MAX_TENSORS:
            raise ValueError(
                f"{index} names more than {MAX_TENSORS} tensors, which is the most that a model may have."
            )
    if shapes.keys() != weight_map.keys():
        first = min(shapes.keys() ^ weight_map.keys())
        raise ValueError(f"{index} and its files do not hold the same tensors: {first!r} is in one of the two only.")
    return shapes


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, by its header; the weights are not read."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if header_size > MAX_TABLE_BYTES:
        raise ValueError(
            f"{path} would have a header of {header_size} bytes, more than the {MAX_TABLE_BYTES} that are read. "
            "Whatever its name, it is no safetensors file, or a broken one."
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            if len(names) > MAX_TENSORS:
                raise ValueError(f"{path} holds {len(names)} tensors; a model has at most {MAX_TENSORS}.")
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is no valid safetensors file: {error}. Download it again.") from error
