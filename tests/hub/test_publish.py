"""Publishing: what a folder becomes, what reaches the Hub, and a Space that runs."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, SpaceCard, constants
from safetensors.torch import load_file

import ldlm_hf
from ldlm_hf import LDLMPipeline
from ldlm_hf.hub.publish import main, prepare_repository, space_files
from loopback_hub import LoopbackHub


CARD = "---\nlicense: mit\nlibrary_name: diffusers\npipeline_tag: text-generation\n---\n# Tiny\n"
COMPONENTS = ["transformer", "latent_decoder", "token_decoder", "token_encoder", "latent_encoder"]

# arguments: folder of a pipeline with a card, and of one without
PUBLISH = """
import json, sys
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download
from ldlm_hf import LDLMPipeline
from ldlm_hf.hub.publish import main, publish

folder, bare = sys.argv[1:]
api = HfApi()
result = {}

def files(repository, revision="main", **options):
    return sorted(api.list_repo_files(repository, revision=revision, **options))

def read(repository, name, **options):
    return open(hf_hub_download(repository, name, **options), encoding="utf-8").read()

main([folder, "org/tiny", "--private", "--variant", "fp16", "--space", "org/tiny-space"])
result["private"] = api.model_info("org/tiny").private
result["published"] = files("org/tiny")
result["card"] = read("org/tiny", "README.md")
result["space"] = files("org/tiny-space", repo_type="space")
result["app"] = read("org/tiny-space", "app.py", repo_type="space")

pipe = LDLMPipeline.from_pretrained("org/tiny")
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
result["sequences"] = pipe(batch_size=2, num_inference_steps=4, generator=generator).sequences.tolist()

# again, without the variant and in shards: what the folder no longer holds goes
for path in Path(folder).glob("*/*.fp16*"):
    path.unlink()
commit = publish(folder, "tiny", max_shard_size="10KB")
result["republished"] = files("org/tiny")

# a branch
with open(folder + "/samples.md", "w") as samples:
    samples.write("as of this trial")
publish(folder, "org/tiny", revision="trial", commit_message="A trial")
result["on the branch only"] = sorted({*files("org/tiny", revision="trial")} - {*files("org/tiny")})

# the pipeline itself: its card goes along, the repository's stays, and one is written where there is none
LDLMPipeline.from_pretrained(folder).push_to_hub("org/pushed", private=True, variant="fp16", revision="halves")
result["pushed"] = files("org/pushed", revision="halves")
result["pushed card"] = read("org/pushed", "README.md", revision="halves")
unknown = LDLMPipeline.from_pretrained(bare)
unknown.push_to_hub("org/tiny")
result["kept card"] = read("org/tiny", "README.md")
unknown.save_pretrained(bare + "-saved", push_to_hub=True, repo_id="org/new", commit_message="First")
result["new card"] = read("org/new", "README.md")
result["new"] = files("org/new")
print(json.dumps(result))
"""


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def folder(make_pipeline: Callable[..., LDLMPipeline], tmp_path: Path) -> Path:
    """A pipeline's, with a card and a picture."""
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "README.md").write_text(CARD)
    (tmp_path / "pipeline" / "curves.png").write_bytes(b"a picture")
    return tmp_path / "pipeline"


