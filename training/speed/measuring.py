"""Times workloads against the floor of their matrix products, and latent diffusion beside its peers."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

from ldlm_hf.evaluation.machine import keep_freed_memory
from speed.matrix_products import MatrixProduct, MatrixProductRecorder, elapsed_seconds, time_product
from speed.workloads import Case, Workload, peer_workloads, sampling_workloads, training_workloads


Result = TypeVar("Result")


@dataclass
class Measurement:
    """One row of the report; times are in seconds.

    Attributes:
        workload: `sampling step`, `decode` or `training step`.
        tokens: tokens of one run, B x L.
        seconds: median time of one run.
        flops: of all matrix products of one run.
        floor_seconds: median time of those products alone.
        ratio: median over the turns of time over floor.
        peak_memory_gib: highest memory of the process, in GiB, before any product was timed alone.
        parameters: number of parameters in memory, trained and frozen.
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
    floor_seconds: float
    ratio: float
    peak_memory_gib: float
    parameters: int
    operators: list[dict[str, Any]]


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory that this process has held: the allocator's on CUDA, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def list_operators(run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The 12 operators that take most of one run, by the time that they spend in themselves."""
    with torch.profiler.profile() as profiler:
        run()
    time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [
        {"operator": event.key, "seconds": getattr(event, time) / 1e6, "calls": event.count}
        for event in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:12]


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
    counts = recorder.counts
    if case.compile:
        workload.compile()
    workload.run()  # nothing is left to be set up or compiled when the clock runs
    peak_memory = peak_memory_gib(device)

    seconds: list[float] = []
    product_seconds: dict[MatrixProduct, list[float]] = {product: [] for product in counts}
    for _ in range(case.repeats):
        seconds.append(elapsed_seconds(workload.run, device))
        for product, times in product_seconds.items():
            times.append(time_product(product, device))
    floors = [
        sum(counts[product] * times[turn] for product, times in product_seconds.items())
        for turn in range(case.repeats)
    ]
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
        floor_seconds=statistics.median(floors),
        ratio=statistics.median(measured / floor for measured, floor in zip(seconds, floors, strict=True)),
        peak_memory_gib=peak_memory,
        parameters=workload.num_parameters,
        operators=list_operators(workload.run, device) if case.profile else [],
    )


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


def measure_peers(case: Case) -> list[SamplerTiming]:
    """Times latent diffusion and its peers in turns; meant to be called in a fresh process."""
    torch.manual_seed(0)
    keep_freed_memory()
    device = torch.device(case.device)
    step, decode = sampling_workloads(case)
    step.name = "latent diffusion"
    samplers = [step, *peer_workloads(case)]
    for sampler in samplers:
        if case.compile:
            sampler.compile()
        sampler.run()  # nothing is left to be set up or compiled when the clock runs
    decode.run()
    once: list[float] = []
    seconds: dict[str, list[float]] = {sampler.name: [] for sampler in samplers}
    for _ in range(case.repeats):
        once.append(elapsed_seconds(decode.run, device))
        for sampler in samplers:
            seconds[sampler.name].append(elapsed_seconds(sampler.run, device) / (sampler.num_steps or 1))
    ours = seconds[step.name]
    return [
        SamplerTiming(
            sampler=sampler.name,
            dtype=case.dtype,
            device=case.device,
            length=case.length,
            batch_size=case.batch_size,
            parameters=sampler.num_parameters,
            step_seconds=statistics.median(seconds[sampler.name]),
            once_seconds=statistics.median(once) if sampler is step else 0.0,
            step_ratio=statistics.median(
                theirs / our for theirs, our in zip(seconds[sampler.name], ours, strict=True)
            ),
            num_steps=sampler.num_steps,
        )
        for sampler in samplers
    ]


def peer_rows(timings: Sequence[SamplerTiming], nfe: Sequence[int]) -> list[dict[str, Any]]:
    """Each timing with its time a sample for each number of steps that it can take."""
    rows = []
    for timing in timings:
        possible = nfe if timing.num_steps is None else [timing.num_steps]
        of_batch = {str(count): count * timing.step_seconds + timing.once_seconds for count in possible}
        a_sample = {count: seconds / timing.batch_size for count, seconds in of_batch.items()}
        rows.append(asdict(timing) | {"seconds_per_sample": a_sample})
    return rows


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


def in_fresh_process(measure: Callable[[Case], Result], case: Case) -> Result:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measure, case).result()
