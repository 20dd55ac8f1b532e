"""The repository of a pipeline: its code files beside its weights, its card, and its way to the Hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import CommitInfo, create_branch, create_repo, upload_folder
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from .remote_code import class_source
from .safe_loading import (
    COMPONENT_LIBRARY,
    check_adapters,
    check_model_index,
    check_serialization,
    component_classes,
    is_loaded,
    read_json,
    weights_patterns,
)
from .saved_adapters import (
    LORA_INDEX_KEY,
    adapted_components,
    adapters_to_save,
    name_adapters,
    saved_adapters,
    without_adapters,
    write_adapters,
)


# see ldlm_hf/loading/remote_code.py for why this name and that of a component's module are a format
PIPELINE_MODULE = "pipeline_ldlm"
CARD = "README.md"
IGNORED_FILES = ["__pycache__/*", "*/__pycache__/*"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_repository_code(
    pipeline: DiffusionPipeline, folder: str | os.PathLike, adapters: dict[str, str] | None = None
) -> None:
    """Puts the code of a pipeline and of its components beside its saved weights, and their places and those of its
    adapters into its index.

    The paths on this machine that diffusers notes in configurations are left out.
    """
    folder = Path(folder)
    index = json.loads((folder / pipeline.config_name).read_text(encoding="utf-8"))
    index.pop("_name_or_path", None)
    index.pop(LORA_INDEX_KEY, None)
    if adapters:
        index[LORA_INDEX_KEY] = adapters
    for name in [key for key, entry in index.items() if isinstance(entry, list) and entry[0] is not None]:
        component_class = uncompiled_class(getattr(pipeline, name, None))
        if write_component_code(component_class, folder, name):
            index[name] = [COMPONENT_LIBRARY, component_class.__name__]
        elif index[name][0] == COMPONENT_LIBRARY:
            raise ValueError(
                f"{name} is of the installed {COMPONENT_LIBRARY}, in a pipeline that was loaded by the code of a "
                f"repository, which cannot write code for it. Load the pipeline with {COMPONENT_LIBRARY} imported, "
                "or pass its components to the constructor of the installed LDLMPipeline."
            )
    source = class_source(type(pipeline))
    if source is not None:
        (folder / f"{PIPELINE_MODULE}.py").write_text(source, encoding="utf-8")
        index["_class_name"] = [PIPELINE_MODULE, type(pipeline).__name__]
    write_json(folder / pipeline.config_name, index)


def check_saveable(pipeline: DiffusionPipeline) -> None:
    """Raises ValueError for a component that would not be saved, or not load with the pipeline again."""
    adapted = dict(adapted_components(pipeline))
    for name, component in pipeline.components.items():
        if component is None:
            continue
        if isinstance(component, nn.Module) and name not in adapted:
            check_adapters(name, component)
        component_class = uncompiled_class(component)
        is_ours = class_source(component_class) is not None
        library = COMPONENT_LIBRARY if is_ours else component_class.__module__.partition(".")[0]
        expected = component_classes(type(pipeline), name)
        if not is_loaded(expected, library, component_class.__name__):
            raise ValueError(
                f"{name} is a {component_class.__name__} of {component_class.__module__}, which "
                f"{type(pipeline).__name__} does not load as its {name}, {' | '.join(expected)}. Put the model of "
                f"such a class in its place (of a wrapper, the model inside), or save the component alone and set "
                f"{name}=None."
            )


def uncompiled_class(component: Any) -> type[Any]:
    """The class of a component; torch.compile wraps a module into another."""
    return type(getattr(component, "_orig_mod", component))


def write_component_code(component_class: type[Any], folder: Path, name: str) -> bool:
    """Puts the code of a component into its folder; False for a class that comes from elsewhere."""
    source = class_source(component_class)
    if source is None:
        return False
    (folder / name / f"{COMPONENT_LIBRARY}.py").write_text(source, encoding="utf-8")
    config_file = folder / name / "config.json"
    if config_file.exists():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if issubclass(component_class, PreTrainedModel):
            # that of the variant saved last; without it, transformers takes the type of the weights that it loads
            config.pop("dtype", None)
            # from the top of the repository: transformers does not look for code in the subfolder
            module = f"{name}/{COMPONENT_LIBRARY}"
            config["auto_map"] = {
                "AutoConfig": f"{module}.{component_class.config_class.__name__}",
                "AutoModel": f"{module}.{component_class.__name__}",
            }
        write_json(config_file, config)
    return True


def superseded_weights(components: Iterable[str], variant: str | None) -> list[str]:
    """Patterns of the files of a repository that the weights of a pipeline's components take the place of."""
    patterns = [
        pattern
        for weights_name in (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_NAME)
        for pattern in weights_patterns(weights_name, variant)
    ]
    return [f"{name}/{pattern}" for name in components for pattern in patterns]


