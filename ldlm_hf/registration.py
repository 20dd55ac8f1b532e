"""Makes diffusers and transformers know the classes of this package, so that its models load as their own do.

diffusers writes the place of each component's class into `model_index.json`, and at loading resolves it through three
tables of its own. Without entries there, a pipeline that was saved in one process does not load in another. Tried with
diffusers 0.40 to 0.42 and transformers 5.6 to 5.23; [`register`] checks what it touches and says what has
moved if a later version differs.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import diffusers.pipelines
import transformers
from diffusers.pipelines import pipeline_loading_utils, pipeline_utils

from .loading.repository import PIPELINE_MODULE
from .loading.safe_loading import MAX_JSON_BYTES, check_tokenizer, read_json
from .schedulers import SCHEDULERS


# the base classes of components, with the methods that save and load them
BASE_CLASSES: dict[str, Any] = {
    "ModelMixin": diffusers.ModelMixin,
    "SchedulerMixin": diffusers.SchedulerMixin,
    "PreTrainedModel": transformers.PreTrainedModel,
}
SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]
# names of the pipelines of this package; `register` adds them
PIPELINES: set[str] = set()


def require(owner: ModuleType | type, attribute: str) -> Any:
    """An attribute of diffusers that registration builds on; ImportError if it is not there any more."""
    value = getattr(owner, attribute, None)
    if value is None:
        raise ImportError(
            f"ldlm_hf registers its classes through {owner.__name__}.{attribute}, which diffusers "
            f"{diffusers.__version__} does not have. Install a version that this ldlm_hf was tried with (0.40 to "
            "0.42), or a newer ldlm_hf."
        )
    return value


# diffusers' own, which ours call for the pipelines of others
IDENTIFY_MODEL_VARIANTS = require(pipeline_utils, "_identify_model_variants")


def read_index(cls: type[diffusers.DiffusionPipeline], path: str | Path, **archive: Any) -> dict[str, Any]:
    """Reads a `model_index.json`: those of other pipelines as diffusers does, ours within bounds. One of ours is the
    installed class, even if the repository carries its code.
    """
    read = super(diffusers.DiffusionPipeline, cls)._dict_from_json_file
    if any(archive.values()):  # diffusers before 0.42 also reads from DDUF archives
        return read(path, **archive)
    # what is as long as none of ours is not read whole to see that it names ours
    if cls.__name__ not in PIPELINES and not begins_with_name(path):
        index = read(path)
        if our_pipeline(index) is None:
            return index
    index = read_json(path)
    name = our_pipeline(index)
    if name is not None:
        index["_class_name"] = name
        # where `DiffusionPipeline.from_pretrained` looks for it
        setattr(diffusers, name, getattr(diffusers.pipelines.ldlm_hf, name))
        check_tokenizer(Path(path).parent / "tokenizer")
    return index


def begins_with_name(path: str | Path) -> bool:
    """Whether the name of a pipeline of ours stands in as much of a file as an index of ours may have."""
    with open(path, "rb") as file:
        beginning = file.read(MAX_JSON_BYTES)
    return any(f'"{name}"'.encode() in beginning for name in PIPELINES)


def our_pipeline(index: Any) -> str | None:
    """The name of the pipeline of ours that an index is one of; None for those of others."""
    found = index.get("_class_name") if isinstance(index, dict) else None
    return next((name for name in PIPELINES if found in (name, [PIPELINE_MODULE, name])), None)


def identify_model_variants(folder: str, variant: str | None, config: dict[str, Any]) -> dict[str, str]:
    """The variant that each component of a pipeline is loaded in: for ours the one that is asked for.

    diffusers would load the plain weights of those that lack it, without a word.
    """
    found = IDENTIFY_MODEL_VARIANTS(folder, variant, config)
    if found and variant is not None and config["_class_name"] in PIPELINES:
        return {name: variant for name, entry in config.items() if isinstance(entry, (list, tuple))}
    return found


def register(package: ModuleType) -> None:
    """Registers the classes of `ldlm_hf`; called once, when the package is imported.

    1. `LOADABLE_CLASSES["ldlm_hf"]`: components are saved as `["ldlm_hf", class name]` and found there again. The
       base classes named there must be attributes of the package.
    2. `diffusers.pipelines.ldlm_hf`: the installed class wins over code in a repository, and `device_map` finds it.
    3. `LDLMPipeline`, schedulers and denoiser as attributes of `diffusers`: `DiffusionPipeline.from_pretrained` and
       `scheduler.compatibles` look their names up there.
    4. `DiffusionPipeline._dict_from_json_file`: the installed pipeline wins over code in a repository, as its
       components do. Ours are the public names that end in `Pipeline`, each imported when an index names it.
    5. `pipeline_utils._identify_model_variants`: no mix of variants of one of our pipelines is loaded.
    6. The Auto classes of transformers.
    """
    name = package.__name__
    loadable_classes = require(pipeline_loading_utils, "LOADABLE_CLASSES")
    # a second table of all base classes, merged from the first when diffusers is imported: ours are in it already
    missing = BASE_CLASSES.keys() - require(pipeline_loading_utils, "ALL_IMPORTABLE_CLASSES").keys()
    if missing:
        raise ImportError(f"diffusers {diffusers.__version__} no longer loads components of the types {missing}.")
    loadable_classes[name] = dict.fromkeys(BASE_CLASSES, SAVE_AND_LOAD)
    setattr(diffusers.pipelines, name, package)

    for native_class in ("LDLMPipeline", "LDLMTransformer1DModel", *SCHEDULERS):
        setattr(diffusers, native_class, getattr(package, native_class))
    PIPELINES.update(public for public in dir(package) if public.endswith("Pipeline"))
    require(diffusers.DiffusionPipeline, "_dict_from_json_file")
    diffusers.DiffusionPipeline._dict_from_json_file = classmethod(read_index)
    pipeline_utils._identify_model_variants = identify_model_variants

    for auto_class in ("LDLMTokenEncoder", "LDLMLatentEncoder", "LDLMLatentDecoder", "LDLMTokenDecoder"):
        model_class = getattr(package, auto_class)
        config_class = model_class.config_class
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        transformers.AutoModel.register(config_class, model_class, exist_ok=True)
