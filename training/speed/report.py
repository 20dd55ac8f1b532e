"""The benchmark's report for people: tables of what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldlm_hf.evaluation.machine import device_name
from ldlm_hf.evaluation.markdown import markdown_table


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "device": device_name(device) if device.type == "cuda" else "cpu",
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": [flag for flag in flags if flag in ("avx512_bf16", "amx_bf16")],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """A table of rows, each column → value, of the same columns."""
    return "\n".join(markdown_table(list(rows[0]), [list(map(str, row.values())) for row in rows]))


def case_columns(row: dict[str, Any]) -> dict[str, object]:
    return {"dtype": row["dtype"], "L": row["length"], "batch": row["batch_size"]}


def workload_row(row: dict[str, Any]) -> dict[str, object]:
    return {
        "workload": row["workload"],
        **case_columns(row),
        "seconds": f"{row['seconds']:.3f}",
        "tokens/s": f"{row['tokens_per_second']:.0f}",
        "TFLOP": f"{row['flops'] / 1e12:.3f}",
        "TFLOP/s": f"{row['flops'] / row['seconds'] / 1e12:.3f}",
        "floor, s": f"{row['floor_seconds']:.3f}",
        "of it attention, s": f"{row['attention_floor_seconds']:.3f}",
        "ratio": f"{row['ratio']:.2f}",
        "peak GiB": f"{row['peak_memory_gib']:.2f}",
    }


def whole_sampling_row(row: dict[str, Any]) -> dict[str, object]:
    return {
        **case_columns(row),
        "steps": row["num_inference_steps"],
        "seconds": f"{row['seconds']:.1f}",
        "tokens/s": f"{row['tokens_per_second']:.1f}",
        "ratio": f"{row['ratio']:.2f}",
    }


def peer_row(row: dict[str, Any], counts: Sequence[int]) -> dict[str, object]:
    """Seconds a sample against the numbers of steps, empty where a sampler cannot take as many."""
    seconds = row["seconds_per_sample"]
    return {
        "sampler": row["sampler"],
        **case_columns(row),
        "parameters": f"{row['parameters'] / 1e6:.1f}M",
        "step, s": f"{row['step_seconds']:.4g}",
        "of ours": f"{row['step_ratio']:.2f}x",
        "once, s": f"{row['once_seconds']:.4g}",
        **{f"NFE {count}": f"{seconds[str(count)]:.4g}" if str(count) in seconds else "" for count in counts},
    }


def report_text(report: dict[str, Any]) -> str:
    """All tables that have rows, each under its title."""
    counts = sorted({int(count) for row in report["peers"] for count in row["seconds_per_sample"]})
    tables: dict[str, list[dict[str, object]]] = {
        "Machine": [{"": name, " ": value} for name, value in report["machine"].items()],
        "Measured against the floor of the matrix products": [workload_row(row) for row in report["measurements"]],
        "Whole sampling, by arithmetic: steps x sampling step + decode": [
            whole_sampling_row(row) for row in report["whole_sampling"]
        ],
        "Seconds a sample against the number of steps (NFE): latent diffusion and its token-level peers": [
            peer_row(row, counts) for row in report["peers"]
        ],
        "Operators that take the time": [
            {"workload": row["workload"], **case_columns(row), **used, "seconds": f"{used['seconds']:.3f}"}
            for row in report["measurements"]
            for used in row["operators"]
        ],
    }
    return "\n\n".join(f"## {title}\n\n{table(rows)}" for title, rows in tables.items() if rows)
