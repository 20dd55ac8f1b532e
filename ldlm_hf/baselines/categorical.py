"""Distributions over words, and draws from them by float64 numbers.

A word is the one in whose part of the sums p_1 + ... + p_k one uniform number falls, both in float64: the law of the
papers' Gumbel trick, which takes a number for each of the K words. In float32 that trick's noise lacks its tail, which
acts as a lower temperature (Zheng et al., arXiv 2409.02908). p itself has the logits' digits, float32 at least. Each
text of a batch may have a generator of its own, so that it is the same text in any batch. B batch, L tokens, K words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


Generators: TypeAlias = list[torch.Generator] | list[None]

# sums over 50,257 words are 103 MB for 256 positions, in float64
POSITIONS_AT_ONCE = 256


def row_generators(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> Generators:
    """A generator for each row, which may be the same one for all; ValueError for a list of another length."""
    if not isinstance(generator, list):
        return [generator] * batch_size  # type: ignore[return-value]
    if len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for {batch_size} texts: give one, or each its own."
        )
    return generator


def uniform_like(tensor: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Numbers in [0, 1) of the shape and on the device of a tensor (B, ...), float64; row i by generator i."""
    return torch.stack([uniform(row.shape, one, row.device) for row, one in zip(tensor, generators, strict=True)])


def uniform(
    shape: torch.Size | tuple[int, ...], generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    """Numbers in [0, 1), float64, drawn where the generator lies."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source, dtype=torch.float64).to(device)


def normal(shape: tuple[int, ...], generators: Generators, device: torch.device) -> torch.Tensor:
    """Standard normal noise (B, ...), float32; row i by generator i."""
    noise = torch.empty(shape, device=device)
    for row, one in zip(noise, generators, strict=True):
        row.copy_(torch.randn(shape[1:], generator=one, device=device if one is None else one.device))
    return noise


def random_words_like(token_ids: torch.Tensor, vocab_size: int, generators: Generators) -> torch.Tensor:
    """Ids of words, each as likely, of the shape of token ids (B, L)."""
    return (uniform_like(token_ids, generators) * vocab_size).long()


def sorted_values(values: torch.Tensor) -> torch.Tensor:
    """Values (..., K) in rising order."""
    if values.device.type == "cpu":
        # 25 times as fast as torch's sort of 30,522 words, which sorts their places too
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values


def nucleus(probabilities: torch.Tensor, top_p: float, keep_crossing: bool = True) -> torch.Tensor:
    """The most likely of K words, (..., K), that together have the probability `top_p`, renormalised.

    Args:
        probabilities: summing to 1.
        top_p: in (0, 1].
        keep_crossing: whether the word whose probability crosses `top_p` stays (the usual rule, and Duo's); without,
            only words up to which the sum is at most `top_p` do (ReMDM's). The most likely one stays in both.
    """
    if top_p >= 1:
        return probabilities
    vocab_size = probabilities.shape[-1]
    rising = sorted_values(probabilities)
    sums = rising.flip(-1).cumsum(-1, dtype=torch.float64)
    limit = torch.full_like(sums[..., :1], top_p)
    count = (torch.searchsorted(sums, limit, right=not keep_crossing) + keep_crossing).clamp(1, vocab_size)
    least = rising.gather(-1, vocab_size - count)
    more_likely = vocab_size - torch.searchsorted(rising, least, right=True)
    # of words that are as likely as the last one that stays, the first stay
    is_tied = probabilities == least
    stays = (probabilities > least) | (is_tied & (is_tied.cumsum(-1) <= count - more_likely))
    kept = torch.where(stays, probabilities, 0)
    return kept.div_(kept.sum(-1, keepdim=True))


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature, which must not be 0."""
    return logits if temperature == 1 else logits / temperature


def word_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, keep_crossing: bool = True
) -> torch.Tensor:
    """softmax(logits / temperature) over K words (..., K), cut to its nucleus; one-hot at temperature 0.

    Of the logits' type, float32 at least.
    """
    logits = at_least_float32(logits)
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    return nucleus(tempered(logits, temperature).softmax(-1), top_p, keep_crossing)


def draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """An index (...) from each row of weights (..., K), which need not sum to 1.

    Args:
        uniforms: a number in [0, 1) for each draw, float64, (...).
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    # in (0, the last sum]: the first sum that reaches it is that of a word with a weight
    places = (1 - uniforms)[..., None] * sums[..., -1:]
    return torch.searchsorted(sums, places)[..., 0]


def draw_words(
    logits: torch.Tensor,
    where: torch.Tensor,
    probabilities: Callable[[torch.Tensor], torch.Tensor],
    generators: Generators,
) -> torch.Tensor:
    """Draws words at some positions, by slices of them, and 0 at all others: ids (B, L).

    Args:
        logits: (B, L, K).
        where: bool (B, L), at which positions.
        probabilities: logits (n, K) → what is drawn from, as [`word_probabilities`].
        generators: one for each row.
    """
    flat_logits, uniforms = logits.flatten(0, 1), uniform_like(where, generators).flatten()
    words = torch.zeros_like(uniforms, dtype=torch.long)
    for some in where.flatten().nonzero()[:, 0].split(POSITIONS_AT_ONCE):
        words[some] = draw(probabilities(flat_logits[some]), uniforms[some])
    return words.view(where.shape)


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """The same in float32, if they are of half precision."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def by_slices(
    loss: Callable[..., torch.Tensor], logits: torch.Tensor, *tensors: torch.Tensor, size: int = POSITIONS_AT_ONCE
) -> torch.Tensor:
    """A loss of each position (B, L), computed over `size` positions at a time and again in the backward pass, so that
    no array of all logits in float32 exists.

    Args:
        loss: logits (n, K) of float32 or float64, and the rows of `tensors` → (n,).
        logits: (B, L, K).
        tensors: of shape (B, L) or (B, L, ...).
        size: positions of a slice.
    """
    shape = logits.shape[:2]
    slices = zip(*(tensor.flatten(0, 1).split(size) for tensor in (logits, *tensors)), strict=True)

    def of_slice(some: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return loss(at_least_float32(some), *others)

    if torch.is_grad_enabled() and not logits.is_meta:
        parts = [checkpoint(of_slice, *some, use_reentrant=False, preserve_rng_state=False) for some in slices]
    else:
        parts = [of_slice(*some) for some in slices]
    return torch.cat(parts).view(shape)


def cross_entropy(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """-log p of token ids (B, L) by logits (B, L, K), in nats: (B, L)."""
    return by_slices(lambda some, ids: F.cross_entropy(some, ids, reduction="none"), logits, token_ids)
