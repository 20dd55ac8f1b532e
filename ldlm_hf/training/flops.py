"""FLOPs of a training step, the devices' peak, and the share of it that a run uses (model FLOPs utilisation, MFU).

**Model FLOPs** are the multiplications and additions of the matrix products of one forward and backward pass: those of
linear layers (without their biases) and of attention, QK^T and PV and the four products of their gradients; a causal
product counts half. What a kernel or gradient checkpointing computes a second time does not count, nor do embeddings,
norms, activations, softmax, losses, optimiser and averaged weights: they are few beside the products, and the less
time they take, the higher the utilisation. The self-conditioning pass counts with its probability.

They are counted by torch's `FlopCounterMode` on a copy of the objective on the meta device, which takes a few seconds
and no memory at any size.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils.benchmark
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..evaluation.markdown import human_count
from ..models.token_encoder import LDLMTokenEncoder
from ..objective import DistillationObjective, JointObjective
from ..objective.flow_map import BY_STUDENT, BY_TEACHER
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


@dataclass(frozen=True)
class PartFlops:
    """FLOPs of one part of an objective in one forward and backward pass over a batch.

    Attributes:
        name: the component's.
        forward: of the forward pass.
        backward: of the backward pass.
        recomputed: of the forward pass that gradient checkpointing does a second time.
    """

    name: str
    forward: float
    backward: float
    recomputed: float = 0.0


@dataclass(frozen=True)
class PassFlops:
    """FLOPs of one forward and backward pass of an objective.

    Attributes:
        parts: by component.
        num_tokens: tokens of the pass.
    """

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


def count_flops(objective: nn.Module, batch_size: int, sequence_length: int) -> PassFlops:
    """Counts the FLOPs of one pass of an objective of the training scripts, on a meta copy of it.

    Args:
        objective: before accelerate wraps it; it may be on any device.
        batch_size: sequences of one pass on one device.
        sequence_length: tokens L of each.
    """
    checkpointed = [getattr(module, "gradient_checkpointing", False) for module in objective.modules()]
    once = count_by_part(objective, batch_size, sequence_length, checkpointing=False)
    twice = count_by_part(objective, batch_size, sequence_length, checkpointing=True) if any(checkpointed) else once
    parts = [
        PartFlops(
            name,
            once[name, "forward"],
            once[name, "backward"],
            recomputed=twice[name, "backward"] - once[name, "backward"],
        )
        for name in dict.fromkeys(name for name, _ in once)
    ]
    if is_denoising(objective) and objective.settings.self_conditioning_probability:
        parts.append(self_conditioning_pass(objective, batch_size))
    return PassFlops(tuple(parts), batch_size * sequence_length)


def is_denoising(objective: nn.Module) -> bool:
    """Whether a pass of an objective runs a denoiser."""
    return isinstance(objective, JointObjective) and objective.transformer is not None


def count_by_part(
    objective: nn.Module, batch_size: int, sequence_length: int, checkpointing: bool
) -> Counter[tuple[str, str]]:
    """FLOPs by component and direction (`forward`, `backward`), without the self-conditioning pass."""
    objective = meta_copy(objective)
    if not checkpointing:
        for module in objective.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
    inputs: list[Any] = [torch.empty(batch_size, sequence_length, dtype=torch.long, device="meta")]
    if isinstance(objective, JointObjective):
        objective.settings = replace(objective.settings, self_conditioning_probability=0.0)
        inputs.append(torch.empty(batch_size, device="meta"))
    if isinstance(objective, DistillationObjective):
        # a flow map's examples on the diagonal, and the few that the teacher leads, cost as much or a little less
        target = BY_STUDENT if objective.is_flow_map else BY_TEACHER
        inputs += [torch.empty(batch_size, 3, device="meta"), [target] * batch_size]
    # the objective may draw on the CPU
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ledger = PartLedger(objective, counter)
        losses = objective(*inputs)
        total = losses[0] if isinstance(losses, tuple) else losses.total
        ledger.turn_to(ledger.part, "backward")
        total.backward()
        ledger.turn_to(ledger.part, "backward")
    return +ledger.flops  # without those that are zero


def self_conditioning_pass(objective: JointObjective, batch_size: int) -> PartFlops:
    """Expected FLOPs of the denoiser's extra pass: forward only, on the share of the examples that draws it."""
    denoiser = meta_copy(objective.transformer)
    config = denoiser.config
    noisy_latents = torch.empty(batch_size, config.sample_size, config.in_channels, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser(noisy_latents, torch.empty(batch_size, device="meta"))
    probability = objective.settings.self_conditioning_probability
    return PartFlops("self-conditioning pass", probability * counter.get_total_flops(), 0)


def meta_copy(module: nn.Module) -> Any:
    """A copy whose parameters and buffers have shapes and no values."""
    tensors: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    tensors |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    copied = copy.deepcopy(module, tensors)
    for child in copied.modules():
        if isinstance(child, LDLMTokenEncoder) and hasattr(child, "backbone"):
            child.backbone.set_attn_implementation(COUNTED_ATTENTION)
    return copied


def counted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The language model's attention on the meta device, of (B, H, L, D/H) queries, keys and values.

    transformers builds a mask for the attentions that it knows, and for that looks at values, which meta tensors lack;
    for this one it builds none. A causal product has half as many entries, as if it had half as many keys.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if is_causal:
        half = key.shape[2] // 2
        key, value = key[:, :, :half], value[:, :, :half]
    return sdpa_attention_forward(module, query, key, value, None, is_causal=False, **kwargs)


COUNTED_ATTENTION = "ldlm_counted"
AttentionInterface.register(COUNTED_ATTENTION, counted_attention)


class PartLedger:
    """Assigns FLOPs, as they are counted, to the component that they belong to.

    In the forward pass that is the component whose `forward` runs. In the backward pass it is the one whose output's
    gradient arrived last: autograd works through the graph in the order opposite to the forward pass, so it is through
    with one component before it comes to the next. (The counter's own tables by module do not know where a backward
    pass ends that stops at a detached input.)

    Args:
        objective: its children are the components.
        counter: the active counter.
    """

    def __init__(self, objective: nn.Module, counter: FlopCounterMode):
        self.counter = counter
        self.flops: Counter[tuple[str, str]] = Counter()
        self.part, self.direction, self.counted = "objective", "forward", 0
        for name, component in objective.named_children():
            component.register_forward_pre_hook(lambda module, inputs, name=name: self.turn_to(name, "forward"))
            component.register_forward_hook(lambda module, inputs, output, name=name: self.leave(name, output[0]))

    def turn_to(self, part: str, direction: str) -> None:
        """Books what was counted since the last turn, and says what the next FLOPs belong to."""
        total = self.counter.get_total_flops()
        self.flops[self.part, self.direction] += total - self.counted
        self.part, self.direction, self.counted = part, direction, total

    def leave(self, part: str, output: torch.Tensor) -> None:
        """The end of a component's forward pass, and the start of its backward pass."""
        self.turn_to("objective", "forward")
        if output.requires_grad:
            output.register_hook(lambda gradient: self.turn_to(part, "backward"))


# 2. The peak of a device


@dataclass(frozen=True)
class DevicePeak:
    """FLOP/s that one device can reach at most.

    Attributes:
        flops_per_second: the peak.
        source: where that number comes from, in words.
    """

    flops_per_second: float
    source: str


def device_peak(device: torch.device, mixed_precision: str, peak_tflops: float | None = None) -> DevicePeak:
    """The peak of a device: the one that the settings give, its data sheet's, or else a measured one.

    Args:
        device: the run's.
        mixed_precision: `no` or `bf16`.
        peak_tflops: TFLOP/s that go before data sheet and measurement.

    Raises:
        ValueError: `peak_tflops` is not positive.
    """
    if peak_tflops is not None:
        if not peak_tflops > 0:
            raise ValueError(f"loop.peak_tflops={peak_tflops} must be positive, or null for the device's own peak.")
        return DevicePeak(peak_tflops * 1e12, "loop.peak_tflops")
    precision = matrix_precision(device, mixed_precision)
    known = data_sheet_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return known or measured_peak(device, precision)


def matrix_precision(device: torch.device, mixed_precision: str) -> str:
    """What matrix products are computed in: `bf16`, `tf32` or `fp32`."""
    if mixed_precision == "bf16":
        return "bf16"
    return "tf32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "fp32"


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
    """What a run costs, and how much of its devices it uses.

    Attributes:
        pass_flops: the FLOPs of one pass.
        tokens_per_step: of one optimiser step over all devices.
        max_steps: optimiser steps.
        peak: of one device.
        num_devices: of the run.
    """

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

    def seconds_left(self, step: int, tokens_per_second: float) -> float:
        """Time to the last step, from the number of steps done."""
        return (self.max_steps - step) * self.tokens_per_step / tokens_per_second

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
    objective: nn.Module,
    loop: LoopSettings,
    sequence_length: int,
    device_batch_size: int,
    num_devices: int,
    peak: DevicePeak,
) -> RunEstimate:
    """The estimate of a run.

    Args:
        objective: of one of the training scripts, before accelerate wraps it.
        loop: the run's settings.
        sequence_length: tokens L.
        device_batch_size: sequences of one pass on one device.
        num_devices: of the run.
        peak: of one device, see [`device_peak`].
    """
    return RunEstimate(
        pass_flops=count_flops(objective, device_batch_size, sequence_length),
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


# 4. The command
