"""What sampling costs beside its products: reads by the host, memory, new graphs, and the time's modulations."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from tokenizers import Tokenizer, models
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedTokenizerFast

from ldlm_hf import (
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMPipeline,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
    TangentEulerMaruyamaScheduler,
)


STEPS = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(make_pipeline: Callable[..., LDLMPipeline]) -> LDLMPipeline:
    return make_pipeline()


# 1. Reads by the host


class HostReadRefused(TorchDispatchMode):
    """Raises where a tensor's value is read by Python: `.item()`, `float(t)`, `if t`, `t == 0` in a condition."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero):
            raise RuntimeError("the host waits for a value of the device")
        return func(*args, **(kwargs or {}))


def test_no_step_reads_a_value(pipe: LDLMPipeline):
    with HostReadRefused():
        found = pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="seq").sequences
    assert torch.equal(
        found, pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="seq").sequences
    )


def test_a_read_within_the_loop_would_be_seen(pipe: LDLMPipeline):
    with HostReadRefused(), pytest.raises(RuntimeError, match="the host waits"):
        pipe(num_inference_steps=2, callback_on_step_end=lambda _, __, t, ___: float(t) and None)
    scheduler = TangentEulerMaruyamaScheduler()
    scheduler.set_timesteps(2)
    sample = torch.zeros(1, 6, 16)
    # a step whose place on the grid was not set looks its time up
    with HostReadRefused(), pytest.raises(RuntimeError, match="the host waits"):
        scheduler.step(sample, scheduler.timesteps[0], sample)


def test_sampling_runs_where_no_value_can_be_read(pipe: LDLMPipeline):
    """On the meta device, where a copy to the host fails too, which on the CPU would be no copy."""
    for name in ("transformer", "latent_decoder", "token_decoder"):
        getattr(pipe, name).to("meta")
    meta_pipe = LDLMPipeline(**(pipe.components | {"token_encoder": None, "latent_encoder": None}))
    meta_pipe.set_progress_bar_config(disable=True)
    assert meta_pipe(batch_size=2, num_inference_steps=STEPS, output_type="seq").sequences.shape == (2, 8)
    with pytest.raises(NotImplementedError, match="meta"):
        meta_pipe(num_inference_steps=2, callback_on_step_end=lambda _, __, t, ___: t.cpu() and None)


def test_latents_that_a_callback_keeps_stay_as_they_were(pipe: LDLMPipeline):
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        kept.extend((tensor, tensor.clone()) for tensor in tensors.values())

    noise = torch.randn(2, 6, 16)
    start = noise.clone()
    pipe(
        batch_size=2,
        num_inference_steps=STEPS,
        latents=noise,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "clean_latents"],
    )
    assert len(kept) == 2 * STEPS
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)
    assert torch.equal(noise, start)


# 2. Memory


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that were made while it is active and are still there.

    What a kernel needs only within itself is not seen.

    Attributes:
        peak: most bytes that were there at a time.
        largest: bytes of the largest single tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # what an operator changes or looks at was there before
        before = {id(tensor.untyped_storage()) for tensor in tree_iter((args, kwargs)) if torch.is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if torch.is_tensor(tensor) and id(tensor.untyped_storage()) not in before:
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self.free, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)

    def free(self, size: int) -> None:
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Attention's output without its scores, which the fused kernels never hold; on meta there is no such kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def measured_memory() -> Iterator[LiveMemory]:
    memory = LiveMemory()
    with torch.no_grad(), FusedAttention(), memory:
        yield memory


def test_live_memory_is_what_was_made_and_is_still_there():
    with measured_memory() as memory:
        first = torch.zeros(1000)
        second = (first + 1)[:10]
        second.mul_(2)
        assert memory.live == 8000
        del first
        third = second.sum()
    assert (memory.live, memory.peak, memory.largest) == (4004, 8000, 4000)
    assert third.item() == 20
    del second
    assert memory.live == 4


