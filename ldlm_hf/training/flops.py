"""FLOPs of a training step, the devices' peak, and the share of it that a run uses (model FLOPs utilisation, MFU).

**Model FLOPs** are the multiplications and additions of the matrix products of one forward and backward pass: those of
linear layers (without their biases) and of attention, QK^T and PV and the four products of their gradients; a causal
product counts half. What a kernel or gradient checkpointing computes a second time does not count, nor do embeddings,
norms, activations, softmax, losses, optimiser and EMA weights: they are few beside the products, and the less
time they take, the higher the utilisation. The self-conditioning pass counts with its probability.

They are counted while the objective runs on the meta device, which takes a few seconds and no memory at any size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.benchmark
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ..evaluation.markdown import human_count
from .settings import LoopSettings


# the share of its devices' peak that the paper's OpenWebText run reached by our arithmetic, and the one to plan for
PAPER_UTILIZATION = 0.13
PLANNED_UTILIZATION = 0.40

# Dense peaks of one GPU in TFLOP/s, by the words that `torch.cuda.get_device_name()` must hold; the first row that
# fits counts. From NVIDIA's data sheets of these products; where one gives tensor cores "with sparsity", half of that.
PEAK_TFLOPS: dict[tuple[str, ...], dict[str, float]] = {
    ("A10",): {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
    ("A100",): {"bf16": 312, "tf32": 156, "fp32": 19.5},
    ("L4",): {"bf16": 121, "tf32": 60, "fp32": 30.3},
    ("L40S",): {"bf16": 362, "tf32": 183, "fp32": 91.6},
    ("H100", "PCIe"): {"bf16": 756, "tf32": 378, "fp32": 51},
    ("H100", "NVL"): {"bf16": 835, "tf32": 417, "fp32": 60},
    ("H100",): {"bf16": 989, "tf32": 494, "fp32": 67},
    ("H200", "NVL"): {"bf16": 835, "tf32": 417, "fp32": 60},
    ("H200",): {"bf16": 989, "tf32": 494, "fp32": 67},
    ("GH200",): {"bf16": 989, "tf32": 494, "fp32": 67},
}
PRECISION_NAMES = {"bf16": "dense bfloat16", "tf32": "dense TF32", "fp32": "float32"}


# 1. Counting

# of the batch that is counted: examples cost nothing on the meta device, and shares of them come out almost exact
NUM_EXAMPLES = 64

# torch function → which of its arguments are the two factors of its matrix product
FACTORS: dict[Callable, tuple[int, int]] = {
    F.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
}


@dataclass
class PartFlops:
    """FLOPs of one component in a forward and backward pass over a batch.

    Passes of a trained component without gradients are a part of their own; `recomputed` is what gradient
    checkpointing computes a second time.
    """

    name: str
    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one forward and backward pass of an objective over so many tokens."""

    parts: tuple[PartFlops, ...]
    num_tokens: int

    @property
    def per_token(self) -> float:
        """Model FLOPs a token: forward and backward, without anything that is computed twice."""
        return sum(part.forward + part.backward for part in self.parts) / self.num_tokens

    @property
    def recomputed_per_token(self) -> float:
        """What gradient checkpointing adds to them."""
        return sum(part.recomputed for part in self.parts) / self.num_tokens


def count_flops(objective: nn.Module, sequence_length: int) -> PassFlops:
    """Counts the FLOPs of one pass of an objective of the training scripts over examples of `sequence_length` tokens.

    The objective may be on any device, and accelerate has not wrapped it yet. Its `example_inputs(batch_size,
    sequence_length)` are the arguments of its `forward`, which returns losses with a `total`.
    """
    copied = meta_copy(objective)
    counter = ProductCounter(copied)
    with torch.device("meta"):
        inputs = copied.example_inputs(NUM_EXAMPLES, sequence_length)
    # the objective may draw on the CPU
    with torch.random.fork_rng(devices=[]), counter:
        losses = copied(**inputs)
        counter.is_backward = True
        losses.total.backward()
    return PassFlops(tuple(counter.parts.values()), NUM_EXAMPLES * sequence_length)


