"""Repositories carry code that works by itself: generated, run where the package is missing, and saved again."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import AutoModel, PreTrainedModel

import ldlm_hf
from ldlm_hf import LDLMPipeline, LDLMTransformer1DModel
from ldlm_hf.loading.remote_code import class_source, generate


MODEL_NAMES = [name for name in ldlm_hf.__all__ if name.startswith("LDLM") or name.endswith("Scheduler")]
COMPONENT_CLASSES = [
    cls
    for cls in (getattr(ldlm_hf, name) for name in MODEL_NAMES)
    if issubclass(cls, (ModelMixin, SchedulerMixin, PreTrainedModel))
]
TRANSFORMERS_MODELS = ["token_encoder", "latent_encoder", "latent_decoder", "token_decoder"]
TEXTS = ["w3 w4 w5", "w6"]

SAMPLE = """
import importlib.util, json, os, sys
import torch, transformers
from diffusers import DiffusionPipeline

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="latent").latents
"""

# arguments: the folders of a pipeline, of one with variants, and one to save to
UNTRUSTED = """
for load in (
    lambda: DiffusionPipeline.from_pretrained(whole),
    lambda: DiffusionPipeline.from_pretrained(whole, trust_remote_code=False),
    lambda: transformers.AutoModel.from_pretrained(whole, subfolder="latent_decoder", trust_remote_code=False),
):
    try:
        load()
    except ValueError as error:
        refusals.append(str(error))
result["refusals"] = refusals
result["executed"] = [name for name in sys.modules if name.startswith(("diffusers_modules", "transformers_modules"))]
result["copied"] = os.path.exists(os.path.join(os.environ["HF_HOME"], "modules"))
"""
TRUSTED = """
pipe = DiffusionPipeline.from_pretrained(whole, trust_remote_code=True)
result["module"] = type(pipe).__module__
result["latents"] = sample(pipe).tolist()
result["encoded"] = pipe.encode(["w3 w4 w5", "w6"]).tolist()
result["decoded"] = pipe.decode(sample(pipe))
result["warnings"] = warnings.getvalue()
try:
    pipe(batch_size=0)
except ValueError as error:
    result["refused_input"] = str(error)

for name, arguments in {
    "dtype": {"dtype": torch.bfloat16},
    "dtypes": {"dtype": {"transformer": torch.float16, "default": torch.float32}},
    "variant": {"variant": "fp16", "dtype": torch.float16},
    "sharded": {},
    "device_map": {"device_map": "cpu"},
    "without encoders": {"token_encoder": None, "latent_encoder": None},
}.items():
    # DiffusionPipeline loads optional components of another class, even if they are passed as None
    loader = type(pipe) if name == "without encoders" else DiffusionPipeline
    other = loader.from_pretrained(variants, trust_remote_code=True, **arguments)
    types = {key: str(value.dtype) for key, value in other.components.items() if isinstance(value, torch.nn.Module)}
    result[name] = {"types": types, "latents": sample(other).tolist()}

result["models"] = {}
for name in ("token_encoder", "latent_encoder", "latent_decoder", "token_decoder"):
    model = transformers.AutoModel.from_pretrained(whole, subfolder=name, trust_remote_code=True)
    states = zip(model.state_dict().values(), getattr(pipe, name).state_dict().values(), strict=True)
    alone = os.path.join(again, "alone", name)
    model.save_pretrained(alone)
    reloaded = transformers.AutoModel.from_pretrained(alone, trust_remote_code=True)
    equal = all(torch.equal(*pair) for pair in states)
    result["models"][name] = [type(model).__name__, equal, type(reloaded).__name__]

# other pipelines have been loaded since, whose files ran in the same place
pipe.save_pretrained(os.path.join(again, "whole"))
result["latents again"] = sample(
    DiffusionPipeline.from_pretrained(os.path.join(again, "whole"), trust_remote_code=True)
).tolist()
"""
WITHOUT_PACKAGE = f"""
{SAMPLE}
import io, logging
import diffusers.utils.logging as diffusers_logging

warnings = io.StringIO()
diffusers_logging.get_logger("diffusers").addHandler(logging.StreamHandler(warnings))
whole, variants, again = sys.argv[1:]
result, refusals = {{}}, []
assert importlib.util.find_spec("ldlm_hf") is None, sys.path
{UNTRUSTED}
{TRUSTED}
print(json.dumps(result))
"""

# the package is there, but nothing has imported it when the repository's code is run
NOT_IMPORTED_AT_FIRST = f"""
{SAMPLE}
whole, again = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(whole, trust_remote_code=True)
result = {{"imported": "ldlm_hf" in sys.modules, "latents": sample(pipe).tolist()}}

