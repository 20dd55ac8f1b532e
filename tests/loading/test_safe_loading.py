"""Hostile repositories are refused and run nothing; every honest way of loading still works."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hostile_repositories import CANARY, CASES, Case, attempt, make_repository, put_pickle
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from ldlm_hf import (
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMPipeline,
    LDLMTokenDecoder,
    LDLMTokenEncoder,
    LDLMTransformer1DModel,
    TangentEulerMaruyamaScheduler,
)
from ldlm_hf.loading.checks import check_settings
from ldlm_hf.loading.safe_loading import limited_construction, read_json
from loopback_hub import LoopbackHub


# these take seconds each, most of it for writing what is hostile; the command runs them
SLOW = ("100 000 tensors", "10^6 tensors", "2^15 tensors", "100 MB", "MiB")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest") / "repository"
    make_repository(folder, width=24, num_layers=2, vocab_size=2048)
    return folder


@pytest.fixture
def copied(honest: Path, tmp_path: Path) -> Path:
    """A copy whose files may be replaced, not written into: they are links to the honest repository's."""
    return Path(shutil.copytree(honest, tmp_path / "repository", copy_function=os.link))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not any(word in case.name for word in SLOW)],
    ids=lambda case: f"{case.component}: {case.name}",
)
def test_case(case: Case, copied: Path, monkeypatch: pytest.MonkeyPatch):
    """Each case in the first of its ways of loading; the command tries all, and measures memory."""
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    case.change(copied)
    outcome = attempt(case, case.ways[0], copied)
    assert outcome.is_expected(case.match), outcome
    assert not (copied / CANARY).exists()


def test_the_canary_is_written_where_something_is_unpickled(copied: Path):
    put_pickle("weights.bin", in_zip=False)(copied)
    with (copied / "weights.bin").open("rb") as file:
        pickle.load(file)
    assert (copied / CANARY).exists()


def test_repository_code_runs_where_it_is_trusted_and_only_there(copied: Path):
    code = next(case for case in CASES if case.name == "code of a pipeline of another name")
    code.change(copied)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(copied)
    assert not (copied / CANARY).exists()
    with pytest.raises(AttributeError):  # it holds no pipeline
        DiffusionPipeline.from_pretrained(copied, trust_remote_code=True)
    assert (copied / CANARY).exists()


@pytest.mark.parametrize("component", ["transformer", "latent_encoder", "token_decoder", "token_encoder"])
def test_a_billion_layers_take_no_memory(copied: Path, component: str):
    """Of Python's own, of which modules without weights consist; the command measures all of a process's."""
    case = next(case for case in CASES if case.component == component and "1000000000" in case.name)
    case.change(copied)
    tracemalloc.start()
    try:
        assert attempt(case, "component", copied).is_expected(case.match)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------- what must go on working


def test_sharded_weights(honest: Path, tmp_path: Path):
    pipe = LDLMPipeline.from_pretrained(honest)
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("transformer", "token_decoder", "token_encoder"):
        assert len(list((tmp_path / name).glob("*-of-*.safetensors"))) > 1
        assert_equal(getattr(LDLMPipeline.from_pretrained(tmp_path), name), getattr(pipe, name))
    assert_equal(LDLMTransformer1DModel.from_pretrained(tmp_path, subfolder="transformer"), pipe.transformer)


def test_variants(honest: Path, tmp_path: Path):
    pipe = LDLMPipeline.from_pretrained(honest, dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = LDLMPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert_equal(loaded.transformer, pipe.transformer)
    assert_equal(loaded.latent_decoder, pipe.latent_decoder)
    with pytest.raises(OSError, match=r"holds no model\.safetensors"):
        LDLMLatentDecoder.from_pretrained(tmp_path, subfolder="latent_decoder")


@pytest.mark.parametrize("arguments", [{"device_map": "auto"}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}])
def test_ways_of_placing_weights(honest: Path, arguments: dict[str, Any]):
    for model_class, subfolder in ((LDLMTransformer1DModel, "transformer"), (LDLMTokenEncoder, "token_encoder")):
        plain = model_class.from_pretrained(honest, subfolder=subfolder)
        assert_equal(model_class.from_pretrained(honest, subfolder=subfolder, **arguments), plain)


FROM_THE_HUB = """
import json, sys
from huggingface_hub import HfApi
from ldlm_hf import LDLMLatentDecoder, LDLMTransformer1DModel

honest, hostile = sys.argv[1:]
api = HfApi()
api.create_repo("org/honest")
first = api.upload_folder(repo_id="org/honest", folder_path=honest).oid
api.upload_folder(repo_id="org/honest", folder_path=hostile, delete_patterns="*")

def load(model_class, subfolder, **arguments):
    try:
        return type(model_class.from_pretrained("org/honest", subfolder=subfolder, **arguments)).__name__
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())

print(json.dumps({
    "transformer": load(LDLMTransformer1DModel, "transformer", revision=first),
    "decoder": load(LDLMLatentDecoder, "latent_decoder", revision=first),
    "offline": load(LDLMLatentDecoder, "latent_decoder", revision=first, local_files_only=True),
    "hostile": load(LDLMTransformer1DModel, "transformer"),
    "missing": load(LDLMTransformer1DModel, "no_such_folder"),
}))
"""