@pytest.fixture(scope="module")
def full_size_pipe() -> LDLMPipeline:
    """The paper's geometry at L = N = 1,024, on the meta device."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(50257)}, unk_token="0"))
    lengths = {"sequence_length": 1024, "num_latents": 1024}
    with torch.device("meta"):
        pipe = LDLMPipeline(
            transformer=LDLMTransformer1DModel(sample_size=1024),
            latent_decoder=LDLMLatentDecoder(LDLMLatentDecoderConfig(**lengths)),
            token_decoder=LDLMTokenDecoder(LDLMTokenDecoderConfig()),
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer),
            scheduler=TangentEulerMaruyamaScheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_decoding_needs_no_more_memory_than_denoising(
    full_size_pipe: LDLMPipeline, batch_size: int, dtype: torch.dtype
):
    """Peak memory within 1.3 times the weights and what one call of the denoiser needs for its latents."""
    modules = [full_size_pipe.transformer, full_size_pipe.latent_decoder, full_size_pipe.token_decoder]
    for module in modules:
        module.to(dtype)
    weights = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    with measured_memory() as denoising:
        latents = torch.zeros(batch_size, 1024, 768, dtype=dtype, device="meta")
        full_size_pipe.transformer(latents, torch.zeros((), device="meta"), latents)

    def stop(pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        pipeline._interrupt = step == 1  # the other steps need what these two do

    with measured_memory() as sampling:
        full_size_pipe(batch_size=batch_size, num_inference_steps=128, output_type="seq", callback_on_step_end=stop)
    assert weights + denoising.peak < weights + sampling.peak < 1.3 * (weights + denoising.peak)
    # nowhere are all logits of even one sequence
    assert sampling.largest < 1024 * 50257 * dtype.itemsize


# 3. The time's modulations


def test_modulations_of_a_grid_are_those_of_each_time(pipe: LDLMPipeline, monkeypatch: pytest.MonkeyPatch):
    transformer = pipe.transformer
    monkeypatch.setattr(transformer, "_times_modulated_at_once", 3)
    latents, self_condition = torch.randn(2, 2, 6, 16)
    timesteps = torch.linspace(1, 0.05, 7)
    embedded: list[int] = []
    handle = transformer.time_embedder.register_forward_pre_hook(lambda _, inputs: embedded.append(len(inputs[0])))
    with torch.no_grad():
        modulations = list(transformer.modulations(timesteps))
        assert embedded == [3, 3, 1]
        handle.remove()
        assert [tuple(modulation.shape) for modulation in modulations] == 7 * [(1, 14, 24)]
        for t, modulation in zip(timesteps, modulations, strict=True):
            expected = transformer(latents, t, self_condition).sample
            found = transformer(latents, t, self_condition, modulation=modulation).sample
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            for_each = transformer(latents, t.expand(2), self_condition).sample
            torch.testing.assert_close(found, for_each, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(modulations[0], modulations[1], atol=1e-3)


def test_the_time_is_embedded_once_a_grid(pipe: LDLMPipeline):
    rows: list[tuple[int, ...]] = []
    pipe.transformer.time_embedder.register_forward_pre_hook(lambda _, inputs: rows.append(tuple(inputs[0].shape)))
    for block in pipe.transformer.blocks:
        block.modulation.register_forward_pre_hook(lambda _, inputs: rows.append(tuple(inputs[0].shape)))
    pipe(batch_size=3, num_inference_steps=STEPS)
    assert rows == [(STEPS, 256), (STEPS, 24), (STEPS, 24)]


def test_a_modulation_of_another_model_is_refused(pipe: LDLMPipeline):
    other = LDLMTransformer1DModel(in_channels=16, num_layers=3, num_attention_heads=2, attention_head_dim=12)
    (modulation,) = other.modulations(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"modulation of shape \(1, 20, 24\).*\(1, 14, 24\)"):
        pipe.transformer(torch.zeros(1, 6, 16), torch.tensor(0.5), modulation=modulation)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_offloaded_blocks_compute_their_modulation_in_their_own_turn(pipe: LDLMPipeline, offload_type: str):
    expected = pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="latent").latents
    settings = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(device, device, offload_type=offload_type, **settings)
    assert list(pipe.transformer.modulations(torch.rand(3))) == [None, None, None]
    found = pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="latent").latents
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_weights_that_lie_on_a_disk_are_read_before_they_are_used(
    pipe: LDLMPipeline, tmp_path: Path, offload_type: str
):
    """What is not read is NaN here, where uninitialised memory is filled."""
    ids = torch.arange(8)[None]
    expected = (
        pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="seq").sequences,
        pipe.encode_sequences(ids),
    )
    device = torch.device("cpu")
    torch.use_deterministic_algorithms(True)
    try:
        for name, model in pipe.components.items():
            if isinstance(model, torch.nn.Module):
                settings = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
                apply_group_offloading(
                    model, device, device, offload_type, offload_to_disk_path=str(tmp_path / name), **settings
                )
        for _ in range(2):
            sequences = pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="seq").sequences
            assert torch.equal(sequences, expected[0])
            torch.testing.assert_close(pipe.encode_sequences(ids), expected[1])
    finally:
        torch.use_deterministic_algorithms(False)


def test_offloaded_models_are_fetched_before_their_methods_run(pipe: LDLMPipeline):
    class Recorder(ModelHook):
        def __init__(self) -> None:
            self.calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple:
            self.calls += 1
            return args, kwargs

    of_transformer, of_decoder = Recorder(), Recorder()
    add_hook_to_module(pipe.transformer, of_transformer)
    add_hook_to_module(pipe.token_decoder, of_decoder)
    next(pipe.transformer.modulations(torch.rand(2)))
    pipe.token_decoder.most_likely_tokens(torch.zeros(1, 8, 32))
    assert (of_transformer.calls, of_decoder.calls) == (1, 1)


# 4. Regional compilation


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_blocks_sample_the_same_and_no_step_brings_a_graph(pipe: LDLMPipeline, backend: str):
    expected = pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="latent").latents
    torch._dynamo.reset()
    counters.clear()
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    graphs: list[int] = []

    def count(*_: Any) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    found = pipe(
        batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="latent", callback_on_step_end=count
    ).latents
    # other times, and another number of them
    pipe(batch_size=2, num_inference_steps=3, callback_on_step_end=count)
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs == (STEPS + 3) * [1]
    assert not counters["recompile_limit"] and not counters["graph_break"]
