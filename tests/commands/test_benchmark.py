"""The benchmark at its tiny geometry, and as a command: what it counts and what it reports, not how fast it is."""

from __future__ import annotations

import contextlib
import copy
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
from transformers import GPT2Config, PreTrainedTokenizerFast

from ldlm_hf import (
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
    TokenDiffusionPipeline,
    TokenDiffusionTransformer,
)
from speed import measuring, samplers, workloads
from speed.matrix_products import MatrixProductRecorder
from speed.report import PEERS, section
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
    assert printed.count("\n## ") + printed.startswith("## ") == 6
    assert f"| cpu | {report['machine']['cpu']} |" in printed
    assert f"| vector_instructions | {torch.backends.cpu.get_cpu_capability()} |" in printed
    for item in report["measurements"]:
        row = f"| {item['workload']} | {item['dtype']} | {item['length']} | {item['batch_size']} |"
        # one among the measured, and one for each operator
        assert printed.count(row) == 1 + len(item["operators"])


METHODS = ["MDLM", "ReMDM", "Duo", "Duo, psi-sampler", "CANDI", "FLM", "FMLM"]
AUTOREGRESSIVE = "autoregressive, KV cache"


def test_peers_are_reported(report: dict[str, Any]) -> None:
    ours, *peers = report["peers"]
    assert ours["sampler"] == "LDLM"
    assert [peer["sampler"] for peer in peers] == [*METHODS, AUTOREGRESSIVE]
    assert ours["once_seconds"] > 0 and ours["step_ratio"] == 1 and ours["twice_ldlm"] is None
    assert all(peer["once_seconds"] == 0 for peer in peers)
    assert [peer["top_p"] for peer in peers] == [1, 0.9, 1, 0.9, 1, None, None, 1]
    for row in report["peers"]:
        assert {"dtype": "bfloat16", "length": 8, "batch_size": 2}.items() <= row.items()
        # of one turn
        for name in ("network", "step"):
            assert row[f"{name}_ratio"] == pytest.approx(row[f"{name}_seconds"] / ours["step_seconds"])
            assert row[f"{name}_seconds"] > 0
        assert list(row["seconds_per_sample"]) == (["8"] if row["sampler"] == AUTOREGRESSIVE else ["4", "128"])
        for num_steps, seconds in row["seconds_per_sample"].items():
            whole_batch = int(num_steps) * row["step_seconds"] + row["once_seconds"]
            assert seconds == pytest.approx(whole_batch / 2)
        # in both tables
        assert report["printed"].count(f"| {row['sampler']} | bfloat16 | 8 | 2 |") == 2
    assert "| NFE 4 | NFE 8 | NFE 128 |" in report["printed"]


@pytest.mark.parametrize(("seconds", "twice"), [(1.9, False), (2.1, True)])
def test_twice_the_time_is_said(seconds: float, twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns, the second of which is three times as slow for all methods: ratios are within a turn."""
    turn = [7.0, 1.0, 1.0, *(1.5, seconds) * 8]
    clock = iter(turn + [3 * value for value in turn])
    monkeypatch.setattr(measuring, "elapsed_seconds", lambda run, device: next(clock))
    ours, *others = measuring.measure_peers(Case("peers", "tiny", 8, 2, "float32", "cpu", repeats=2))
    assert (ours.step_ratio, ours.twice_ldlm, ours.once_seconds) == (1, None, 14)
    for other in others:
        assert other.step_ratio == pytest.approx(seconds) and other.network_ratio == pytest.approx(1.5)
        assert other.twice_ldlm is twice
    twice_in_table = section("", PEERS, [asdict(ours), asdict(others[0])]).splitlines()[-1].split(" | ")[-1]
    assert twice_in_table.strip(" |") == ("yes" if twice else "no")


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_step_is_its_pipelines(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the sample that the pipeline has in the middle of its grid, the same draws lead to the same next one."""
    case = Case("peers", "tiny", 8, 2, "float32", "cpu", repeats=1, num_steps=8)
    sampler = next(one for one in samplers.token_samplers(case) if one.name == name)
    step, seen = sampler.run, []

    def record(pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((timestep, tensors["sample"]))
        torch.manual_seed(index)
        return {}

    pipeline = TokenDiffusionPipeline(step.transformer, copy.deepcopy(step.scheduler), tiny_tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(batch_size=2, num_inference_steps=8, output_type="seq", callback_on_step_end=record)
    step.sample = seen[3][1]
    for _ in range(2):  # as often as one likes
        torch.manual_seed(3)
        torch.testing.assert_close(step(), seen[4][1])
    assert step.timestep == seen[4][0]


def test_samples_have_the_noise_of_the_middle() -> None:
    case = Case("peers", "tiny", 400, 4, "float32", "cpu", repeats=1)
    for sampler in samplers.token_samplers(case):
        sample = sampler.run.sample
        if sampler.run.scheduler.process == "masked":
            assert float((sample == 96).double().mean()) == pytest.approx(0.5, abs=0.06)
        elif sampler.run.scheduler.process == "candi":
            assert float(sample.revealed.double().mean()) == pytest.approx(0.5, abs=0.06)


def test_the_autoregressive_step_reads_one_token_after_half_a_text() -> None:
    case = Case("peers", "tiny", 16, 3, "float32", "cpu", repeats=1)
    sampler = samplers.autoregressive_sampler(case)
    (model,) = sampler.modules
    read = []
    model.transformer.h[0].attn.register_forward_hook(lambda module, inputs, output: read.append(output[0].shape[1]))
    for _ in range(3):
        assert sampler.run().shape == (3, 1)
    with MatrixProductRecorder() as recorder:
        sampler.evaluate()
    keys = {product.left_shape[2] for product in recorder.counts if len(product.left_shape) == 3} - {16}
    assert keys == {9}
    assert read == [1] * 4


def test_the_papers_peers_have_170m_parameters_and_gpt2_smalls_sizes() -> None:
    paper = GEOMETRIES["paper"]
    with torch.device("meta"):
        transformer = TokenDiffusionTransformer(samplers.vocab_size_of(paper), **paper.token_transformer)
        language_model = samplers.build_language_model(paper, 1024)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(169.6e6, rel=1e-3)
    standard = GPT2Config()
    for name in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner"):
        assert getattr(language_model.config, name) == getattr(standard, name)


def test_flows_cap_their_logits_and_only_a_flow_map_is_told_two_times() -> None:
    case = Case("peers", "tiny", 8, 2, "float32", "cpu", repeats=1)
    configs = {one.name: one.modules[0].config for one in samplers.token_samplers(case)}
    assert [name for name, config in configs.items() if config.logit_cap == 30] == ["FLM", "FMLM"]
    assert [name for name, config in configs.items() if config.attention_logit_cap == 50] == ["FLM", "FMLM"]
    assert [name for name, config in configs.items() if config.next_timestep_conditioning] == ["FMLM"]


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
    assert len(timings) == 2 + len(METHODS)
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