def meta_copy(module: nn.Module) -> Any:
    """A copy whose parameters and buffers have shapes and no values."""
    tensors: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    tensors |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(module, tensors)


class ProductCounter(TorchFunctionMode):
    """Counts, while it is active, the FLOPs of matrix products by the component whose layers compute them.

    A product's backward pass is known in its forward pass: as many FLOPs again for each factor that needs a gradient.
    Python code calls no product in the backward pass but those that gradient checkpointing computes again.
    """

    def __init__(self, objective: nn.Module):
        super().__init__()
        self.parts: dict[str, PartFlops] = {}
        self.is_backward = False
        self.component, self.is_trained = "objective", False
        for name, component in objective.named_children():
            is_trained = any(parameter.requires_grad for parameter in component.parameters())
            # of every layer, since checkpointing calls blocks by themselves
            for layer in component.modules():
                layer.register_forward_pre_hook(partial(self.enter, name, is_trained))
                if getattr(layer, "gradient_checkpointing", False):
                    layer._gradient_checkpointing_func = self.checkpoint  # type: ignore[assignment]

    def checkpoint(self, *call: Any) -> Any:
        """Calls a block by gradient checkpointing; torch switches the counter off within `backward`, and it is needed
        there when the block is called again."""
        return checkpoint(*call, use_reentrant=False, context_fn=lambda: (nullcontext(), self))

    def enter(self, component: str, is_trained: bool, *called: object) -> None:
        """Says whose products come next."""
        self.component, self.is_trained = component, is_trained

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            # language models ask whether all sequences are whole, neither padded nor packed; meta tensors cannot say
            return True
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.add(attention_flops(*args, **kwargs), 2 * output.requires_grad)
        elif func in FACTORS:
            left, right = (args[place] for place in FACTORS[func])
            gradients = (left.requires_grad + right.requires_grad) if output.requires_grad else 0
            self.add(2 * left.shape[-1] * output.numel(), gradients)
        return output

    def add(self, flops: float, gradients: int) -> None:
        """Adds a product, whose backward pass costs `gradients` times as much."""
        without_gradients = self.is_trained and not torch.is_grad_enabled()
        name = f"{self.component}, no gradients" if without_gradients else self.component
        part = self.parts.setdefault(name, PartFlops(name))
        if self.is_backward:
            part.recomputed += flops
        else:
            part.forward += flops
            part.backward += gradients * flops


def attention_flops(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> float:
    """FLOPs of QK^T and PV, with the arguments of torch's attention; a causal one computes half of them."""
    rows = query.shape[:-1].numel()
    return 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1]) * (0.5 if is_causal else 1)


# 2. The peak of a device


@dataclass(frozen=True)
class DevicePeak:
    """FLOP/s that one device can reach at most, and where that number comes from, in words."""

    flops_per_second: float
    source: str


def device_peak(device: torch.device, mixed_precision: str, peak_tflops: float | None = None) -> DevicePeak:
    """The peak of a device: the one that the settings give (in TFLOP/s), its data sheet's, or else a measured one."""
    if peak_tflops is not None:
        return DevicePeak(peak_tflops * 1e12, "loop.peak_tflops")
    if mixed_precision == "bf16":
        precision = "bf16"
    else:
        is_tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        precision = "tf32" if is_tf32 else "fp32"
    known = data_sheet_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return known or measured_peak(device, precision)


def data_sheet_peak(device_name: str, precision: str) -> DevicePeak | None:
    """The peak of a GPU by its name; None for one that is not in the table, or for a slice of one (MIG)."""
    words = re.findall(r"[A-Za-z0-9]+", device_name)
    if "MIG" in words:
        return None
    for row, peaks in PEAK_TFLOPS.items():
        if all(word in words for word in row):
            return DevicePeak(
                peaks[precision] * 1e12, f"NVIDIA's data sheet of the {' '.join(row)}, {PRECISION_NAMES[precision]}"
            )
    return None


