"""Generative perplexity: how likely a judge finds generated texts (App. E; MDLM's convention)."""

from __future__ import annotations

import math
from typing import Any

import evaluate
import numpy as np
import torch
from torch.nn import functional

from ldlm_hf.metrics.inputs import TextMetric, check_positive_int, check_texts
from ldlm_hf.metrics.judge import Judge, as_judge


# Positions whose logits are held in float32 at a time: 1,024 of GPT-2's vocabulary take 206 MB.
POSITIONS_PER_SLICE = 1024

# The share of texts that COSMOS's convention leaves out at each end.
TRIMMED_SHARE = 0.05


def generative_perplexity(
    predictions: list[str],
    judge: str | Judge | tuple[Any, Any] = "gpt2-large",
    batch_size: int = 8,
    max_length: int | None = None,
    add_bos: bool = False,
    bos_token_id: int | None = None,
    contexts: list[str] | None = None,
    with_features: bool = False,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> dict[str, Any]:
    """Perplexity of generated texts under a pretrained causal language model, the judge.

    Texts are re-tokenised with the judge's tokenizer and cut to its context.

    Two conventions are reported, which must not be compared with each other:

    * `perplexity` is MDLM's and the paper's: exp(sum NLL / sum tokens) over the corpus. No BOS is added and the first
      token of a text is not scored.
    * `trimmed_mean_perplexity` is COSMOS's: the mean over texts of their own perplexities, 5% of the texts left out at
      each end. Of n texts floor(0.05 n) go at each end, which is our reading; below 20 texts none do.

    Every token is counted. MDLM's code leaves out every end-of-text token after the first of a text; the paper does
    not say so, and this does not do so: the numbers differ where texts hold several of them written out.

    A text of fewer than two tokens, the added BOS included, has nothing to score. It enters neither number, its entry
    in `perplexities` is `None`, and it is counted in `num_unscored_texts`. Low perplexity alone means little:
    repetitive text has it too. Read it beside the entropy.

    Args:
        predictions (`list[str]`): generated texts.
        judge: the causal language model that scores them: a name for `ldlm_hf.metrics.load_judge`, a `Judge`, or a
            loaded pair `(model, tokenizer)`. Default `"gpt2-large"`.
        batch_size (`int`): texts a forward pass; it does not change the result. Default 8.
        max_length (`int`): tokens a text, added BOS and context included, after which it is cut. Default: the judge's
            context.
        add_bos (`bool`): prepend a BOS token, so that the first token of the text is scored too. Default `False`.
        bos_token_id (`int`): the token to prepend, where the tokenizer names none or another (SmolLM2: 0).
        contexts (`list[str]`): what stands before each text, such as the prompt that it continues. The judge reads it
            and does not score it; a text's first token is then scored, too.
        with_features (`bool`): also return each text's feature for MAUVE, from the same pass. Default `False`.
        device, dtype: where and in which precision to load a judge that is given by name. Default: CUDA or else CPU,
            float32.

    Returns:
        perplexity (`float`): exp(sum of NLL / number of scored tokens) over the whole set.
        trimmed_mean_perplexity (`float`): mean of the texts' own perplexities without 5% of them at each end.
        perplexities (`list`): each text's own perplexity, `None` for a text with nothing to score.
        features (`list`), with `with_features`: arrays (D,), float32, of what is read of each text; `None` as above.
        num_texts, num_unscored_texts, num_tokens (`int`): texts, those with nothing to score, scored tokens.
        judge (`str`), max_length (`int` or `None`), add_bos (`bool`): what the numbers depend on.

    Raises:
        ValueError: an argument is out of range, the judge cannot be loaded, or no text has anything to score.
    """
    check_texts("predictions", predictions)
    batch_size = check_positive_int("batch_size", batch_size)
    if bos_token_id is not None and not add_bos:
        raise ValueError(f"`bos_token_id` is {bos_token_id}, but `add_bos` is False: set it, or leave the id out.")
    judge = as_judge(judge, device, dtype)
    max_length = judge.context_length if max_length is None else judge.check_max_length(max_length)
    if max_length == 1:
        raise ValueError("`max_length` is 1, but the first token is not scored: it must be 2 or more.")
    bos = [_bos_token_id(judge, bos_token_id)] if add_bos else []
    prefixes = [bos] * len(predictions)
    if contexts is not None:
        check_texts("contexts", contexts)
        if len(contexts) != len(predictions):
            raise ValueError(
                f"There are {len(contexts)} `contexts` for {len(predictions)} `predictions`; give one for each."
            )
        prefixes = [bos + context for context in judge.encode(contexts, None)]

    sequences = [
        (prefix + text)[:max_length] for prefix, text in zip(prefixes, judge.encode(predictions, None), strict=True)
    ]
    # without anything before it a text's first token is not scored
    starts = [max(1, len(prefix)) for prefix in prefixes]
    scored = [index for index, sequence in enumerate(sequences) if len(sequence) > starts[index]]
    if not scored:
        raise ValueError(
            f"None of the {len(predictions)} `predictions` has two tokens of the judge {judge.name!r}, so there "
            f"is nothing to score; the first is {predictions[0]!r}. Look at what the generator writes."
        )
    first_scored = [starts[index] for index in scored]
    losses, features = sequence_losses(judge, [sequences[index] for index in scored], batch_size, first_scored)
    num_tokens = [len(sequences[index]) - starts[index] for index in scored]
    perplexities = [math.exp(loss / count) for loss, count in zip(losses, num_tokens, strict=True)]

    def of_each_text(values: list[Any]) -> list[Any]:
        by_index = dict(zip(scored, values, strict=True))
        return [by_index.get(index) for index in range(len(predictions))]

    return {
        "perplexity": math.exp(math.fsum(losses) / sum(num_tokens)),
        "trimmed_mean_perplexity": trimmed_mean(perplexities),
        "perplexities": of_each_text(perplexities),
        **({"features": of_each_text(features)} if with_features else {}),
        "num_texts": len(predictions),
        "num_unscored_texts": len(predictions) - len(scored),
        "num_tokens": sum(num_tokens),
        "judge": judge.name,
        "max_length": max_length,
        "add_bos": add_bos,
    }


@torch.inference_mode()
def sequence_losses(
    judge: Judge, sequences: list[list[int]], batch_size: int, first_scored: list[int] | None = None
) -> tuple[list[float], list[np.ndarray]]:
    """The sum over each sequence of -log p(token | tokens before), from its second token on or from the place that
    `first_scored` says, in nats; and features.

    The sequences are token ids of the judge, at least two each. Features (D,), float32, are the last hidden state at
    each sequence's last token. A loss that is not finite is a ValueError.
    """
    losses = [0.0] * len(sequences)
    features = [np.empty(0)] * len(sequences)
    for indices, input_ids, attention_mask in judge.batches(sequences, batch_size, "Scoring texts"):
        logits, last_hidden_states = judge.read(input_ids, attention_mask)  # (B, L, V), (B, D)
        # one copy from the device for the whole batch
        for index, feature in zip(indices, last_hidden_states.float().cpu().numpy(), strict=True):
            features[index] = feature
        for row, index in enumerate(indices):
            first, length = 1 if first_scored is None else first_scored[index], len(sequences[index])
            losses[index] = _sum_of_losses(logits[row, first - 1 : length - 1], input_ids[row, first:length])
            if not math.isfinite(losses[index]):
                raise ValueError(
                    f"The judge {judge.name!r} gives a loss of {losses[index]} in {logits.dtype}: load it in float32."
                )
    return losses, features


def _sum_of_losses(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Cross-entropy of `targets` (T,) under `logits` (T, V): each loss in float32, their sum in float64."""
    total = 0.0
    slices = zip(logits.split(POSITIONS_PER_SLICE), targets.split(POSITIONS_PER_SLICE), strict=True)
    for logits_slice, targets_slice in slices:
        losses = functional.cross_entropy(logits_slice.float(), targets_slice, reduction="none")  # (T,)
        total += losses.double().sum().item()
    return total


def trimmed_mean(values: list[float]) -> float:
    """The mean of `values` without the floor(0.05 n) smallest and the floor(0.05 n) largest of them."""
    trimmed = int(TRIMMED_SHARE * len(values))
    kept = sorted(values)[trimmed : len(values) - trimmed]
    return math.fsum(kept) / len(kept)


def _bos_token_id(judge: Judge, bos_token_id: int | None) -> int:
    token_id = judge.tokenizer.bos_token_id if bos_token_id is None else bos_token_id
    if token_id is None:
        raise ValueError(
            f"`add_bos` is True, but the tokenizer of the judge {judge.name!r} names no BOS token: "
            "pass `bos_token_id`."
        )
    if not 0 <= token_id < judge.num_embeddings:
        raise ValueError(
            f"`bos_token_id` is {token_id}, but the judge {judge.name!r} has {judge.num_embeddings} tokens."
        )
    return int(token_id)


class GenerativePerplexity(TextMetric, evaluate.Metric):
    """[`generative_perplexity`] as a metric of `evaluate`."""

    citation_text = "Sahoo et al., Simple and Effective Masked Diffusion Language Models, 2024."
    _compute = staticmethod(generative_perplexity)
