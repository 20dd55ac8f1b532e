"""The matrix products that something executes, and the time that they alone would take: the floor."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class MatrixProduct:
    """A product of two matrices, or of two batches of them, as it lay in memory.

    Attributes:
        left_shape, left_stride: (M, K) or (batch, M, K), and its strides in elements.
        right_shape, right_stride: (K, N) or (batch, K, N), and its strides.
    """

    left_shape: tuple[int, ...]
    left_stride: tuple[int, ...]
    right_shape: tuple[int, ...]
    right_stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, left: torch.Tensor, right: torch.Tensor) -> MatrixProduct:
        """The product left @ right; the tensors may be on the meta device."""
        return cls(tuple(left.shape), left.stride(), tuple(right.shape), right.stride(), left.dtype)

    @property
    def flops(self) -> int:
        """Multiplications and additions: 2 batch M K N."""
        return 2 * math.prod(self.left_shape) * self.right_shape[-1]


aten = torch.ops.aten
# operator → positions of its two matrices among the arguments
PRODUCT_OPERATORS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2)}


class MatrixProductRecorder(TorchDispatchMode):
    """Counts, while it is active, each distinct matrix product that torch dispatches, in forward and backward.

    Attributes:
        counts: of each product; half counts are causal ones, which have nothing to compute above the diagonal.

    Raises:
        NotImplementedError: an operator with matrix products that it does not know, so that none is forgotten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[MatrixProduct, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func.overloadpacket
        products: list[MatrixProduct] = []
        share = 1.0
        if operator in PRODUCT_OPERATORS:
            left, right = (args[position] for position in PRODUCT_OPERATORS[operator])
            products = [MatrixProduct.of(left, right)]
        elif operator.__name__.startswith("_scaled_dot_product"):
            names = [argument.name for argument in func._schema.arguments]
            arguments = dict(zip(names, args, strict=False)) | kwargs
            share = 0.5 if arguments.get("is_causal") else 1.0
            backward = operator.__name__.endswith("_backward")
            products = attention_products(arguments["query"], arguments["key"], arguments["value"], backward)
        elif operator in flop_registry:
            raise NotImplementedError(f"{operator} computes matrix products that the recorder does not know.")
        for product in products:
            if product.flops:
                self.counts[product] = self.counts.get(product, 0.0) + share
        return func(*args, **kwargs)


def attention_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backward: bool
) -> list[MatrixProduct]:
    """Products of attention, forward or backward, each a batched product over batch and heads of packed operands.

    Forward S = Q K^T and O = P V; backward dP = dO V^T, dV = P^T dO, dQ = dS K and dK = dS^T Q.
    """
    query, key, value = (
        torch.empty((math.prod(part.shape[:-2]), *part.shape[-2:]), dtype=part.dtype, device="meta")
        for part in (query, key, value)
    )
    scores = torch.empty((*query.shape[:2], key.shape[1]), dtype=query.dtype, device="meta")
    output = torch.empty((*query.shape[:2], value.shape[2]), dtype=query.dtype, device="meta")
    pairs = [(query, key.mT), (scores, value)]
    if backward:
        pairs = [(output, value.mT), (scores.mT, output), (scores, key), (scores.mT, query)]
    return [MatrixProduct.of(left, right) for left, right in pairs]


def elapsed_seconds(function: Callable[[], object], device: torch.device) -> float:
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
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Standard normal numbers in the recorded layout, or packed where the recorded operand was an expanded one."""
    if any(step == 0 and size > 1 for size, step in zip(shape, stride, strict=True)):
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()


def time_product(product: MatrixProduct, device: torch.device) -> float:
    """Median time of the plain product alone, its output allocated beforehand, over calls that fill 20 ms."""
    left = random_operand(product.left_shape, product.left_stride, product.dtype, device)
    right = random_operand(product.right_shape, product.right_stride, product.dtype, device)
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    output = multiply(left, right)
    times: list[float] = []
    while sum(times) < 0.02:
        times.append(elapsed_seconds(lambda: multiply(left, right, out=output), device))
    return statistics.median(times)
