"""The benchmark at its tiny geometry, and as a command: what it counts and what it reports, not how fast it is."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import runpy
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import GPT2Config

from ldlm_hf import (
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
)
from speed import measuring, workloads
from speed.matrix_products import MatrixProductRecorder
from speed.workloads import GEOMETRIES, Case


REPOSITORY = Path(__file__).parents[2]
LENGTHS = (8, 16)
TOKENS = 32
WIDTH = 32
# the command's tiny geometry, spelled out once more
LATENT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "latent_size": WIDTH,
    "token_hidden_size": WIDTH,
}
TOKEN_DECODER = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "token_hidden_size": WIDTH,
}
BACKBONE = {"vocab_size": 96, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}


@pytest.fixture(scope="module")
def measured() -> Callable[..., dict[str, Any]]:
    """Measures a workload of the tiny geometry in this process, each case once."""

    @functools.cache
    def measure(workload: str, length: int, dtype: str) -> list[dict[str, Any]]:
        case = Case(workload, "tiny", length, TOKENS // length, dtype, "cpu", repeats=1)
        return [asdict(item) for item in measuring.measure_case(case)]

    def find(name: str, length: int, dtype: str = "float32") -> dict[str, Any]:
        items = measure("training" if name == "training step" else "sampling", length, dtype)
        return next(item for item in items if item["workload"] == name)

    return find


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes and prints, measured in this process."""
    output = tmp_path_factory.mktemp("benchmark") / "report.json"
    options = ["--geometry", "tiny", "--workloads", "sampling", "peers", "--lengths", "8", "--dtypes", "bfloat16"]
    options += ["--sampling_tokens", str(TOKENS), "--repeats", "1", "--profile", "--device", "cpu"]
    options += ["--peer_lengths", "8", "--peer_batch_size", "2", "--nfe", "4", "128", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(measuring, "in_fresh_process", lambda measure, case: measure(case))
        patch.setattr(sys, "argv", ["benchmark.py", *options])
        runpy.run_path(str(REPOSITORY / "training" / "benchmark.py"), run_name="__main__")
    return {**json.loads(output.read_text()), "printed": printed.getvalue()}


def matrix_sizes(module: Any) -> dict[str, int]:
    """Sizes of the weights that multiply vectors; positions and learned latents are added, not multiplied."""
    return {
        name: parameter.numel()
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and not name.endswith(("positions", "latents"))
    }


def denoiser_matrices(length: int) -> tuple[int, int]:
    """Sizes of the denoiser's matrices that every latent passes, and of those that only the time passes."""
    sizes = matrix_sizes(
        LDLMTransformer1DModel(
            in_channels=WIDTH, num_layers=2, num_attention_heads=2, attention_head_dim=16, sample_size=length
        )
    )
    of_time = sum(size for name, size in sizes.items() if "modulation" in name or "time_embedder" in name)
    return sum(sizes.values()) - of_time, of_time


def attention_flops(queries: int, keys: int, layers: int) -> int:
    """QK^T and PV of all layers, for one sequence."""
    return layers * 2 * 2 * queries * keys * WIDTH


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_step_flops(measured: Callable[..., dict[str, Any]], length: int, dtype: str) -> None:
    item = measured("sampling step", length, dtype)
    per_latent, of_time = denoiser_matrices(length)
    attention = (TOKENS // length) * attention_flops(length, length, layers=2)
    # one time for the whole batch
    assert item["flops"] == 2 * per_latent * TOKENS + 2 * of_time + attention


@pytest.mark.parametrize("length", LENGTHS)
def test_decode_flops(measured: Callable[..., dict[str, Any]], length: int) -> None:
    item = measured("decode", length)
    latent_decoder = LDLMLatentDecoder(LDLMLatentDecoderConfig(sequence_length=length, num_latents=length, **LATENT))
    matrices = sum(matrix_sizes(latent_decoder).values())
    matrices += sum(matrix_sizes(LDLMTokenDecoder(LDLMTokenDecoderConfig(**TOKEN_DECODER))).values())
    # latents of the perceiver read context and latents
    attention = attention_flops(length, 2 * length, layers=2) + attention_flops(length, length, layers=1)
    assert item["flops"] == 2 * matrices * TOKENS + (TOKENS // length) * attention


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_step_flops(measured: Callable[..., dict[str, Any]], length: int, dtype: str) -> None:
    item = measured("training step", length, dtype)
    batch_size = TOKENS // length
    latent_decoder = LDLMLatentDecoder(LDLMLatentDecoderConfig(sequence_length=length, num_latents=length, **LATENT))
    token_decoder = LDLMTokenDecoder(LDLMTokenDecoderConfig(**TOKEN_DECODER))
    per_latent, of_time = denoiser_matrices(length)

    # the frozen language model runs forward only, its causal attention half: qkv, out and the feed-forward
    backbone = GPT2Config(**BACKBONE)
    read = length + 1  # a token before the text
    frozen = 2 * batch_size * read * backbone.n_layer * 12 * WIDTH**2
    frozen += batch_size * attention_flops(read, read, layers=2) / 2

    # forward, and as much again for the gradients of input and weight; latent encoder and decoder are alike
    trained = 2 * sum(matrix_sizes(latent_decoder).values()) + sum(matrix_sizes(token_decoder).values()) + per_latent
    attention = attention_flops(length, 2 * length, layers=4) + attention_flops(length, length, layers=3)
    forward_and_backward = 3 * (2 * trained * TOKENS + 2 * of_time * batch_size + batch_size * attention)
    # the sinusoids of the time need no gradient
    time_embedder_in = 256 * WIDTH
    forward_and_backward -= 2 * time_embedder_in * batch_size

    # what is left is the pass without gradient, on the examples that drew self-conditioning
    example = 2 * per_latent * length + 2 * of_time + attention_flops(length, length, layers=2)
    examples = (item["flops"] - frozen - forward_and_backward) / example
    assert examples in range(1, batch_size + 1)


@pytest.mark.slow
def test_a_fresh_process_measures_the_same_products(measured: Callable[..., dict[str, Any]]) -> None:
    case = Case("sampling", "tiny", 8, TOKENS // 8, "float32", "cpu", repeats=1)
    step, decode = measuring.in_fresh_process(measuring.measure_case, case)
    assert (step.flops, decode.flops) == tuple(measured(name, 8)["flops"] for name in ("sampling step", "decode"))


def test_every_field_is_reported(measured: Callable[..., dict[str, Any]], report: dict[str, Any]) -> None:
    items = [*report["measurements"], measured("training step", 8, "bfloat16")]
    assert [item["workload"] for item in items] == ["sampling step", "decode", "training step"]
    for item in items:
        expected = {"dtype": "bfloat16", "device": "cpu", "length": 8, "batch_size": TOKENS // 8}
        assert expected.items() <= item.items()
        assert item["tokens"] == TOKENS
        for name in ("seconds", "tokens_per_second", "floor_seconds", "ratio", "peak_memory_gib", "parameters"):
            assert item[name] > 0 and math.isfinite(item[name]), name
    (whole,) = report["whole_sampling"]
    step, decode = report["measurements"]
    assert step["operators"] and decode["operators"]
    assert whole["seconds"] == pytest.approx(whole["num_inference_steps"] * step["seconds"] + decode["seconds"])
    assert {"cpu", "cores", "threads", "torch", "bfloat16_instructions", "load_average"} <= report["machine"].keys()


def test_printed_tables(report: dict[str, Any]) -> None:
    printed = report["printed"]
    assert printed.count("\n## ") + printed.startswith("## ") == 5
    assert f"| cpu | {report['machine']['cpu']} |" in printed
    assert f"| vector_instructions | {torch.backends.cpu.get_cpu_capability()} |" in printed
    for item in report["measurements"]:
        row = f"| {item['workload']} | {item['dtype']} | {item['length']} | {item['batch_size']} |"
        # one among the measured, and one for each operator
        assert printed.count(row) == 1 + len(item["operators"])


def test_peers_are_reported(report: dict[str, Any]) -> None:
    ours, *peers = report["peers"]
    assert ours["sampler"] == "latent diffusion"
    assert [peer["sampler"] for peer in peers] == ["masked diffusion", "uniform diffusion", "autoregressive, KV cache"]
    assert ours["once_seconds"] > 0 and ours["step_ratio"] == 1
    assert all(peer["once_seconds"] == 0 for peer in peers)
    for row in report["peers"]:
        assert {"dtype": "bfloat16", "length": 8, "batch_size": 2}.items() <= row.items()
        assert row["step_seconds"] > 0 and row["step_ratio"] > 0
        autoregressive = row["sampler"].startswith("autoregressive")
        assert row["num_steps"] == (8 if autoregressive else None)
        assert list(row["seconds_per_sample"]) == (["8"] if autoregressive else ["4", "128"])
        for num_steps, seconds in row["seconds_per_sample"].items():
            whole_batch = int(num_steps) * row["step_seconds"] + row["once_seconds"]
            assert seconds == pytest.approx(whole_batch / 2)
        assert f"| {row['sampler']} | bfloat16 | 8 | 2 |" in report["printed"]
    assert "| NFE 4 | NFE 8 | NFE 128 |" in report["printed"]


def test_peers_have_the_denoisers_backbone() -> None:
    """The same blocks, and beside them an embedding and a vocabulary projection."""
    peers = workloads.peer_workloads(Case("peers", "tiny", 8, 2, "float32", "cpu", repeats=1))
    masked, uniform, autoregressive = (model for peer in peers for model in peer.modules)
    denoiser = workloads.build_denoiser(GEOMETRIES["tiny"], 8)
    shapes = {name: value.shape for name, value in denoiser.state_dict().items() if not name.startswith("proj_")}
    for peer in (masked, uniform):
        added = {name: tuple(value.shape) for name, value in peer.state_dict().items() if name not in shapes}
        assert {name: peer.state_dict()[name].shape for name in shapes} == shapes
        assert added == {"embedding.weight": (97, WIDTH), "head.weight": (96, WIDTH)}
        assert all(parameter.any() for parameter in peer.parameters())
    config = autoregressive.config
    assert (config.vocab_size, config.n_embd, config.n_layer, config.n_head) == (96, WIDTH, 2, 2)


def test_the_papers_autoregressive_peer_is_gpt2_small() -> None:
    config = workloads.gpt2_config(GEOMETRIES["paper"], 1024)
    standard = GPT2Config()
    for name in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner"):
        assert getattr(config, name) == getattr(standard, name)


def test_compiled_blocks_count_the_same_products(
    measured: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the default backend needs a C++ compiler and half a minute a block
    compile_with = functools.partial(workloads.compile_blocks, backend="aot_eager")
    monkeypatch.setattr(workloads, "compile_blocks", compile_with)
    torch._dynamo.reset()
    counters.clear()
    case = Case("sampling", "tiny", 8, TOKENS // 8, "float32", "cpu", repeats=1, compile=True)
    step, decode = measuring.measure_case(case)
    # the denoiser's block, the token decoder's, and the latent decoder's, whose first has expanded latents to read
    assert counters["stats"]["unique_graphs"] == 4
    assert step.flops == measured("sampling step", 8)["flops"]
    assert decode.flops == measured("decode", 8)["flops"]
    timings = measuring.measure_peers(case)
    assert len(timings) == 4
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "option", ["--repeats", "--lengths", "--sampling_tokens", "--peer_lengths", "--peer_batch_size", "--nfe"]
)
def test_bad_arguments(option: str, run_script: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_script("benchmark", option, "0")
    assert f"argument {option}: 0" in capsys.readouterr().err


def test_unknown_products_are_not_forgotten() -> None:
    with pytest.raises(NotImplementedError, match="convolution"), MatrixProductRecorder():
        torch.nn.functional.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 2))
