"""BENCH"""

from __future__ import annotations

import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ldlm_hf import (
    JointObjective,
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMLatentEncoder,
    LDLMLatentEncoderConfig,
    LDLMPipeline,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTokenEncoder,
    LDLMTokenEncoderConfig,
    LDLMTransformer1DModel,
    TangentEulerMaruyamaScheduler,
)
from ldlm_hf.evaluation.machine import keep_freed_memory
from ldlm_hf.evaluation.markdown import markdown_table
from ldlm_hf.training.components import compile_blocks
from ldlm_hf.training.run_state import build_optimizer
from ldlm_hf.training.settings import OptimizerSettings
from speed.token_level_peers import (
    TokenLevelDenoiser,
    denoising_step,
    generate_autoregressively,
    masked_posterior,
    uniform_posterior,
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORKLOADS = ("sampling", "training", "peers")


@dataclass(frozen=True)
class Geometry:
    """Fields that differ from the components' defaults, which are the paper's geometry.

    Attributes:
        latent: of `LDLMLatentEncoderConfig` and `LDLMLatentDecoderConfig`.
        token_decoder: of `LDLMTokenDecoderConfig`.
        transformer: of `LDLMTransformer1DModel`.
        backbone: of `GPT2Config`, whose defaults are GPT-2 small.
    """

    latent: dict[str, int] = field(default_factory=dict)
    token_decoder: dict[str, int] = field(default_factory=dict)
    transformer: dict[str, int] = field(default_factory=dict)
    backbone: dict[str, int] = field(default_factory=dict)


GEOMETRIES = {
    # the third-to-last hidden state of GPT-2 small leaves block 10, and the two blocks behind it are not run
    "paper": Geometry(backbone={"n_layer": 10}),
    "tiny": Geometry(
        latent={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "latent_size": 32,
            "token_hidden_size": 32,
        },
        token_decoder={
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "token_hidden_size": 32,
        },
        transformer={"in_channels": 32, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16},
        backbone={
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
}


@dataclass(frozen=True)
class Case:
    """What one fresh process measures.

    Attributes:
        workload: `sampling` (its step and the decode), `training`, or `peers` (sampling and the peers').
        geometry: a name in `GEOMETRIES`.
        length: tokens L, and as many latents.
        batch_size: sequences of a step.
        dtype: `float32` or `bfloat16`.
        device: a torch device.
        repeats: turns of workload and products.
        profile: also list the operators that take the time.
        compile: compile the models' blocks first.
    """

    workload: str
    geometry: str
    length: int
    batch_size: int
    dtype: str
    device: str
    repeats: int
    profile: bool
    compile: bool = False


@dataclass
class Measurement:
    """One row of the report; times are in seconds.

    Attributes:
        workload: `sampling step`, `decode` or `training step`.
        tokens: tokens of one run, B x L.
        seconds: median time of one run.
        tokens_per_second: tokens over seconds.
        flops: of all matrix products of one run.
        attention_flops: how many of those are attention's.
        floor_seconds: median time of those products alone.
        attention_floor_seconds: how much of that is attention's.
        ratio: median over the turns of time over floor.
        peak_memory_gib: highest memory of the process, in GiB, before any product was timed alone.
        parameters: number of parameters in memory, trained and frozen.
        products: the distinct products, with how often each is executed and the rate it reached alone.
        operators: with `--profile`, the operators that took most of one run.
    """

    workload: str
    dtype: str
    device: str
    length: int
    batch_size: int
    tokens: int
    seconds: float
    tokens_per_second: float
    flops: float
    attention_flops: float
    floor_seconds: float
    attention_floor_seconds: float
    ratio: float
    peak_memory_gib: float
    parameters: int
    products: list[dict[str, Any]]
    operators: list[dict[str, Any]]


@dataclass
class SamplerTiming:
    """How long a way of sampling takes; times are in seconds and for a whole batch.

    Attributes:
        sampler: latent diffusion, or the peer's name.
        parameters: number of parameters that sampling uses.
        step_seconds: median time of a step, one network evaluation.
        once_seconds: median time of what is done once, whatever the number of steps: the decode.
        step_ratio: median over the turns of the step's time over that of latent diffusion.
        num_steps: the only possible number of steps, one a token; `None` where it can be chosen.
    """

    sampler: str
    dtype: str
    device: str
    length: int
    batch_size: int
    parameters: int
    step_seconds: float
    once_seconds: float
    step_ratio: float
    num_steps: int | None

    def seconds_per_sample(self, num_steps: int) -> float:
        return (num_steps * self.step_seconds + self.once_seconds) / self.batch_size


# 1. Recording the matrix products


@dataclass(frozen=True)
class MatrixProduct:
    """A product of two matrices, or of two batches of them, as it lay in memory.

    Attributes:
        left_shape: (M, K) or (batch, M, K).
        left_stride: strides of the left operand, in elements.
        right_shape: (K, N) or (batch, K, N).
        right_stride: strides of the right operand.
        dtype: element type.
        attention: whether it is one of attention's.
    """

    left_shape: tuple[int, ...]
    left_stride: tuple[int, ...]
    right_shape: tuple[int, ...]
    right_stride: tuple[int, ...]
    dtype: torch.dtype
    attention: bool = False

    @classmethod
    def of(cls, left: torch.Tensor, right: torch.Tensor, attention: bool = False) -> MatrixProduct:
        """The product left @ right; the tensors may be on the meta device."""
        return cls(tuple(left.shape), left.stride(), tuple(right.shape), right.stride(), left.dtype, attention)

    @property
    def flops(self) -> int:
        """Multiplications and additions: 2 batch M K N."""
        return 2 * math.prod(self.left_shape) * self.right_shape[-1]


aten = torch.ops.aten
# operator → positions of its two matrices among the arguments
PRODUCT_OPERATORS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2)}


class MatrixProductRecorder(TorchDispatchMode):
    """Counts, while it is active, each distinct matrix product that torch dispatches, in forward and backward.

    Raises:
        NotImplementedError: an operator with matrix products that it does not know, so that none is forgotten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[MatrixProduct, float] = {}

    def add(self, product: MatrixProduct, count: float = 1.0) -> None:
        if product.flops:
            self.counts[product] = self.counts.get(product, 0.0) + count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func.overloadpacket
        if operator in PRODUCT_OPERATORS:
            left, right = (args[position] for position in PRODUCT_OPERATORS[operator])
            # batched products are those of `attend_by_products` alone
            self.add(MatrixProduct.of(left, right, attention=operator is aten.bmm))
        elif operator.__name__.startswith("_scaled_dot_product"):
            names = [argument.name for argument in func._schema.arguments]
            arguments = dict(zip(names, args, strict=False)) | kwargs
            # above the diagonal a causal product has nothing to compute
            share = 0.5 if arguments.get("is_causal") else 1.0
            products = attention_products(arguments["query"], arguments["key"], arguments["value"])
            for product in products[operator.__name__.endswith("_backward")]:
                self.add(product, share)
        elif operator in flop_registry:
            raise NotImplementedError(f"{operator} computes matrix products that the recorder does not know.")
        return func(*args, **kwargs)


def attention_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[list[MatrixProduct], list[MatrixProduct]]:
    """Products of attention, forward and backward, each a batched product over batch and heads of packed operands.

    Forward S = Q K^T and O = P V; backward dP = dO V^T, dV = P^T dO, dQ = dS K and dK = dS^T Q.
    """
    query, key, value = (
        torch.empty((math.prod(part.shape[:-2]), *part.shape[-2:]), dtype=part.dtype, device="meta")
        for part in (query, key, value)
    )
    scores = torch.empty((*query.shape[:2], key.shape[1]), dtype=query.dtype, device="meta")
    output = torch.empty((*query.shape[:2], value.shape[2]), dtype=query.dtype, device="meta")
    forward = [(query, key.mT), (scores, value)]
    backward = [(output, value.mT), (scores.mT, output), (scores, key), (scores.mT, query)]
    return (
        [MatrixProduct.of(left, right, attention=True) for left, right in forward],
        [MatrixProduct.of(left, right, attention=True) for left, right in backward],
    )


# 2. Timing


def elapsed_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, on CUDA that of the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start_event.record()
    function()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


def random_operand(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Standard normal numbers in the recorded layout, or packed where the recorded operand was an expanded one."""
    if any(step == 0 and size > 1 for size, step in zip(shape, stride, strict=True)):
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()


def time_product(product: MatrixProduct, device: torch.device, at_least_seconds: float = 0.02) -> float:
    """Median time of the plain product alone, its output allocated beforehand, over calls that fill the given time."""
    left = random_operand(product.left_shape, product.left_stride, product.dtype, device)
    right = random_operand(product.right_shape, product.right_stride, product.dtype, device)
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    output = multiply(left, right)
    times: list[float] = []
    while sum(times) < at_least_seconds:
        times.append(elapsed_seconds(lambda: multiply(left, right, out=output), device))
    return statistics.median(times)


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory that this process has held: the allocator's on CUDA, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def list_operators(run: Callable[[], Any], device: torch.device, count: int = 12) -> list[dict[str, Any]]:
    """The operators that take most of one run, by the time that they spend in themselves."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    on_device = device.type == "cuda"
    rows = [
        {
            "operator": event.key,
            "seconds": (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6,
            "calls": event.count,
        }
        for event in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:count]


# 3. The workloads


@dataclass
class Workload:
    """Something to measure: a name, a call that does it once, and the modules that it needs in memory."""

    name: str
    run: Callable[[], Any]
    modules: list[nn.Module]


def randomize_zero_weights(module: nn.Module) -> None:
    """Gives weights that start at zero (adaLN-zero, the last layer) a spread: a trained model multiplies no zeros."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def build_denoiser(geometry: Geometry, length: int) -> LDLMTransformer1DModel:
    transformer = LDLMTransformer1DModel(sample_size=length, **geometry.transformer)
    randomize_zero_weights(transformer)
    return transformer


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of as many words as the pipeline asks for; nothing that is measured uses it."""
    words = {str(token_id): token_id for token_id in range(vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")))


def sampling_workloads(case: Case) -> Iterator[Workload]:
    """One denoising step, and the decoding at the end, as [`LDLMPipeline`] does them."""
    geometry, dtype, device = GEOMETRIES[case.geometry], DTYPES[case.dtype], torch.device(case.device)
    lengths = {"sequence_length": case.length, "num_latents": case.length}
    token_decoder = LDLMTokenDecoder(LDLMTokenDecoderConfig(**geometry.token_decoder)).to(dtype).eval()
    pipeline = LDLMPipeline(
        transformer=build_denoiser(geometry, case.length).to(dtype).eval(),
        latent_decoder=LDLMLatentDecoder(LDLMLatentDecoderConfig(**lengths, **geometry.latent)).to(dtype).eval(),
        token_decoder=token_decoder,
        tokenizer=build_tokenizer(token_decoder.config.vocab_size),
        scheduler=TangentEulerMaruyamaScheduler(),
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    modules = [pipeline.transformer, pipeline.latent_decoder, pipeline.token_decoder]
    latents = pipeline.prepare_latents(case.batch_size, device, None)

    def step() -> None:
        pipeline(batch_size=case.batch_size, num_inference_steps=1, latents=latents, output_type="latent")

    @torch.no_grad()
    def decode() -> None:
        pipeline.decode_to_sequences(latents)

    yield Workload("sampling step", step, modules)
    yield Workload("decode", decode, modules)


def build_objective(geometry: Geometry, length: int) -> JointObjective:
    """All components at one geometry, with a GPT-2-shaped token encoder of random weights."""
    lengths = {"sequence_length": length, "num_latents": length}
    backbone = GPT2Config(use_cache=False, **geometry.backbone)
    token_encoder = LDLMTokenEncoder(
        LDLMTokenEncoderConfig(
            backbone_config=backbone,
            representation="hidden",
            vocab_size=backbone.vocab_size,
            hidden_size=backbone.hidden_size,
            # statistics of zero mean and unit deviation, which random weights come close to
            num_statistics_tokens=1,
        )
    )
    return JointObjective(
        token_encoder=token_encoder,
        latent_encoder=LDLMLatentEncoder(LDLMLatentEncoderConfig(**lengths, **geometry.latent)),
        latent_decoder=LDLMLatentDecoder(LDLMLatentDecoderConfig(**lengths, **geometry.latent)),
        token_decoder=LDLMTokenDecoder(LDLMTokenDecoderConfig(**geometry.token_decoder)),
        transformer=build_denoiser(geometry, length),
        scheduler=TangentEulerMaruyamaScheduler(),
    )


def training_workloads(case: Case) -> Iterator[Workload]:
    """One joint training step with open gate, as `train_joint.py` does it."""
    device = torch.device(case.device)
    settings = OptimizerSettings()
    objective = build_objective(GEOMETRIES[case.geometry], case.length).to(device).train()
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(objective, settings)
    average = EMAModel(parameters, decay=settings.ema_decay, foreach=True)
    vocab_size = objective.token_encoder.config.vocab_size
    input_ids = torch.randint(vocab_size, (case.batch_size, case.length), device=device)
    timesteps = torch.rand(case.batch_size, device=device)

    def step() -> None:
        # the same self-conditioning coins each time, so that every step executes the same products
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.dtype == "bfloat16"):
            losses = objective(input_ids, timesteps, generator=generator)
        losses.total.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        average.step(parameters)
        optimizer.zero_grad(set_to_none=True)

    yield Workload("training step", step, [objective])


@dataclass
class Peer:
    """A model that samples tokens.

    Attributes:
        name: what the report calls it.
        model: it.
        run: does `steps_of_a_run` steps.
        steps_of_a_run: steps of one call of `run`.
        num_steps: the only possible number of steps; `None` where it can be chosen.
    """

    name: str
    model: nn.Module
    run: Callable[[], Any]
    steps_of_a_run: int = 1
    num_steps: int | None = None


def transformer_config(geometry: Geometry) -> Any:
    """The denoiser's configuration, defaults included."""
    with torch.device("meta"):
        return LDLMTransformer1DModel(**geometry.transformer).config


def gpt2_config(geometry: Geometry, length: int) -> GPT2Config:
    """A GPT-2 as deep and as wide as the denoiser: GPT-2 small at the paper's geometry."""
    backbone = transformer_config(geometry)
    return GPT2Config(
        vocab_size=LDLMTokenDecoderConfig(**geometry.token_decoder).vocab_size,
        n_positions=length,
        n_embd=backbone.num_attention_heads * backbone.attention_head_dim,
        n_layer=backbone.num_layers,
        n_head=backbone.num_attention_heads,
        bos_token_id=0,
        eos_token_id=0,
    )


def build_peers(case: Case) -> list[Peer]:
    """The token-level models at the geometry of the denoiser, and with the token decoder's vocabulary."""
    geometry, dtype, device = GEOMETRIES[case.geometry], DTYPES[case.dtype], torch.device(case.device)
    vocab_size = LDLMTokenDecoderConfig(**geometry.token_decoder).vocab_size
    backbone = transformer_config(geometry)
    width = backbone.num_attention_heads * backbone.attention_head_dim
    peers = []
    words = torch.randint(vocab_size, (case.batch_size, case.length), device=device)
    half_masked = words.masked_fill(torch.rand(words.shape, device=device) < 0.5, vocab_size)
    for name, posterior, token_ids in (
        ("masked diffusion", masked_posterior, half_masked),
        ("uniform diffusion", uniform_posterior, words),
    ):
        denoiser = TokenLevelDenoiser(
            vocab_size=vocab_size,
            hidden_size=width,
            num_layers=backbone.num_layers,
            num_heads=backbone.num_attention_heads,
            intermediate_size=int(width * backbone.mlp_ratio),
            sequence_length=case.length,
        )
        randomize_zero_weights(denoiser)
        denoiser = denoiser.to(device, dtype).eval()
        # a step in the middle, of 128; no step of either method costs more or less than another
        run = partial(denoising_step, denoiser, posterior, token_ids, 0.5, 0.5 - 1 / 128)
        peers.append(Peer(name, denoiser, run))

    language_model = GPT2LMHeadModel(gpt2_config(geometry, case.length)).to(device, dtype).eval()
    run = partial(generate_autoregressively, language_model, case.batch_size, case.length)
    peers.append(Peer("autoregressive, KV cache", language_model, run, case.length, case.length))
    return peers


# 4. Measuring


def measure_case(case: Case) -> list[Measurement]:
    """Measures the workloads of a case; meant to be called in a fresh process, whose peak memory is then theirs."""
    torch.manual_seed(0)
    keep_freed_memory()
    workloads = sampling_workloads(case) if case.workload == "sampling" else training_workloads(case)
    return [measure_workload(workload, case) for workload in workloads]


def measure_workload(workload: Workload, case: Case) -> Measurement:
    """Records the products of a workload, then times it in turns with each of them."""
    device = torch.device(case.device)
    # what an earlier workload has compiled dispatches no products
    with torch.compiler.set_stance("force_eager"), MatrixProductRecorder() as recorder:
        workload.run()
    if case.compile:
        compile_all_blocks(workload.modules)
    workload.run()  # nothing is left to be set up or compiled when the clock runs
    counts = recorder.counts
    peak_memory = peak_memory_gib(device)

    seconds: list[float] = []
    product_seconds: dict[MatrixProduct, list[float]] = {product: [] for product in counts}
    for _ in range(case.repeats):
        seconds.append(elapsed_seconds(workload.run, device))
        for product in counts:
            product_seconds[product].append(time_product(product, device))
    floors = [
        sum(count * product_seconds[product][turn] for product, count in counts.items())
        for turn in range(case.repeats)
    ]
    medians = {product: statistics.median(times) for product, times in product_seconds.items()}
    tokens = case.batch_size * case.length
    return Measurement(
        workload=workload.name,
        dtype=case.dtype,
        device=case.device,
        length=case.length,
        batch_size=case.batch_size,
        tokens=tokens,
        seconds=statistics.median(seconds),
        tokens_per_second=tokens / statistics.median(seconds),
        flops=sum(count * product.flops for product, count in counts.items()),
        attention_flops=sum(count * product.flops for product, count in counts.items() if product.attention),
        floor_seconds=statistics.median(floors),
        attention_floor_seconds=sum(
            count * medians[product] for product, count in counts.items() if product.attention
        ),
        ratio=statistics.median(measured / floor for measured, floor in zip(seconds, floors, strict=True)),
        peak_memory_gib=peak_memory,
        parameters=sum(parameter.numel() for module in workload.modules for parameter in module.parameters()),
        products=[
            {
                "left": list(product.left_shape),
                "right": list(product.right_shape),
                "dtype": str(product.dtype).removeprefix("torch."),
                "attention": product.attention,
                "count": count,
                "gflops_per_second": product.flops / medians[product] / 1e9,
            }
            for product, count in counts.items()
        ],
        operators=list_operators(workload.run, device) if case.profile else [],
    )


def compile_all_blocks(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        for model in module.modules():
            compile_blocks(model)


def measure_peers(case: Case) -> list[SamplerTiming]:
    """Times latent diffusion and its peers in turns; meant to be called in a fresh process."""
    torch.manual_seed(0)
    device = torch.device(case.device)
    keep_freed_memory()
    step, decode = sampling_workloads(case)
    peers = [Peer("latent diffusion", nn.ModuleList(step.modules), step.run), *build_peers(case)]

    if case.compile:
        compile_all_blocks([peer.model for peer in peers])
    # nothing is left to be set up or compiled when the clock runs
    decode.run()
    for peer in peers:
        peer.run()
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    once: list[float] = []
    for _ in range(case.repeats):
        once.append(elapsed_seconds(decode.run, device))
        for peer in peers:
            seconds[peer.name].append(elapsed_seconds(peer.run, device) / peer.steps_of_a_run)
    ours = seconds[peers[0].name]
    return [
        SamplerTiming(
            sampler=peer.name,
            dtype=case.dtype,
            device=case.device,
            length=case.length,
            batch_size=case.batch_size,
            parameters=sum(parameter.numel() for parameter in peer.model.parameters()),
            step_seconds=statistics.median(seconds[peer.name]),
            once_seconds=statistics.median(once) if peer is peers[0] else 0.0,
            step_ratio=statistics.median(theirs / our for theirs, our in zip(seconds[peer.name], ours, strict=True)),
            num_steps=peer.num_steps,
        )
        for peer in peers
    ]


def in_fresh_process(measure: Callable[[Case], Any], case: Case) -> Any:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measure, case).result()


# 5. The report


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": [flag for flag in flags if flag in ("avx512_bf16", "amx_bf16")],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join(markdown_table(header, [[str(cell) for cell in row] for row in rows]))


def workload_table(measurements: Sequence[Measurement]) -> str:
    header = ["workload", "dtype", "L", "batch", "seconds", "tokens/s", "TFLOP", "TFLOP/s"]
    header += ["floor, s", "of it attention, s", "ratio", "peak GiB"]
    rows = [
        [
            item.workload,
            item.dtype,
            item.length,
            item.batch_size,
            f"{item.seconds:.3f}",
            f"{item.tokens_per_second:.0f}",
            f"{item.flops / 1e12:.3f}",
            f"{item.flops / item.seconds / 1e12:.3f}",
            f"{item.floor_seconds:.3f}",
            f"{item.attention_floor_seconds:.3f}",
            f"{item.ratio:.2f}",
            f"{item.peak_memory_gib:.2f}",
        ]
        for item in measurements
    ]
    return table_text(header, rows)


def whole_sampling(measurements: Sequence[Measurement], num_steps: int) -> list[dict[str, Any]]:
    """Sampling from noise to tokens, by arithmetic: `num_steps` times the measured step and once the decode."""
    steps = [item for item in measurements if item.workload == "sampling step"]
    decodes = [item for item in measurements if item.workload == "decode"]
    rows = []
    for step, decode in zip(steps, decodes, strict=True):
        seconds = num_steps * step.seconds + decode.seconds
        rows.append(
            {
                "dtype": step.dtype,
                "length": step.length,
                "batch_size": step.batch_size,
                "num_inference_steps": num_steps,
                "seconds": seconds,
                "tokens_per_second": step.tokens / seconds,
                # each ratio was measured in its own turns, so the floors follow from them
                "ratio": seconds / (num_steps * step.seconds / step.ratio + decode.seconds / decode.ratio),
            }
        )
    return rows


def whole_sampling_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["dtype", "L", "batch", "steps", "seconds", "tokens/s", "ratio"]
    return table_text(
        header,
        [
            [
                row["dtype"],
                row["length"],
                row["batch_size"],
                row["num_inference_steps"],
                f"{row['seconds']:.1f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['ratio']:.2f}",
            ]
            for row in rows
        ],
    )


def peer_rows(timings: Sequence[SamplerTiming], nfe: Sequence[int]) -> list[dict[str, Any]]:
    """Each timing with its time a sample for each number of steps that it can take."""
    rows = []
    for timing in timings:
        possible = nfe if timing.num_steps is None else [timing.num_steps]
        seconds = {str(num_steps): timing.seconds_per_sample(num_steps) for num_steps in possible}
        rows.append(asdict(timing) | {"seconds_per_sample": seconds})
    return rows


def peer_table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds a sample against the number of steps, empty where a sampler cannot take as many."""
    columns = sorted({int(num_steps) for row in rows for num_steps in row["seconds_per_sample"]})
    header = ["sampler", "dtype", "L", "batch", "parameters", "step, s", "of ours", "once, s"]
    return table_text(
        [*header, *(f"NFE {column}" for column in columns)],
        [
            [
                row["sampler"],
                row["dtype"],
                row["length"],
                row["batch_size"],
                f"{row['parameters'] / 1e6:.1f}M",
                f"{row['step_seconds']:.4g}",
                f"{row['step_ratio']:.2f}x",
                f"{row['once_seconds']:.4g}",
                *(
                    f"{row['seconds_per_sample'][str(column)]:.4g}" if str(column) in row["seconds_per_sample"] else ""
                    for column in columns
                ),
            ]
            for row in rows
        ],
    )


def cost_table(measurements: Sequence[Measurement]) -> str:
    """Cost of a step against L: milliseconds a token, and in brackets times the cost at the shortest L."""
    lengths = sorted({item.length for item in measurements})
    cost: dict[tuple[str, str], dict[int, float]] = {}
    for item in measurements:
        cost.setdefault((item.workload, item.dtype), {})[item.length] = 1000 * item.seconds / item.tokens
    rows = [
        [*name, *(f"{by_length[length]:.3f} ({by_length[length] / by_length[lengths[0]]:.2f}x)" for length in lengths)]
        for name, by_length in cost.items()
    ]
    return table_text(["workload", "dtype", *(f"L = {length}" for length in lengths)], rows)


def operator_tables(measurements: Sequence[Measurement]) -> str:
    parts = []
    for item in measurements:
        rows = [[row["operator"], f"{row['seconds']:.3f}", row["calls"]] for row in item.operators]
        title = f"{item.workload}, {item.dtype}, L = {item.length}, batch {item.batch_size}"
        parts.append(f"{title}\n\n" + table_text(["operator", "seconds", "calls"], rows))
    return "\n\n".join(parts)


def print_report(report: dict[str, Any], measurements: Sequence[Measurement], profile: bool) -> None:
    print("## Machine\n")
    print(table_text(["", ""], list(report["machine"].items())))
    if measurements:
        print("\n## Measured against the floor of the matrix products\n")
        print(workload_table(measurements))
    if report["whole_sampling"]:
        print("\n## Whole sampling, by arithmetic: steps x sampling step + decode\n")
        print(whole_sampling_table(report["whole_sampling"]))
    if measurements:
        print("\n## Cost against L: milliseconds a token (times that at the shortest L)\n")
        print(cost_table(measurements))
    if report["peers"]:
        print("\n## Seconds a sample against the number of steps (NFE): latent diffusion and its token-level peers\n")
        print(peer_table(report["peers"]))
    if profile:
        print("\n## Operators that take the time\n")
        print(operator_tables(measurements))
