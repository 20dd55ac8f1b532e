"""The random draws of the objectives, from one stream or from one an example.

A list of generators gives each example a stream of its own, so that what it draws does not depend on its batch.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from diffusers.utils.torch_utils import randn_tensor


Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


def normal_like(tensor: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Standard normal noise of the shape, type and device of a tensor (B, ...)."""
    return randn_tensor(tensor.shape, generator, tensor.device, tensor.dtype)


def random_mask(shape: torch.Size, probability: float, generator: Generators, device: torch.device) -> torch.Tensor:
    """True with a probability in (0, 1], each entry by itself.

    Drawn by way of normal noise, since `randn_tensor` knows lists of generators.
    """
    threshold = torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
    return randn_tensor(tuple(shape), generator, device, torch.float32) < float(threshold)


def draw_examples(num_examples: int, probability: float, generator: Generators) -> list[bool]:
    """A [`systematic_sample`] with an offset that is drawn; of a list of generators from the first one."""
    source = generator[0] if isinstance(generator, list) else generator
    offset = torch.rand((), generator=source, device="cpu" if source is None else source.device)
    return systematic_sample(num_examples, probability, float(offset))


def systematic_sample(num_examples: int, probability: float, offset: float) -> list[bool]:
    """Chooses each example with the same probability, and in any run of n of them n times that, to within one.

    A batch that is split over devices and passes then costs the same in each, and its tensors keep their shapes.

    Args:
        num_examples: B.
        probability: of each example.
        offset: uniform in [0, 1); decides which.
    """
    return [
        math.floor((place + 1) * probability + offset) > math.floor(place * probability + offset)
        for place in range(num_examples)
    ]