def weights(folder: Path, variant: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a pipeline, by component and name."""
    infix = rf"\.{variant}" if variant else ""
    name = re.compile(rf"(diffusion_pytorch_model|model){infix}(-\d+-of-\d+)?\.safetensors")
    return {
        f"{path.parent.name}/{key}": tensor
        for path in folder.glob("*/*.safetensors")
        if name.fullmatch(path.name)
        for key, tensor in load_file(path).items()
    }


@pytest.mark.usefixtures("no_hub")
def test_variant_and_shards_stand_beside_the_same_configuration(folder: Path):
    before = weights(folder)
    configurations = {path: path.read_text() for path in folder.glob("*/config.json")}
    prepare_repository(folder, variant="fp16", max_shard_size="10KB")
    after, halves = weights(folder), weights(folder, "fp16")
    assert before.keys() == after.keys() == halves.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert halves["transformer/proj_in.weight"].dtype == torch.float16
    # statistics that half precision would spoil
    assert halves["token_encoder/mean"].dtype == torch.float32
    for path, text in configurations.items():
        assert path.read_text() == text
    for component in COMPONENTS:
        names = {path.name for path in (folder / component).iterdir()}
        assert not names & {"model.safetensors", "diffusion_pytorch_model.safetensors"}
        assert sum(name.endswith((".index.json", ".index.fp16.json")) for name in names) == 2
    pipe = LDLMPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float16)
    assert pipe.transformer.dtype == torch.float16

    (folder / "transformer" / "notes.fp16.txt").write_text("on rounding")
    prepare_repository(folder, variant="fp16", max_shard_size="1GB")
    assert (folder / "transformer" / "notes.fp16.txt").exists()
    assert {key: tensor.tolist() for key, tensor in weights(folder).items()} == {
        key: tensor.tolist() for key, tensor in before.items()
    }
    for component in COMPONENTS:
        names = sorted(path.name for path in (folder / component).glob("*model*"))
        stem = "diffusion_pytorch_model" if component == "transformer" else "model"
        assert names == [f"{stem}.fp16.safetensors", f"{stem}.safetensors"]


@pytest.mark.usefixtures("no_hub")
def test_code_is_written_afresh_and_no_random_number_drawn(folder: Path):
    code = (folder / "transformer" / "ldlm_hf.py").read_text()
    (folder / "transformer" / "ldlm_hf.py").write_text("of an older version")
    (folder / "pipeline_ldlm.py").unlink()
    random_state = torch.get_rng_state()
    prepare_repository(folder)
    assert (folder / "transformer" / "ldlm_hf.py").read_text() == code
    assert (folder / "pipeline_ldlm.py").exists()
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.usefixtures("no_hub")
def test_unfit_folders_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(OSError, match="there is no such folder"):
        prepare_repository(tmp_path / "nothing")
    with pytest.raises(ValueError, match="variant='int4' is unknown; it is one of fp16, bf16"):
        prepare_repository(folder, variant="int4")
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md is no valid YAML"):
        prepare_repository(folder)
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"has no model card, README\.md"):
        prepare_repository(folder)


@pytest.mark.usefixtures("no_hub")
def test_weights_that_are_not_worth_publishing_are_refused(folder: Path):
    pipe = LDLMPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipe.token_decoder.head.weight[0, 0] = 1e6
    pipe.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"token_decoder: head\.weight overflows as fp16"):
        prepare_repository(folder, variant="fp16")
    prepare_repository(folder, variant="bf16")
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] = torch.nan
    pipe.save_pretrained(folder)
    with pytest.raises(ValueError, match="not finite"):
        prepare_repository(folder)


@pytest.fixture
def refusing_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that accepts no card's metadata."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'"license" must be one of these')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()
        thread.join()


@pytest.mark.skipif(
    "constants.ENDPOINT" not in inspect.getsource(ModelCard.validate),
    reason="this huggingface_hub asks huggingface.co whatever the endpoint",
)
@pytest.mark.usefixtures("refusing_hub")
def test_a_card_that_the_hub_refuses_stops_publishing(folder: Path):
    with pytest.raises(ValueError, match='"license" must be one of these'):
        prepare_repository(folder)


@pytest.mark.usefixtures("no_hub")
def test_dry_run_lists_what_would_be_uploaded(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "pipeline_ldlm.pyc").write_bytes(b"")
    main([str(folder), "org/tiny", "--dry_run", "--space", "org/tiny-space"])
    lines = capsys.readouterr().out.splitlines()
    listed = {}
    for line in lines:
        size, _, name = line.strip().partition("  ")
        if name and size.replace(",", "").isdigit():
            listed[name] = int(size.replace(",", ""))
    assert listed["curves.png"] == len("a picture")
    weights_file = "transformer/diffusion_pytorch_model.safetensors"
    assert listed[weights_file] == (folder / weights_file).stat().st_size
    assert {"pipeline_ldlm.py", "model_index.json", "latent_decoder/ldlm_hf.py", "app.py", "requirements.txt"} <= set(
        listed
    )
    assert not any(".pyc" in name for name in listed)
    titles = [line for line in lines if line.startswith("org/")]
    assert [title.partition(":")[0] for title in titles] == ["org/tiny", "org/tiny-space"]


@pytest.mark.slow
def test_publishing_over_http(folder: Path, loopback_hub: LoopbackHub, tmp_path: Path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("README.md", "curves.png"))
    environment = loopback_hub.environment(tmp_path / "home", token="hf_org") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PUBLISH, str(folder), str(bare)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])

    assert found["private"] is True
    code = {"pipeline_ldlm.py", "scheduler/ldlm_hf.py", *(f"{name}/ldlm_hf.py" for name in COMPONENTS)}
    halves = {f"{name}/model.fp16.safetensors" for name in COMPONENTS[1:]}
    halves |= {"transformer/diffusion_pytorch_model.fp16.safetensors"}
    whole = {name.replace(".fp16", "") for name in halves}
    assert code | halves | whole | {"README.md", "curves.png", "model_index.json"} <= set(found["published"])
    assert found["card"] == CARD
    assert {"README.md", "app.py", "requirements.txt", "ldlm_hf/app/page.py", "ldlm_hf/__init__.py"} <= set(
        found["space"]
    )
    assert 'from_pretrained("org/tiny")' in found["app"].replace("'", '"')
    pipe = LDLMPipeline.from_pretrained(bare)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    assert found["sequences"] == pipe(batch_size=2, num_inference_steps=4, generator=generator).sequences.tolist()

    republished = set(found["republished"])
    assert not republished & (halves | whole)
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in republished
    assert code <= republished
    tiny = loopback_hub.repositories["models/org/tiny"]
    assert [commit.title for commit in tiny.commits.values()][1:4] == ["Upload pipeline", "Upload pipeline", "A trial"]
    assert set(tiny.references) == {"main", "trial"}
    assert tiny.resolve("trial").title == "A trial"
    assert found["on the branch only"] == ["samples.md"]

    assert code | halves <= set(found["pushed"])
    assert not whole & set(found["pushed"])
    assert found["pushed card"] == CARD
    assert ModelCard(found["kept card"]).data.license == "mit"
    assert "# Tiny" in found["kept card"]
    assert ModelCard(found["new card"]).data.library_name == "diffusers"
    assert loopback_hub.repositories["models/org/new"].resolve("main").title == "First"
    assert code | whole <= set(found["new"])


def test_space_files():
    files = space_files("org/tiny")
    card = SpaceCard(files["README.md"])
    assert card.data.sdk == "gradio"
    assert card.data.sdk_version == importlib.metadata.version("gradio")
    assert card.data.app_file == "app.py"
    assert card.data.models == ["org/tiny"]
    required = {re.split("[<>=]", line)[0]: line for line in files["requirements.txt"].splitlines()}
    assert set(required) == {"torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub"}
    assert set(required.values()) <= set(importlib.metadata.requires("ldlm_hf"))
    assert files["ldlm_hf/__init__.py"] == inspect.getsource(ldlm_hf)
    rooms = {name.split("/")[1] for name in files if name.count("/") > 1}
    assert rooms == {"app", "loading", "models", "pipelines", "schedulers"}
    assert "revision='trial'" in space_files("org/tiny", "trial")["app.py"]
    ast.parse(files["app.py"])


@pytest.mark.slow
def test_a_space_runs_without_the_package(folder: Path, tmp_path: Path):
    space = tmp_path / "space"
    for name, content in space_files(str(folder)).items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_text(content, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    places = [place for place in sys.path if place and not (Path(place) / "ldlm_hf").exists()]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(places),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-S", "app.py"], cwd=space, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        page = wait_for(f"http://127.0.0.1:{port}/config", process)
    finally:
        process.terminate()
        process.wait()
    assert page is not None, (tmp_path / "log").read_text()
    assert any("enerate" in str(component["props"].get("value")) for component in page["components"])


def wait_for(address: str, process: subprocess.Popen, seconds: float = 180) -> Any:
    """The JSON at an address, as soon as the process serves it; None if the process ends or takes too long."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.2)
    return None
