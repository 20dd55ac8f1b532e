from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import diffusers
import pytest
import transformers
from diffusers.pipelines import pipeline_loading_utils

import ldlm_hf
from ldlm_hf import registration
from ldlm_hf.registration import register, require
from ldlm_hf.schedulers import SCHEDULERS


def test_diffusers_knows_the_package():
    base_classes = pipeline_loading_utils.LOADABLE_CLASSES["ldlm_hf"]
    assert set(base_classes) == {"ModelMixin", "SchedulerMixin", "PreTrainedModel"}
    for name, methods in base_classes.items():
        base_class = getattr(ldlm_hf, name)
        assert all(callable(getattr(base_class, method)) for method in methods)
    assert diffusers.pipelines.ldlm_hf is ldlm_hf


@pytest.mark.parametrize("name", ["LDLMPipeline", "LDLMTransformer1DModel", *SCHEDULERS])
def test_native_classes_are_attributes_of_diffusers(name: str):
    assert getattr(diffusers, name) is getattr(ldlm_hf, name)


@pytest.mark.parametrize("name", ["LDLMTokenEncoder", "LDLMLatentEncoder", "LDLMLatentDecoder", "LDLMTokenDecoder"])
def test_auto_classes_know_the_models(name: str):
    model_class, config_class = getattr(ldlm_hf, name), getattr(ldlm_hf, f"{name}Config")
    config = transformers.AutoConfig.for_model(config_class.model_type)
    assert type(config) is config_class
    assert transformers.AutoModel._model_mapping[config_class] is model_class


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """The folder of a pipeline of diffusers' own, that the package has nothing to do with."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("loader", [diffusers.DDPMPipeline, diffusers.DiffusionPipeline])
def test_indices_of_other_pipelines_are_read_by_diffusers(foreign: Path, loader: type[diffusers.DiffusionPipeline]):
    index = foreign / "model_index.json"
    text = index.read_text()
    index.write_text(text + " " * 2**21)
    assert type(loader.from_pretrained(foreign)) is diffusers.DDPMPipeline
    index.write_text(text[: len(text) // 2])
    for cls in (loader, diffusers.StableDiffusionPipeline):
        with pytest.raises(OSError, match="is not a valid JSON file"):
            cls.from_pretrained(foreign)


def test_a_variant_of_which_other_pipelines_have_a_part_is_loaded_by_diffusers(foreign: Path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(foreign)
    (foreign / "scheduler" / "notes.fp16.txt").write_text("")
    assert type(diffusers.DiffusionPipeline.from_pretrained(foreign, variant="fp16")) is type(pipe)


class OtherPipeline(diffusers.DiffusionPipeline):
    """Another pipeline of the package: one of its public names."""

    def __init__(self, scheduler: diffusers.SchedulerMixin):
        super().__init__()
        self.register_modules(scheduler=scheduler)


@pytest.mark.parametrize("name", ["OtherPipeline", ["pipeline_ldlm", "OtherPipeline"]], ids=["alone", "with code"])
def test_every_pipeline_of_the_package_loads_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name):
    monkeypatch.setattr(ldlm_hf, "OtherPipeline", OtherPipeline, raising=False)
    monkeypatch.setattr(diffusers, "OtherPipeline", None, raising=False)
    monkeypatch.setattr(registration, "PIPELINES", {"LDLMPipeline"})
    register(ldlm_hf)
    OtherPipeline(ldlm_hf.TangentDDIMScheduler()).save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is OtherPipeline


def test_registering_twice_changes_nothing():
    before = dict(pipeline_loading_utils.LOADABLE_CLASSES)
    register(ldlm_hf)
    assert before == pipeline_loading_utils.LOADABLE_CLASSES


def test_a_table_that_diffusers_lost_is_named():
    with pytest.raises(ImportError, match=rf"registers.*moved\.NO_SUCH_TABLE.*{diffusers.__version__}"):
        require(types.ModuleType("moved"), "NO_SUCH_TABLE")
    assert require(diffusers, "ModelMixin") is diffusers.ModelMixin


@pytest.mark.parametrize("table", ["LOADABLE_CLASSES", "ALL_IMPORTABLE_CLASSES"])
def test_registration_says_what_has_moved(monkeypatch: pytest.MonkeyPatch, table: str):
    monkeypatch.delattr(pipeline_loading_utils, table)
    with pytest.raises(ImportError, match=table):
        register(ldlm_hf)


def test_a_base_class_that_diffusers_lost_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(pipeline_loading_utils.ALL_IMPORTABLE_CLASSES, "SchedulerMixin")
    with pytest.raises(ImportError, match="SchedulerMixin"):
        register(ldlm_hf)


def test_public_names():
    for name in ldlm_hf.__all__:
        assert getattr(ldlm_hf, name) is not None
        assert name in dir(ldlm_hf)
    with pytest.raises(AttributeError, match="NoSuchName"):
        ldlm_hf.NoSuchName  # noqa: B018


def test_every_file_of_a_solver_is_listed():
    files = {file.stem for file in (Path(ldlm_hf.__file__).parent / "schedulers").glob("scheduling_tangent_*.py")}
    assert files == set(SCHEDULERS.values())
    assert set(SCHEDULERS) <= set(ldlm_hf.__all__)


def test_type_checkers_know_the_public_names():
    """What they read is written out: each name is that of the package, and only solvers may be left out."""
    tree = ast.parse(Path(ldlm_hf.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    named = {alias.name: node.module for node in block.body for alias in node.names}
    for name, module in named.items():
        assert getattr(importlib.import_module(f"ldlm_hf.{module}"), name) is getattr(ldlm_hf, name)
    base_classes = {"ModelMixin", "PreTrainedModel", "SchedulerMixin"}
    assert set(named) <= set(ldlm_hf.__all__) <= set(named) | set(SCHEDULERS) | base_classes


@pytest.mark.slow
def test_importing_the_package_imports_no_evaluation_library():
    """Sampling needs neither data sets nor metrics; each is imported when it is first asked for."""
    code = (
        "import sys, ldlm_hf\n"
        "from ldlm_hf import JointObjective, LDLMPipeline\n"
        "print([name for name in ('mauve', 'evaluate', 'datasets', 'faiss') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"
