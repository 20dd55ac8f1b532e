"""The benchmark's report for people: tables of what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from ldlm_hf.evaluation.machine import cpu_info, device_name
from ldlm_hf.evaluation.markdown import markdown_table


# key of a row, which is the title of its column → format
CASE = {"dtype": "", "length": "", "batch_size": ""}
MEASURED = {
    "workload": "",
    **CASE,
    "seconds": ".3f",
    "tokens_per_second": ".0f",
    "flops": ".3e",
    "floor_seconds": ".3f",
    "ratio": ".2f",
    "peak_memory_gib": ".2f",
}
WHOLE_SAMPLING = {**CASE, "num_inference_steps": "", "seconds": ".1f", "tokens_per_second": ".1f", "ratio": ".2f"}
PEERS = {
    "sampler": "",
    **CASE,
    "top_p": "",
    "parameters": ",",
    "network_seconds": ".4g",
    "step_seconds": ".4g",
    "network_ratio": ".2f",
    "step_ratio": ".2f",
    "twice_ldlm": "",
}
OPERATORS = {"workload": "", **CASE, "operator": "", "seconds": ".3f", "calls": ""}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    flags = (cpu_info("flags") or "").split()
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


def cell(value: Any, spec: str) -> str:
    """A value as it is printed."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, spec)


def section(title: str, formats: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    """A table under its title; a cell is empty where a row has no such key, or None."""
    cells = [["" if row.get(key) is None else cell(row[key], spec) for key, spec in formats.items()] for row in rows]
    return f"## {title}\n\n" + "\n".join(markdown_table(list(formats), cells))


def report_text(report: dict[str, Any]) -> str:
    """All tables that have rows."""
    machine = [{"": name, " ": str(value)} for name, value in report["machine"].items()]
    sections = [section("Machine", {"": "", " ": ""}, machine)]
    measured, whole, peers = report["measurements"], report["whole_sampling"], report["peers"]
    if measured:
        sections.append(section("Measured against the floor of the matrix products", MEASURED, measured))
    if whole:
        title = "Whole sampling, by arithmetic: steps x sampling step + decode"
        sections.append(section(title, WHOLE_SAMPLING, whole))
    if peers:
        sections.append(section("A step of each method, and of its network alone, over LDLM's step", PEERS, peers))
        counts = sorted({int(count) for row in peers for count in row["seconds_per_sample"]})
        rows = [
            row | {f"NFE {count}": seconds for count, seconds in row["seconds_per_sample"].items()} for row in peers
        ]
        title = "Seconds a sample, extrapolated: (NFE x step + once) / batch size"
        columns = {"sampler": "", **CASE, "once_seconds": ".4g"} | {f"NFE {count}": ".4g" for count in counts}
        sections.append(section(title, columns, rows))
    operators = [item | operator for item in measured for operator in item["operators"]]
    if operators:
        sections.append(section("Operators that take the time", OPERATORS, operators))
    return "\n\n".join(sections)
