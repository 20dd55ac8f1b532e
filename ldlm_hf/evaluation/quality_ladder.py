"""Where the quality of samples is lost: the same texts, one step further from real text at each rung.

    real text → decoded from its latents → from noisy latents → after one denoising step from t → sampled

What decoding loses is the autoencoder's; the noisy latents say how much the decoders bear; one denoising step is the
denoiser alone, from truly noisy latents; what is left, up to the samples, is the solver's and that of predictions that
rest on earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..metrics.registry import COLUMNS
from ..objective.draws import normal_like
from ..pipelines.pipeline_ldlm import LDLMPipeline
from ..schedulers.tangent import alpha_sigma
from .markdown import cell, markdown_table
from .samples import sample_generator
from .scores import SetScorer


# all ours; noise is in units of the latents' standard deviation, times go from almost clean to almost noise
NOISE_LEVELS = (0.25, 0.5, 1.0)
TIMES = (0.05, 0.1, 0.2, 0.4, 0.6)
NOISE_SEED = 0


@torch.no_grad()
def quality_ladder(
    pipeline: LDLMPipeline, real: torch.Tensor, scorer: SetScorer, batch_size: int
) -> list[dict[str, Any]]:
    """The rungs between real text (n, L) and samples: `title`, `token_accuracy` (share of the real tokens that are
    decoded) and `scores`.

    Args:
        pipeline: with its encoders.
        scorer: of sets of n texts.
        batch_size: texts that are encoded, denoised and decoded at a time.
    """
    batches = torch.arange(len(real)).split(batch_size)
    encoded = [pipeline.encode_sequences(real[indices]) for indices in batches]  # each (B, N, d_z)
    rungs = []
    for title, change in changes(pipeline):
        decoded = []
        for indices, latents in zip(batches, encoded, strict=True):
            generators = [sample_generator(NOISE_SEED, index, latents.device) for index in indices.tolist()]
            changed = change(latents, normal_like(latents, generators))
            decoded.append(pipeline.decode_to_sequences(changed).cpu())
        sequences = torch.cat(decoded)
        accuracy = float((sequences == real).float().mean())
        rungs.append({"title": title, "token_accuracy": accuracy, "scores": scorer.score(sequences).scores.to_json()})
    return rungs


def changes(pipeline: LDLMPipeline) -> Iterator[tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]]:
    """Each rung's title, and what it does to latents (B, N, d_z), given standard normal noise of their shape."""
    yield "decoded", lambda latents, noise: latents
    for level in NOISE_LEVELS:
        yield f"decoded, noise {level:g}", partial(add_noise, level)
    for time in TIMES:
        yield f"one step from t = {time:g}", partial(denoise_once, pipeline, time)


def add_noise(level: float, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents with noise of so many of their standard deviations, each text's own."""
    return latents + level * latents.std((1, 2), keepdim=True) * noise


def denoise_once(pipeline: LDLMPipeline, time: float, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The clean latents as the denoiser predicts them from z_t without a self-condition; a flow map, by its step to
    t = 0."""
    transformer, times = pipeline.transformer, torch.tensor(time, device=latents.device)
    alpha, sigma = (value.float() for value in alpha_sigma(times, pipeline.scheduler.config.tangent_d))
    noisy_latents = (alpha * latents + sigma * noise).to(transformer.dtype)
    is_flow_map = transformer.config.next_timestep_conditioning
    conditions = {"next_timestep": torch.zeros_like(times)} if is_flow_map else {}
    return transformer(noisy_latents, times, torch.zeros_like(noisy_latents), **conditions).sample.float()


def ladder_table(
    real_scores: dict[str, Any], ladder: list[dict[str, Any]], sample_scores: dict[str, Any]
) -> list[str]:
    """The whole ladder as a table of Markdown; scores that were not measured are left out."""
    measured = {name: score for name, score in COLUMNS.items() if real_scores.get(name) is not None}
    ends = [{"title": title, "token_accuracy": None} for title in ("real text", "sampled")]
    rungs = [ends[0] | {"scores": real_scores}, *ladder, ends[1] | {"scores": sample_scores}]
    rows = [
        [rung["title"], f"{rung['scores']['num_texts']:,}", cell(rung["token_accuracy"], None, 3)]
        + [cell(rung["scores"].get(name), None, score.digits) for name, score in measured.items()]
        for rung in rungs
    ]
    return markdown_table(["texts", "number", "tokens kept", *(score.heading for score in measured.values())], rows)