import ldlm_hf
from ldlm_hf.loading.remote_code import generate

pipe.save_pretrained(again)
result["latents again"] = sample(ldlm_hf.LDLMPipeline.from_pretrained(again)).tolist()
result["generated"] = generate(ldlm_hf.LDLMLatentDecoder)
# classes that came out of a repository, in the installed pipeline
mixed = ldlm_hf.LDLMPipeline(**pipe.components)
mixed.save_pretrained(again)
result["latents of both"] = sample(ldlm_hf.LDLMPipeline.from_pretrained(again)).tolist()
# and the other way round
pipe.transformer = ldlm_hf.LDLMTransformer1DModel.from_pretrained(whole, subfolder="transformer")
try:
    pipe.save_pretrained(again)
except ValueError as error:
    result["refusal"] = str(error)
print(json.dumps(result))
"""


def sample(pipe: DiffusionPipeline) -> list:
    """Latents as nested lists."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="latent").latents.tolist()


def top_level_definitions(source: str) -> dict[str, str]:
    """Name → what stands for it at the top of a file."""
    definitions = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            definitions[statement.name] = ast.unparse(statement)
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            definitions[statement.targets[0].id] = ast.unparse(statement)
    return definitions


class Repositories:
    """A pipeline, what it gives, and the folders it was saved to."""

    def __init__(self, pipe: LDLMPipeline, folder: Path):
        self.pipe, self.folder = pipe, folder
        self.whole, self.variants, self.again = (folder / name for name in ("whole", "variants", "again"))
        pipe.save_pretrained(self.whole)
        self.latents = sample(pipe)
        self.encoded = pipe.encode(TEXTS).tolist()
        self.decoded = pipe.decode(torch.tensor(self.latents))
        pipe.save_pretrained(self.variants, max_shard_size="10KB")
        half = LDLMPipeline.from_pretrained(self.whole, dtype=torch.float16)
        half.save_pretrained(folder / "half", variant="fp16")
        for path in (folder / "half").glob("*/*.fp16*"):
            shutil.copy(path, self.variants / path.parent.name)
        self.half_latents = sample(half)


@pytest.fixture
def repositories(
    make_pipeline: Callable[..., LDLMPipeline], tmp_path_factory: pytest.TempPathFactory, built: dict[str, Any]
) -> Repositories:
    if "repositories" not in built:
        built["repositories"] = Repositories(make_pipeline(), tmp_path_factory.mktemp("repositories"))
    return built["repositories"]


@pytest.fixture
def without_package(repositories: Repositories, run_python: Callable[..., Any], built: dict[str, Any]) -> dict:
    """What a process found that cannot import the package."""
    if "without_package" not in built:
        folders = (repositories.whole, repositories.variants, repositories.again)
        built["without_package"] = run_python(WITHOUT_PACKAGE, *folders, installed=False)
    return built["without_package"]


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """What the tests of this file share, since each costs seconds."""
    return {}


@pytest.mark.slow
def test_nothing_runs_without_trust(without_package: dict):
    assert len(without_package["refusals"]) == 3
    assert all("trust_remote_code=True" in refusal for refusal in without_package["refusals"])
    assert without_package["executed"] == []
    assert not without_package["copied"]


@pytest.mark.slow
def test_trusted_code_gives_the_same(without_package: dict, repositories: Repositories):
    assert without_package["module"].startswith("diffusers_modules.")
    assert without_package["latents"] == repositories.latents
    assert without_package["encoded"] == repositories.encoded
    assert without_package["decoded"] == repositories.decoded
    assert "`batch_size` must be a positive integer" in without_package["refused_input"]
    assert "Expected types" not in without_package["warnings"]
    assert "cannot get type annotation" not in without_package["warnings"]


@pytest.mark.slow
def test_trusted_code_loads_every_form_of_weights(without_package: dict, repositories: Repositories):
    full = dict.fromkeys(["transformer", *TRANSFORMERS_MODELS], "torch.float32")
    decoders = {name: full[name] for name in ("transformer", "latent_decoder", "token_decoder")}
    assert without_package["dtype"]["types"] == dict.fromkeys(full, "torch.bfloat16")
    assert without_package["dtypes"]["types"] == full | {"transformer": "torch.float16"}
    assert without_package["variant"]["types"] == dict.fromkeys(full, "torch.float16")
    assert without_package["variant"]["latents"] == repositories.half_latents != repositories.latents
    assert len(list(repositories.variants.glob("transformer/*-of-*.safetensors"))) > 1
    # the last bits of a product depend on where in memory its factors lie
    sharded = sample(LDLMPipeline.from_pretrained(repositories.variants))
    assert torch.allclose(torch.tensor(sharded), torch.tensor(repositories.latents), atol=1e-5)
    assert without_package["sharded"] == {"types": full, "latents": sharded}
    assert without_package["device_map"] == {"types": full, "latents": sharded}
    assert without_package["without encoders"] == {"types": decoders, "latents": sharded}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS_MODELS)
