"""Times workloads against the floor of their matrix products, and LDLM beside other methods."""

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
from speed.samplers import autoregressive_sampler, latent_sampler, token_samplers
from speed.workloads import Case, Workload, sampling_workloads, training_workloads


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
    """How long a way of sampling takes; times are medians in seconds and for a whole batch.

    Attributes:
        sampler: LDLM, or the other method's name.
        top_p: of the most likely words that it draws from; None for methods that know none.
        parameters: number of parameters that a step uses; of LDLM with its decoders.
        network_seconds: time of the network's evaluation in a step.
        step_seconds: time of a step, evaluation and sampler.
        network_ratio, step_ratio: median over the turns of these times over that of LDLM's step.
        twice_ldlm: whether a step takes at least twice LDLM's; None for LDLM.
        once_seconds: time of what is done once, whatever the number of steps: the decode.
        num_steps: the only possible number of steps, one a token; `None` where it can be chosen.
    """

    sampler: str
    dtype: str
    device: str
    length: int
    batch_size: int
    top_p: float | None
    parameters: int
    network_seconds: float
    step_seconds: float
    network_ratio: float
    step_ratio: float
    twice_ldlm: bool | None
    once_seconds: float
    num_steps: int | None


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median over the turns of one time over another."""
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


def measure_peers(case: Case) -> list[SamplerTiming]:
    """Times LDLM and other methods in turns; meant to be called in a fresh process."""
    torch.manual_seed(0)
    keep_freed_memory()
    device = torch.device(case.device)
    ours, decode = latent_sampler(case)
    samplers = [ours, *token_samplers(case), autoregressive_sampler(case)]
    for sampler in samplers:
        if case.compile:
            sampler.compile()
        sampler.run()  # nothing is left to be set up or compiled when the clock runs
    decode.run()
    once: list[float] = []
    networks: dict[str, list[float]] = {sampler.name: [] for sampler in samplers}
    steps: dict[str, list[float]] = {sampler.name: [] for sampler in samplers}
    for _ in range(case.repeats):
        once.append(elapsed_seconds(decode.run, device))
        for sampler in samplers:
            networks[sampler.name].append(elapsed_seconds(sampler.evaluate, device))
            steps[sampler.name].append(elapsed_seconds(sampler.run, device))
    timings = []
    for sampler in samplers:
        step_ratio = median_ratio(steps[sampler.name], steps[ours.name])
        timings.append(
            SamplerTiming(
                sampler=sampler.name,
                dtype=case.dtype,
                device=case.device,
                length=case.length,
                batch_size=case.batch_size,
                top_p=sampler.top_p,
                parameters=sampler.num_parameters,
                network_seconds=statistics.median(networks[sampler.name]),
                step_seconds=statistics.median(steps[sampler.name]),
                network_ratio=median_ratio(networks[sampler.name], steps[ours.name]),
                step_ratio=step_ratio,
                twice_ldlm=None if sampler is ours else step_ratio >= 2,
                once_seconds=statistics.median(once) if sampler is ours else 0.0,
                num_steps=sampler.num_steps,
            )
        )
    return timings


def peer_rows(timings: Sequence[SamplerTiming], nfe: Sequence[int]) -> list[dict[str, Any]]:
    """Each timing with its time a sample for each number of steps that it can take, extrapolated from the one step."""
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
