"""Times workloads against the floor of their matrix products, and latent diffusion beside its peers."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from ldlm_hf.evaluation.machine import keep_freed_memory
from speed.matrix_products import MatrixProduct, MatrixProductRecorder, elapsed_seconds, time_product
from speed.workloads import Case, Workload, peer_workloads, sampling_workloads, training_workloads


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


def measure_case(case: Case) -> list[dict[str, Any]]:
    """Measures the workloads of a case; meant to be called in a fresh process, whose peak memory is then theirs."""
    torch.manual_seed(0)
    keep_freed_memory()
    workloads = sampling_workloads(case) if case.workload == "sampling" else training_workloads(case)
    return [measure_workload(workload, case) for workload in workloads]


def measure_workload(workload: Workload, case: Case) -> dict[str, Any]:
    """Records the products of a workload, then times it in turns with each of them.

    Returns:
        A row of the report. Times are medians in seconds, FLOPs and `tokens` (B x L) those of one run; `floor_seconds`
        is the time of the products alone, `ratio` that of the workload over it, and `peak_memory_gib` the highest
        memory of the process before any product was timed alone.
    """
    device = torch.device(case.device)
    # what an earlier workload has compiled dispatches no products
    with torch.compiler.set_stance("force_eager"), MatrixProductRecorder() as recorder:
        workload.run()
    counts = recorder.counts
    workload.prepare(case.compile)
    peak_memory = peak_memory_gib(device)

    turns: list[float] = []
    turns_of: dict[MatrixProduct, list[float]] = {product: [] for product in counts}
    for _ in range(case.repeats):
        turns.append(elapsed_seconds(workload.run, device))
        for product, times in turns_of.items():
            times.append(time_product(product, device))
    floors = [
        sum(counts[product] * times[turn] for product, times in turns_of.items()) for turn in range(case.repeats)
    ]
    seconds = statistics.median(turns)
    alone = {product: statistics.median(times) for product, times in turns_of.items()}
    of_attention = [product for product in counts if product.attention]
    tokens = case.batch_size * case.length
    return {
        "workload": workload.name,
        **case.description,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops": sum(count * product.flops for product, count in counts.items()),
        "attention_flops": sum(counts[product] * product.flops for product in of_attention),
        "floor_seconds": statistics.median(floors),
        "attention_floor_seconds": sum(counts[product] * alone[product] for product in of_attention),
        "ratio": statistics.median(turn / floor for turn, floor in zip(turns, floors, strict=True)),
        "peak_memory_gib": peak_memory,
        "parameters": workload.num_parameters,
        "products": [
            {
                "left": list(product.left_shape),
                "right": list(product.right_shape),
                "dtype": str(product.dtype).removeprefix("torch."),
                "attention": product.attention,
                "count": count,
                "gflops_per_second": product.flops / alone[product] / 1e9,
            }
            for product, count in counts.items()
        ],
        "operators": list_operators(workload.run, device) if case.profile else [],
    }


def measure_peers(case: Case) -> list[dict[str, Any]]:
    """Times latent diffusion and its peers in turns; meant to be called in a fresh process.

    Returns:
        A row for each sampler. `step_seconds` (one network evaluation) and `once_seconds` (the decode) are medians for
        a whole batch, `step_ratio` is over the step of latent diffusion, and `num_steps` is None where it is free.
    """
    torch.manual_seed(0)
    keep_freed_memory()
    device = torch.device(case.device)
    step, decode = sampling_workloads(case)
    step.name = "latent diffusion"
    samplers = [step, *peer_workloads(case)]
    for sampler in samplers:
        sampler.prepare(case.compile)
    decode.run()
    once: list[float] = []
    turns: dict[str, list[float]] = {sampler.name: [] for sampler in samplers}
    for _ in range(case.repeats):
        once.append(elapsed_seconds(decode.run, device))
        for sampler in samplers:
            turns[sampler.name].append(elapsed_seconds(sampler.run, device) / (sampler.num_steps or 1))
    rows = []
    for sampler in samplers:
        times = turns[sampler.name]
        step_seconds = statistics.median(times)
        once_seconds = statistics.median(once) if sampler is step else 0.0
        possible = case.nfe if sampler.num_steps is None else [sampler.num_steps]
        rows.append(
            {
                "sampler": sampler.name,
                **case.description,
                "parameters": sampler.num_parameters,
                "step_seconds": step_seconds,
                "once_seconds": once_seconds,
                "step_ratio": statistics.median(its / our for its, our in zip(times, turns[step.name], strict=True)),
                "num_steps": sampler.num_steps,
                "seconds_per_sample": {
                    str(count): (count * step_seconds + once_seconds) / case.batch_size for count in possible
                },
            }
        )
    return rows


def whole_sampling(measurements: Sequence[dict[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    """Sampling from noise to tokens, by arithmetic: `num_steps` times the measured step and once the decode."""
    steps = [item for item in measurements if item["workload"] == "sampling step"]
    decodes = [item for item in measurements if item["workload"] == "decode"]
    rows = []
    for step, decode in zip(steps, decodes, strict=True):
        seconds = num_steps * step["seconds"] + decode["seconds"]
        # each ratio was measured in its own turns, so the floors follow from them
        floor = num_steps * step["seconds"] / step["ratio"] + decode["seconds"] / decode["ratio"]
        row = {key: step[key] for key in ("dtype", "length", "batch_size")} | {"num_inference_steps": num_steps}
        rows.append(
            row | {"seconds": seconds, "tokens_per_second": step["tokens"] / seconds, "ratio": seconds / floor}
        )
    return rows


def in_fresh_process(measure: Callable[[Case], list[dict[str, Any]]], case: Case) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measure, case).result()
