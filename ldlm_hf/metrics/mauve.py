"""MAUVE: how close the distribution of generated texts is to that of real ones (App. E)."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from ldlm_hf.loading.checks import whole_number
from ldlm_hf.metrics.inputs import TextMetric, check_positive_int, check_references, check_texts
from ldlm_hf.metrics.judge import Judge, as_judge, at_last_token


# mauve-text reads this many tokens of a text.
MAX_TEXT_LENGTH = 1024
# with fewer texts MAUVE has no two clusters to compare
MIN_MAUVE_TEXTS = 20


def mauve(
    predictions: list[str],
    references: list[str],
    judge: str | Judge | tuple[Any, Any] = "gpt2-large",
    batch_size: int = 8,
    max_length: int | None = None,
    reference_features: Any = None,
    prediction_features: Any = None,
    num_buckets: int | str = "auto",
    seed: int = 25,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Closeness of the distributions of generated and real texts, between 0 and 1.

    It is the area under their divergence curve, the texts clustered together in a judge's feature space. The
    computation is mauve-text's; the features are made here, from any judge, as mauve-text makes them: the last hidden
    state at a text's last token. Scores compare only for the same judge, number of texts, references and seed.

    A blank generated text has no feature. It is left out, as in mauve-text, but not silently: it is counted in
    `num_blank_predictions`. A blank reference is an error.

    Args:
        predictions (`list[str]`): generated texts.
        references (`list[str]`): as many real texts.
        judge, batch_size, device, dtype: as in `generative_perplexity`.
        max_length (`int`): tokens of a text that are read. Default: 1024, or the judge's context if that is shorter.
        reference_features (`array`, (n, D)): the references' features from `ldlm_hf.metrics.text_features`, made
            earlier with the same judge and `max_length`, to save making them again for each generated set.
        prediction_features (`array`, (n, D)): likewise those of the predictions, none of which is blank then; what
            `generative_perplexity` gives with `with_features=True` is made in the same pass as the perplexity.
        num_buckets (`int` or `"auto"`): clusters; `"auto"` is a tenth of the number of texts.
        seed (`int`): of mauve-text. Default 25.
        settings: other arguments of mauve-text's `compute_mauve`, such as `mauve_scaling_factor`; its defaults are the
            published ones.

    Returns:
        mauve (`float`): between 0 and 1; higher is closer.
        frontier_integral (`float`): between 0 and 1; lower is closer.
        num_texts, num_blank_predictions (`int`): texts of each of the two sets, blank ones among the generated.
        num_buckets, seed, max_length (`int`), judge (`str`): what the numbers depend on.

    Raises:
        ValueError: an argument is out of range, the judge cannot be loaded, or too few texts are not blank.
    """
    from mauve import compute_mauve  # it imports faiss and scikit-learn, which the other metrics do not need

    check_texts("predictions", predictions)
    check_references(predictions, references)
    written = [text for text in predictions if text.strip()]
    _check_num_buckets(num_buckets, num_texts=len(written), num_blank=len(predictions) - len(written))
    judge = as_judge(judge, device, dtype)
    if prediction_features is None:
        prediction_features = text_features(written, judge, batch_size, max_length, name="predictions")
    if reference_features is None:
        reference_features = text_features(references, judge, batch_size, max_length, name="references")
    prediction_features = _check_features(prediction_features, written, judge, "prediction")
    reference_features = _check_features(reference_features, references, judge, "reference")
    pooled = np.concatenate([prediction_features, reference_features])
    if not np.isfinite(pooled).all():
        raise ValueError(f"The features of the judge {judge.name!r} are not all finite: load it in float32.")
    if not np.ptp(pooled, axis=0).any():
        raise ValueError("All `predictions` and `references` have the same features, so there is nothing to cluster.")

    result = compute_mauve(
        p_features=prediction_features,
        q_features=reference_features,
        num_buckets="auto" if num_buckets == "auto" else int(num_buckets),
        seed=seed,
        **settings,
    )
    return {
        "mauve": float(result.mauve),
        "frontier_integral": float(result.frontier_integral),
        "num_texts": len(predictions),
        "num_blank_predictions": len(predictions) - len(written),
        "num_buckets": result.num_buckets,
        "seed": seed,
        "max_length": _text_length(judge, max_length),
        "judge": judge.name,
    }


@torch.inference_mode()
def text_features(
    texts: list[str],
    judge: str | Judge | tuple[Any, Any],
    batch_size: int = 8,
    max_length: int | None = None,
    name: str = "texts",
) -> np.ndarray:
    """The features of texts that MAUVE clusters: the judge's last hidden state at the last token of each.

    The first `max_length` tokens of a text are read; `None` is 1024, or the judge's context if that is shorter. Errors
    call the texts `name`.

    Returns:
        Features (n, D), float32, in the order of `texts`.

    Raises:
        ValueError: a text is blank, or an argument is out of range.
    """
    batch_size = check_positive_int("batch_size", batch_size)
    judge = as_judge(judge)
    sequences = judge.encode(texts, _text_length(judge, max_length))
    for index, sequence in enumerate(sequences):
        if not sequence:
            raise ValueError(
                f"`{name}[{index}]` is {texts[index]!r}, which has no token and so no feature: leave it out."
            )

    features: list[np.ndarray] = [np.empty(0)] * len(texts)
    for indices, input_ids, attention_mask in judge.batches(sequences, batch_size, f"Features of {name}"):
        # The base model: the judge's logits (B, L, V) are not needed.
        output = judge.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        last_hidden_states = at_last_token(output.last_hidden_state, attention_mask)  # (B, D)
        for index, feature in zip(indices, last_hidden_states.float().cpu().numpy(), strict=True):
            features[index] = feature
    return np.stack(features)


def _check_features(features: Any, texts: list[str], judge: Judge, name: str) -> np.ndarray:
    """The features as an array (n, D), float32; a ValueError if they are not those of n texts by this judge."""
    features = np.asarray(features, dtype=np.float32)
    expected = (len(texts), judge.model.config.get_text_config().hidden_size)
    if features.shape != expected:
        raise ValueError(
            f"`{name}_features` has the shape {features.shape}, but {len(texts)} `{name}s` that are not blank and the "
            f"judge {judge.name!r} need {expected}: make them with `text_features`, from these {name}s and this judge."
        )
    return features


def _text_length(judge: Judge, max_length: int | None) -> int:
    if max_length is None:
        return min(MAX_TEXT_LENGTH, judge.context_length or MAX_TEXT_LENGTH)
    return judge.check_max_length(max_length)


def _check_num_buckets(num_buckets: int | str, num_texts: int, num_blank: int) -> None:
    """Two clusters are the fewest that tell two sets apart, and `"auto"` takes ten texts of each set for a cluster."""
    number = whole_number(num_buckets)
    if num_buckets != "auto" and (number is None or number < 2):
        raise ValueError(f"`num_buckets` is {num_buckets!r}, but it must be an integer of at least 2, or 'auto'.")
    needed = MIN_MAUVE_TEXTS if num_buckets == "auto" else int(num_buckets)
    if num_texts < needed:
        raise ValueError(
            f"MAUVE needs at least {needed} `predictions` for `num_buckets` {num_buckets!r}, and there are "
            f"{num_texts} (and {num_blank} blank ones): generate more texts."
        )


class Mauve(TextMetric, evaluate.Metric):
    """[`mauve`] as a metric of `evaluate`."""

    citation_text = "Pillutla et al., MAUVE: Measuring the Gap Between Neural Text and Human Text, 2021."
    columns = TextMetric.columns | {"references": datasets.Value("string")}
    _compute = staticmethod(mauve)