@pytest.mark.slow
def test_components_from_the_hub(honest: Path, copied: Path, tmp_path: Path, loopback_hub: LoopbackHub):
    """By Hub id, revision and subfolder, over HTTP: what is downloaded is checked, and is no more than is needed."""
    put_pickle("transformer/diffusion_pytorch_model.bin", True, "transformer/diffusion_pytorch_model.safetensors")(
        copied
    )
    environment = loopback_hub.environment(tmp_path / "home", token="hf_org") | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FROM_THE_HUB, str(honest), str(copied)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["transformer"] == "LDLMTransformer1DModel"
    assert found["decoder"] == found["offline"] == "LDLMLatentDecoder"
    assert "holds no diffusion_pytorch_model.safetensors" in found["hostile"]
    assert "no_such_folder" in found["missing"]
    assert not (copied / CANARY).exists()
    assert loopback_hub.downloaded("org/honest") == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "latent_decoder/config.json",
        "latent_decoder/model.safetensors",
    }


def test_loading_info_and_given_weights(honest: Path):
    _, info = LDLMTransformer1DModel.from_pretrained(honest, subfolder="transformer", output_loading_info=True)
    assert info["missing_keys"] == []
    state = LDLMLatentDecoder.from_pretrained(honest, subfolder="latent_decoder").state_dict()
    config = LDLMLatentDecoderConfig.from_pretrained(honest, subfolder="latent_decoder")
    loaded = LDLMLatentDecoder.from_pretrained(None, config=config, state_dict=state)
    torch.testing.assert_close(loaded.state_dict(), state, rtol=0, atol=0)


def test_weights_of_another_vocabulary_on_request(copied: Path):
    """`ignore_mismatched_sizes` starts the tensors anew that do not fit, as it is meant to."""
    path = copied / "token_decoder" / "model.safetensors"
    state = load_file(path)
    state["head.weight"] = torch.zeros(7, 24)
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"head\.weight of shape \(7, 24\)"):
        LDLMTokenDecoder.from_pretrained(copied, subfolder="token_decoder")
    loaded = LDLMTokenDecoder.from_pretrained(copied, subfolder="token_decoder", ignore_mismatched_sizes=True)
    assert loaded.head.weight.shape == (2048, 24)


def test_attention_implementation_of_the_users_choice(honest: Path, tmp_path: Path):
    chosen = LDLMTokenEncoder.from_pretrained(honest, subfolder="token_encoder", attn_implementation="eager")
    chosen.save_pretrained(tmp_path)
    assert_equal(LDLMTokenEncoder.from_pretrained(tmp_path), chosen)


def test_loading_draws_no_random_numbers(honest: Path):
    before = torch.get_rng_state()
    LDLMPipeline.from_pretrained(honest)
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_model(honest: Path):
    loaded = AutoModel.from_pretrained(honest / "latent_decoder")
    assert type(loaded) is LDLMLatentDecoder
    assert_equal(loaded, LDLMLatentDecoder.from_pretrained(honest, subfolder="latent_decoder"))


# ------------------------------------------------------------------------- parts


def test_settings_of_the_wrong_type_are_named():
    with pytest.raises(ValueError, match=r"tangent_d='3' must be of type float"):
        TangentEulerMaruyamaScheduler(tangent_d="3")
    with pytest.raises(ValueError, match=r"num_layers=True must be of type int"):
        LDLMTransformer1DModel(num_layers=True)
    assert TangentEulerMaruyamaScheduler(tangent_d=3).config.tangent_d == 3

    def constructor(size: int = 1, limit: int | None = None, **kwargs: Any) -> None: ...

    check_settings(constructor, {"size": 2, "limit": None, "kwargs": {"x": "anything"}})
    with pytest.raises(ValueError, match="limit=2.5 must be"):
        check_settings(constructor, {"limit": 2.5})


def test_json_is_bounded(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"x": {"y": 1}}))
    assert read_json(path) == {"x": {"y": 1}}
    with pytest.raises(ValueError, match="at most 5"):
        read_json(path, max_bytes=5)
    with pytest.raises(OSError, match="no such file"):
        read_json(tmp_path)


def test_construction_is_limited_in_its_own_thread_only_and_while_it_lasts():
    def build() -> None:
        nn.Sequential(*[nn.Linear(2, 2) for _ in range(1000)])

    with limited_construction(num_tensors=1, num_elements=1):
        other = threading.Thread(target=build)
        errors: list[BaseException] = []
        previous, threading.excepthook = threading.excepthook, lambda arguments: errors.append(arguments.exc_value)
        other.start()
        other.join()
        threading.excepthook = previous
        assert errors == []
        with pytest.raises(ValueError, match="outgrows its weights, which are 1 tensors of 1 elements"):
            build()
        with pytest.raises(ValueError, match="outgrows"):
            nn.Linear(2**13, 2**13, device="meta")
    build()