def test_auto_model_runs_trusted_code(without_package: dict, repositories: Repositories, name: str):
    class_name = type(getattr(repositories.pipe, name)).__name__
    assert without_package["models"][name] == [class_name, True, class_name]


@pytest.mark.slow
def test_saved_by_trusted_code_it_loads_both_ways(without_package: dict, repositories: Repositories):
    assert without_package["latents again"] == repositories.latents
    again = repositories.again / "whole"
    assert sample(LDLMPipeline.from_pretrained(again)) == repositories.latents
    written = {path.relative_to(repositories.whole) for path in repositories.whole.rglob("*") if path.is_file()}
    assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == written
    # transformers notes in a tokenizer's configuration that it was loaded from a folder
    for name in written - {Path("tokenizer/tokenizer_config.json")}:
        assert (again / name).read_bytes() == (repositories.whole / name).read_bytes()


@pytest.mark.parametrize("pipeline_class", [LDLMPipeline, DiffusionPipeline])
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_installed_classes_win(repositories: Repositories, pipeline_class: type, trust: dict[str, bool]):
    pipe = pipeline_class.from_pretrained(repositories.whole, **trust)
    assert type(pipe) is LDLMPipeline
    assert {type(component).__module__.partition(".")[0] for component in pipe.components.values()} == {
        "ldlm_hf",
        "transformers",
    }
    assert sample(pipe) == repositories.latents


