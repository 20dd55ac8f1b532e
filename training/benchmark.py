"""Measures sampling and training against the floor that their own matrix products set.

    python training/benchmark.py                                        # the paper's geometry, L = 128 and 1,024
    python training/benchmark.py --lengths 1024 --dtypes bfloat16 --profile
    python training/benchmark.py --workloads peers --peer_lengths 1024 --peer_batch_size 16
    python training/benchmark.py --workloads peers --geometry demo --peer_lengths 32 --dtypes float32
    python training/benchmark.py --geometry tiny --lengths 16 --peer_lengths 16 --peer_batch_size 2 --repeats 1

Weights are random and nothing is downloaded. Three workloads are measured, each as the package runs it:

* `sampling step`: one call of the denoiser and one step of the scheduler, through [`LDLMPipeline`];
* `decode`: clean latents → token ids, which a sampling run does once;
* `training step`: [`JointObjective`] forward and backward, gradient clipping, fused AdamW and the weights' moving
  average; bfloat16 is autocast over float32 weights.

**The floor** is the time that the matrix products alone would take. Every product that a workload executes is recorded
as it is dispatched, with shape, memory layout and type: those of linear layers (without their bias), and for attention
QK^T and PV, in the backward pass the four products that its gradients need (a causal product counts half, and scores
that a fused kernel computes a second time do not count). Each distinct product is then timed alone, its output
allocated beforehand, in the same process and in turns with the workload, so that a machine whose speed drifts or that
others use slows both. `ratio` is the median over the turns of measured time over floor. The process keeps freed memory
for its next tensors, as the training scripts do on the CPU (`ldlm_hf/evaluation/machine.py`).

Peak memory is that of a fresh process that did nothing but this workload: resident set on CPU, allocator on CUDA.

**Peers** are the methods of `ldlm_hf/baselines` with random weights and the sampler settings of their papers: MDLM,
ReMDM, Duo and its psi-sampler, CANDI, FLM, FMLM, and an autoregressive GPT-2 with a KV cache, which takes one step a
token. Of each, a step in the middle of 1,024 (for GPT-2, of the text) and the network's evaluation in it are timed, in
turns with LDLM's step and decode, in one process and at one batch size. `network_ratio` and `step_ratio` are over
LDLM's step, so their difference is the sampler's part; `twice_ldlm` says whether a step takes at least twice LDLM's,
which is a call of the pipeline with one step and pays for all that a longer call does once. The time a sample is
extrapolated, (NFE x step + once) / batch size for each number of network evaluations (NFE); in few steps masked models
and Duo draw more words a step than in the one that is timed. A flow's sample has a number for each word of the
vocabulary: at the paper's geometry 3.3 GB for 16 texts, of which a step needs several.

`--compile` compiles the blocks of this package's models, as `loop.compile` does in training. The floor stays that of
the products as they are dispatched without it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ldlm_hf.loading.settings_reader import positive
from speed.measuring import (
    Measurement,
    SamplerTiming,
    in_fresh_process,
    measure_case,
    measure_peers,
    peer_rows,
    whole_sampling,
)
from speed.report import describe_machine, report_text
from speed.workloads import DTYPES, GEOMETRIES, WORKLOADS, Case


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="paper")
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--lengths", nargs="+", type=positive, default=[128, 1024], help="sequence lengths L")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--sampling_tokens", type=positive, default=1024, help="tokens of a sampling step: batch size x L, or one L")
    add("--training_tokens", type=positive, default=2048, help="tokens of a training step, likewise")
    add("--num_inference_steps", type=positive, default=128, help="for the arithmetic of whole sampling")
    add("--peer_lengths", nargs="+", type=positive, default=[1024], help="sequence lengths L with the peers")
    add("--peer_batch_size", type=positive, default=16, help="samples of a batch with the peers")
    add(
        "--nfe",
        nargs="+",
        type=positive,
        default=[2**power for power in range(11)],
        help="numbers of steps, for the arithmetic of the time a sample with the peers",
    )
    add("--repeats", type=positive, default=3, help="turns of a workload and its products; medians count")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--profile", action="store_true", help="list the operators that take the time")
    add("--compile", action="store_true", help="compile the models' blocks")
    add("--output", type=Path, help="write everything as JSON to this file")
    return parser.parse_args()


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """What is measured, each in a process of its own."""
    for workload in arguments.workloads:
        tokens = arguments.sampling_tokens if workload == "sampling" else arguments.training_tokens
        for dtype in arguments.dtypes:
            for length in arguments.peer_lengths if workload == "peers" else arguments.lengths:
                yield Case(
                    workload=workload,
                    geometry=arguments.geometry,
                    length=length,
                    batch_size=arguments.peer_batch_size if workload == "peers" else max(1, tokens // length),
                    dtype=dtype,
                    device=arguments.device,
                    repeats=arguments.repeats,
                    profile=arguments.profile,
                    compile=arguments.compile,
                )


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(torch.device(arguments.device))
    measurements: list[Measurement] = []
    timings: list[SamplerTiming] = []
    for case in cases(arguments):
        print(f"measuring {case}", file=sys.stderr)
        if case.workload == "peers":
            timings += in_fresh_process(measure_peers, case)
        else:
            measurements += in_fresh_process(measure_case, case)
    report: dict[str, Any] = {
        "geometry": arguments.geometry,
        "compile": arguments.compile,
        "machine": machine,
        "measurements": [asdict(item) for item in measurements],
        "peers": peer_rows(timings, arguments.nfe),
        "whole_sampling": whole_sampling(measurements, arguments.num_inference_steps),
    }
    print(report_text(report))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