def measured_peak(device: torch.device, precision: str) -> DevicePeak:
    """The best rate of square matrix products of 256, 512, ... 8,192, up to the first that takes 50 ms.

    The shortest of several times counts: other processes can only make a product slower.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # the run's random state is not ours
    rates: dict[int, float] = {}
    for size in (256 * 2**power for power in range(6)):
        matrix = torch.randn(size, size, generator=generator, device=device).to(dtype)
        timer = torch.utils.benchmark.Timer(
            "torch.mm(matrix, matrix, out=output)",
            globals={"torch": torch, "matrix": matrix, "output": torch.empty_like(matrix)},
            num_threads=torch.get_num_threads(),
        )
        seconds = min(timer.blocked_autorange(min_run_time=0.1).times)
        rates[size] = 2 * size**3 / seconds
        if seconds > 50e-3:
            break
    size = max(rates, key=rates.__getitem__)
    return DevicePeak(rates[size], f"measured: a {PRECISION_NAMES[precision]} product of {size:,} x {size:,} matrices")


# 3. A run


@dataclass(frozen=True)
class RunEstimate:
    """What a run costs, and how much of its devices it uses; `tokens_per_step` are those of all devices together."""

    pass_flops: PassFlops
    tokens_per_step: int
    max_steps: int
    peak: DevicePeak
    num_devices: int

    @property
    def peak_of_all(self) -> float:
        """FLOP/s of all devices at their peak."""
        return self.num_devices * self.peak.flops_per_second

    def model_flops_utilization(self, tokens_per_second: float) -> float:
        """The share of the devices' peak that goes into model FLOPs, at a measured rate over all devices."""
        return self.pass_flops.per_token * tokens_per_second / self.peak_of_all

    def seconds_at(self, utilization: float) -> float:
        """Time of all steps at a share of the devices' peak."""
        return self.max_steps * self.tokens_per_step * self.pass_flops.per_token / (utilization * self.peak_of_all)

    def summary(self) -> str:
        """The estimate as it is printed at the start of a run."""
        per_token, recomputed = self.pass_flops.per_token, self.pass_flops.recomputed_per_token
        tokens = self.max_steps * self.tokens_per_step
        lines = [
            f"model FLOPs (matrix products, forward and backward): {human_flops(per_token)} a token, "
            f"{human_flops(per_token * self.tokens_per_step)} a step of {self.tokens_per_step:,} tokens, "
            f"{per_token * tokens:.3g} FLOP in {self.max_steps:,} steps ({human_count(tokens)} tokens)",
            f"peak: {human_flops(self.peak_of_all)}/s, {self.num_devices} x "
            f"{human_flops(self.peak.flops_per_second)}/s ({self.peak.source})",
            f"time to finish: {human_duration(self.seconds_at(PLANNED_UTILIZATION))} at {PLANNED_UTILIZATION:.0%} of "
            f"the peak, {human_duration(self.seconds_at(PAPER_UTILIZATION))} at {PAPER_UTILIZATION:.0%}, the share "
            "that the paper's run on A100s reached by our arithmetic",
        ]
        if recomputed:
            lines.insert(1, f"gradient checkpointing computes {human_flops(recomputed)} a token a second time")
        return "\n".join(lines)


def estimate_run(
    objective: nn.Module, loop: LoopSettings, sequence_length: int, num_devices: int, peak: DevicePeak
) -> RunEstimate:
    """The estimate of a run of an objective that accelerate has not wrapped yet, over `sequence_length` tokens L."""
    return RunEstimate(
        pass_flops=count_flops(objective, sequence_length),
        tokens_per_step=loop.batch_size * sequence_length,
        max_steps=loop.max_steps,
        peak=peak,
        num_devices=num_devices,
    )


def human_flops(number: float) -> str:
    """2.25e9 → '2.25 GFLOP'"""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= size:
            return f"{number / size:.4g} {unit}FLOP"
    return f"{number / 1e6:.3g} MFLOP"


def human_duration(seconds: float) -> str:
    """148000 → '41.1 hours'"""
    for unit, size in (("days", 2 * 86400), ("hours", 2 * 3600), ("minutes", 2 * 60)):
        if seconds >= size:
            return f"{2 * seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