def upload_repository(
    folder: str | os.PathLike,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    delete_patterns: list[str] | None = None,
) -> CommitInfo:
    """Uploads a folder as one commit, and creates the repository and the branch where they do not exist.

    A folder without a card gets the one that the repository has, or diffusers' if it has none.

    Args:
        folder: of a saved pipeline.
        delete_patterns: files of the repository to delete, unless they are in the folder.

    The others are those of [`RepositoryPipeline.push_to_hub`].
    """
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    if not (Path(folder) / CARD).exists():
        card = load_or_create_model_card(repo_id, token=token, is_pipeline=True)
        populate_model_card(card).save(Path(folder) / CARD)
    return upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        commit_message=commit_message or "Upload pipeline",
        token=token,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=delete_patterns,
        ignore_patterns=IGNORED_FILES,
    )


class RepositoryPipeline(DiffusionPipeline):
    """A pipeline that is saved as a repository, with its code, and that loads no other components than it names.

    Attributes:
        scheduler_classes: names of the classes that are loaded as a component annotated `SchedulerMixin`.
        saved_settings: numbers and truth values that the constructor takes, and that are saved beside the components.
    """

    scheduler_classes: tuple[str, ...] = ()
    saved_settings: tuple[str, ...] = ()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        check_model_index(cls, config_dict)
        name_adapters(config_dict)
        return super().extract_init_dict(config_dict, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves as [`~diffusers.DiffusionPipeline.save_pretrained`] does, and makes the folder a repository that loads
        with `trust_remote_code=True` where `ldlm_hf` is not installed: with its code, and with the model card of the
        folder that the pipeline was loaded from, unless it has a card already.

        Weights of the same variant that the folder, or the repository, holds already are replaced, whether they are
        one file or several; those of other variants stay.

        LoRA adapters of the denoiser are saved in files of their own, as `save_lora_weights` writes them, and a
        warning says how to load them; those that are fused are part of the weights.

        Args:
            push_to_hub: upload the folder, as it is then.
            kwargs: `repo_id` (the folder's name by default), `commit_message`, `private`, `token`, `revision` and
                `create_pr` of the upload, as in [`~RepositoryPipeline.push_to_hub`].

        Raises:
            ValueError: what could not be loaded again: `safe_serialization=False`, `use_flashpack=True`, a variant
                with other signs than letters, digits, - and _, a component with other adapters of peft, or one of
                another class than those that the constructor names.
        """
        check_serialization(safe_serialization, use_flashpack, variant)
        check_saveable(self)
        models = dict(adapted_components(self))
        adapters = {name: one for part, model in models.items() for name, one in adapters_to_save(part, model).items()}
        index_file = Path(save_directory, self.config_name)
        before = saved_adapters(read_json(index_file)) if index_file.is_file() else {}
        with without_adapters(models.values()):
            super().save_pretrained(save_directory, variant=variant, max_shard_size=max_shard_size)
        files = write_adapters(self, adapters, Path(save_directory), before, is_variant=variant is not None)
        write_repository_code(self, save_directory, files)
        card, loaded_from = Path(save_directory, CARD), self.config.get("_name_or_path")
        if loaded_from is not None and Path(loaded_from, CARD).is_file() and not card.exists():
            shutil.copyfile(Path(loaded_from, CARD), card)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            stale = superseded_weights(self.components, variant)
            upload_repository(save_directory, repo_id, delete_patterns=stale, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        revision: str | None = None,
    ) -> CommitInfo:
        """Uploads the pipeline to the Hub, with its code and its model card, in place of weights of the same variant
        that the repository holds already.

        Args:
            repo_id: "organisation/name", or a name in one's own namespace; created if it does not exist.
            commit_message: "Upload pipeline" by default.
            private: whether a new repository is private; `None` is the organisation's default.
            token: of the Hub; `None` is the stored one.
            create_pr: open a pull request instead of committing.
            safe_serialization: only `True`, safetensors, since pickles are never loaded.
            variant: part of the weights' file names, such as `"fp16"` for a pipeline in half precision.
            max_shard_size: largest file of weights, such as `"5GB"`.
            revision: branch to commit to; created if it does not exist.

        Returns:
            The commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            return upload_repository(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=superseded_weights(self.components, variant),
            )