def test_installed_auto_model_and_single_components(repositories: Repositories):
    decoder = AutoModel.from_pretrained(repositories.whole, subfolder="latent_decoder")
    assert type(decoder) is ldlm_hf.LDLMLatentDecoder
    transformer = LDLMTransformer1DModel.from_pretrained(repositories.variants, subfolder="transformer")
    pairs = zip(transformer.parameters(), repositories.pipe.transformer.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.slow
def test_package_imported_after_the_repositorys_code(repositories: Repositories, run_python: Callable[..., Any]):
    found = run_python(
        NOT_IMPORTED_AT_FIRST, repositories.whole, repositories.folder / "imported late", installed=True
    )
    assert not found["imported"]
    assert found["latents"] == found["latents again"] == found["latents of both"] == repositories.latents
    assert found["generated"] == generate(ldlm_hf.LDLMLatentDecoder)
    assert "transformer is of the installed ldlm_hf" in found["refusal"]


def test_index_and_configurations(repositories: Repositories):
    index = json.loads((repositories.whole / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_ldlm", "LDLMPipeline"]
    assert index["transformer"] == ["ldlm_hf", "LDLMTransformer1DModel"]
    assert index["tokenizer"][0] == "transformers"
    config = json.loads((repositories.whole / "latent_decoder" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "latent_decoder/ldlm_hf.LDLMLatentDecoderConfig",
        "AutoModel": "latent_decoder/ldlm_hf.LDLMLatentDecoder",
    }


def test_a_loaded_pipelines_place_and_absent_parts_are_left_out(repositories: Repositories, tmp_path: Path):
    pipe = LDLMPipeline.from_pretrained(repositories.whole, token_encoder=None, latent_encoder=None)
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "token_encoder").exists()
    for path in tmp_path.rglob("*.json"):
        assert str(repositories.folder) not in path.read_text()
    assert sample(DiffusionPipeline.from_pretrained(tmp_path)) == repositories.latents


def test_compiled_components_are_saved_with_their_code(repositories: Repositories, tmp_path: Path):
    pipe = LDLMPipeline.from_pretrained(repositories.whole)
    pipe.transformer = torch.compile(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    code = (tmp_path / "transformer" / "ldlm_hf.py").read_text()
    assert code == generate(LDLMTransformer1DModel)


def test_card_goes_along(repositories: Repositories, tmp_path: Path):
    shutil.copytree(repositories.whole, tmp_path / "trained")
    (tmp_path / "trained" / "README.md").write_text("of the training")
    pipe = LDLMPipeline.from_pretrained(tmp_path / "trained")
    pipe.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "README.md").read_text() == "of the training"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("its own")
    pipe.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "README.md").read_text() == "its own"


@pytest.mark.parametrize("cls", [LDLMPipeline, *COMPONENT_CLASSES])
def test_generated_files(cls: type):
    source = class_source(cls)
    assert source is not None
    assert source == generate.__wrapped__(cls)
    tree = ast.parse(source)
    compile(tree, cls.__name__, "exec")
    first_line = source.splitlines()[0]
    assert f"ldlm_hf {ldlm_hf.__version__}" in first_line
    assert inspect.getsourcefile(cls).endswith(first_line.split(" from ")[1].partition(",")[0])
    assert ast.get_docstring(tree) == inspect.getdoc(sys.modules[cls.__module__])
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    assert ast.unparse(node) == ast.unparse(ast.parse(inspect.getsource(cls)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.partition(".")[0] != "ldlm_hf"
        elif isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == "ldlm_hf" for alias in node.names)


def test_component_files_can_share_one_module():
    """diffusers runs each at the same place and in the same namespace: the last one's definitions are everybody's, and
    Python's cache tells files of the same second apart by their sizes."""
    sources = [generate(cls) for cls in COMPONENT_CLASSES]
    assert len({len(source.encode()) for source in sources}) == len(sources)
    for one, other in itertools.combinations(map(top_level_definitions, sources), 2):
        assert all(one[name] == other[name] for name in one.keys() & other.keys())


@pytest.fixture
def add_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], ModuleType]]:
    """Adds a module to the package."""
    monkeypatch.setattr(ldlm_hf, "__path__", [*ldlm_hf.__path__, str(tmp_path)])
    names = []

    def add(name: str, source: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        names.append(name)
        return importlib.import_module(f"ldlm_hf.{name}")

    yield add
    for name in names:
        del sys.modules[f"ldlm_hf.{name}"]
        delattr(ldlm_hf, name)


UNFIT_SOURCES = {
    "conditional": ("if True:\n    y = 1\nclass Thing: pass", "only imports, functions, classes"),
    "unpacked": ("x, y = 1, 2\nclass Thing: pass", "assignments of plain names"),
}


@pytest.mark.parametrize("name", UNFIT_SOURCES)
def test_sources_that_cannot_stand_alone(add_module: Callable[..., Any], name: str):
    source, message = UNFIT_SOURCES[name]
    with pytest.raises(ValueError, match=f"ldlm_hf.{name}, line .*{message}"):
        generate(add_module(name, source).Thing)


def test_one_name_with_two_meanings_is_refused(add_module: Callable[..., Any]):
    add_module("first_meaning", "def helper(): return 1\ndef use(): return helper()")
    source = """
        from .first_meaning import use

        def helper(): return 2

        class Thing:
            x = use() + helper()
        """
    with pytest.raises(ValueError, match=r"'helper' is one thing in ldlm_hf\..*rename one"):
        generate(add_module("second_meaning", source).Thing)


def test_a_pipeline_may_lie_beside_its_model_and_be_a_command(add_module: Callable[..., Any]):
    source = """
        from diffusers import DiffusionPipeline, ModelMixin

        class Model(ModelMixin):
            pass

        class Thing(DiffusionPipeline):
            def __init__(self, model: Model):
                self.register_modules(model=model)

        def main():
            from_elsewhere()

        if __name__ == "__main__":
            from .models import layers

            main()
        """
    text = generate(add_module("one_file", source).Thing)
    assert "Model = object" in text
    assert "class Model" not in text and "main()" not in text


def test_comments_and_decorators_come_along(add_module: Callable[..., Any]):
    numbers = '''
        """Halves of
        numbers."""
        import math

        def half():
            return math.pi / 2

        UNUSED = 1
        '''
    source = '''
        """The thing."""
        import functools
        from .numbers_of import half

        # why it is three
        THREE = 3

        # why it is cached
        @functools.cache
        def product():
            return THREE * half()

        class Thing:
            value = product()
        '''
    add_module("numbers_of", numbers)
    thing = add_module("with_comments", source).Thing
    text = generate(thing)
    namespace: dict[str, Any] = {"__file__": __file__}
    exec(compile(text, "generated", "exec"), namespace)
    assert namespace["Thing"].value == thing.value
    assert namespace["__doc__"] == "The thing."
    assert "# why it is three\nTHREE = 3\n" in text
    assert "# why it is cached\n@functools.cache\ndef product" in text
    assert "# Halves of\n# numbers.\n" in text
    assert "UNUSED" not in text
