"""Measures the likelihood bound of a pipeline on held-out text (App. A.1 of the paper; docs/likelihood.md)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from ..data import TextCorpora
from ..objective import AdaptiveTimestepSampler, LikelihoodBound, LikelihoodSettings
from ..objective.likelihood import best_end_time, sum_of_squares
from ..objective.time_proposals import TimeProposal, build_proposal, stratified_uniforms
from ..pipelines.pipeline_ldlm import LDLMPipeline
from .likelihood_report import TERMS, estimate
from .real_text import held_out_part, held_out_sequences, training_rows
from .samples import load_pipeline_with_encoders


# ours: the decoder's input is then as noisy as in training to within 0.5%
ENCODER_NOISE_SHARE = 0.1
# evenly spaced; the best one is taken
NUM_END_TIMES = 20


# 1. What is measured


@dataclass(frozen=True)
class LikelihoodOptions:
    """The options of `likelihood.py`, by their names there; its `--help` says what each of them is.

    What is None is measured on `num_sequences` training sequences.
    """

    encoder_noise: float
    decoder_noise: float
    hidden_noise: float | None
    end_time: float | None
    latent_noise: float | None
    tokens_only: bool
    self_conditioning: bool
    num_sequences: int
    times_per_sequence: int
    proposal: str
    batch_size: int
    seed: int


def run_of(pipeline: str) -> Path | None:
    """The folder of the run that a pipeline's folder lies in, if it does."""
    folder = Path(pipeline).resolve().parent
    return folder if Path(pipeline).is_dir() and (folder / "settings.yaml").is_file() else None


def trained_decoder_noise(run: Path | None) -> float:
    """delta of a run of joint training, or of a token decoder; ValueError if there is no run that says it."""
    settings = {} if run is None else yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))
    if run is not None and settings.get("stage") == "diffusion":
        raise ValueError(
            f"--decoder_noise is not given, and {run.name} trained a denoiser alone, on latents that it standardised "
            "itself: the decoders have had their noise before, of which its settings say nothing. Give the delta, in "
            "units of the standardised latents."
        )
    for section in (settings.get("objective", {}), settings):
        if "decoder_noise" in section:
            return float(section["decoder_noise"])
    raise ValueError(
        "--decoder_noise is not given, and no settings.yaml of a training run lies beside the pipeline's folder to "
        "read it from: give the delta that the decoders were trained with."
    )


def load_bounded_pipeline(name: str, tokens_only: bool) -> LDLMPipeline:
    """A pipeline that has what the bound needs; ValueError for one that has not, OSError where there is none."""
    pipeline = load_pipeline_with_encoders(name)
    if pipeline.latent_decoder is None and not tokens_only:
        raise ValueError(
            f"--pipeline {name!r} has no latent_decoder (its token decoder reads latents), so there is no likelihood "
            "of hidden states: use --tokens_only."
        )
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


# 2. Measuring


def measure_bound(
    pipeline: LDLMPipeline,
    corpora: TextCorpora,
    text: str,
    options: LikelihoodOptions,
    sampler: AdaptiveTimestepSampler | None = None,
) -> dict[str, Any]:
    """Sets what is None in the options on training text, then draws the terms on held-out text.

    Returns terms and settings (with `text`, a name), as `likelihood.json` has them. Raises ValueError where no text is
    held out, or the adaptive proposal's sampler has learned nothing.
    """
    held_out = held_out_sequences(held_out_part(corpora), options.num_sequences)
    settings = LikelihoodSettings(
        encoder_noise=options.encoder_noise,
        decoder_noise=options.decoder_noise,
        hidden_noise=options.hidden_noise,
        end_time=options.end_time or 0.0,
        self_conditioning=options.self_conditioning,
    )
    components = {name: part for name, part in pipeline.components.items() if name != "tokenizer"}
    bound = LikelihoodBound(**components, settings=settings)
    rows = training_rows(corpora.train, options.num_sequences)
    latent_std = fit_noise_levels(bound, rows["input_ids"], options).latent_std
    d = pipeline.scheduler.config.tangent_d
    proposal = build_proposal(options.proposal, bound.start, d, latent_std, sampler)
    draws = draw_terms(bound, held_out, proposal, options)
    return {
        "terms": {name: estimate(values) for name, values in draws.items()},
        "uniform_nats_per_token": math.log(pipeline.token_decoder.config.vocab_size),
        "settings": {
            **asdict(bound.settings),
            "tangent_d": d,
            "proposal": options.proposal,
            "latent_std": latent_std,
            "text": text,
            "sequence_length": pipeline.latent_encoder.config.sequence_length,
            "num_sequences": len(held_out),
            "times_per_sequence": options.times_per_sequence,
            "seed": options.seed,
        },
    }


@dataclass
class Calibration:
    """What is measured on training text, to set the widths of the model's Gaussians before held-out text is seen.

    Attributes:
        hidden_error: RMS error of the decoded hidden states, the s_dec under which they are most likely (Eq. 17);
            None without a latent decoder.
        latent_errors: mean squared error of the predicted clean latents at each of some times.
        latent_std: standard deviation of the latents' entries, each about its own mean.
    """

    hidden_error: float | None
    latent_errors: torch.Tensor
    latent_std: float


def calibrate(
    bound: LikelihoodBound, sequences: torch.Tensor, timesteps: torch.Tensor, batch_size: int, seed: int
) -> Calibration:
    """Measures on training sequences (n, L), which are dealt out to the times in turn."""
    device = bound.transformer.device
    generator = torch.Generator(device).manual_seed(seed)
    places = torch.arange(len(sequences)) % len(timesteps)
    latent_errors = torch.zeros(len(timesteps), dtype=torch.float64)
    hidden_error, hidden_entries = 0.0, 0
    total, total_of_squares = torch.zeros((), device=device), torch.zeros((), device=device)
    for input_ids, some_places in zip(sequences.split(batch_size), places.split(batch_size), strict=True):
        hidden_states, latents = bound.encode(input_ids.to(device))
        errors = bound.squared_errors(latents, timesteps[some_places], generator)
        latent_errors.index_add_(0, some_places, errors.cpu())
        total = total + latents.double().sum(0)
        total_of_squares = total_of_squares + latents.double().square().sum(0)
        if bound.latent_decoder is not None:
            hidden_error += float(sum_of_squares(bound.decode(latents, generator), hidden_states).sum())
            hidden_entries += hidden_states.numel()
    count = len(sequences)
    return Calibration(
        hidden_error=math.sqrt(hidden_error / hidden_entries) if hidden_entries else None,
        latent_errors=latent_errors / (places.bincount() * total.numel()),
        latent_std=math.sqrt(float((total_of_squares / count - (total / count).square()).mean())),
    )


def fit_noise_levels(bound: LikelihoodBound, sequences: torch.Tensor, options: LikelihoodOptions) -> Calibration:
    """Sets the bound's end time and noise levels that are not given, on training sequences (n, L)."""
    num_candidates = min(NUM_END_TIMES, len(sequences)) if options.end_time is None else 1
    candidates = torch.linspace(bound.start, 1, num_candidates + 1, dtype=torch.float64)[:-1]
    measured = calibrate(bound, sequences, candidates, options.batch_size, options.seed + 2)
    d = bound.scheduler.config.tangent_d
    end_time, latent_noise = best_end_time(candidates, measured.latent_errors, options.encoder_noise, d)
    hidden_noise = options.hidden_noise
    if hidden_noise is None and not options.tokens_only:
        hidden_noise = measured.hidden_error
    bound.settings = replace(
        bound.settings,
        end_time=end_time,
        latent_noise=latent_noise if options.latent_noise is None else options.latent_noise,
        hidden_noise=hidden_noise,
    )
    return measured


def draw_terms(
    bound: LikelihoodBound, sequences: torch.Tensor, proposal: TimeProposal, options: LikelihoodOptions
) -> dict[str, torch.Tensor]:
    """Each term of `TERMS` that there is, in nats a token, for K draws of N sequences (N, L): float64 (K, N)."""
    device = bound.transformer.device
    # two streams: times that came from the noise's own random bits would not be independent of it
    generator = torch.Generator(device).manual_seed(options.seed)
    uniforms = stratified_uniforms(
        options.times_per_sequence, len(sequences), torch.Generator().manual_seed(options.seed + 1)
    )
    timesteps = proposal.quantile(uniforms)
    densities = proposal.density(timesteps)
    batches = []
    for rows in tqdm(torch.arange(len(sequences)).split(options.batch_size), desc="likelihood"):
        input_ids = sequences[rows].to(device)
        encoded = bound.encode(input_ids)
        draws = [
            bound.draw(input_ids, *encoded, some_times, some_densities, generator)
            for some_times, some_densities in zip(timesteps[:, rows], densities[:, rows], strict=True)
        ]
        names = [name for name in TERMS if getattr(draws[0], name) is not None]
        batches.append({name: torch.stack([getattr(terms, name) for terms in draws]).cpu() for name in names})
    return {name: torch.cat([batch[name] for batch in batches], 1) / sequences.shape[1] for name in batches[0]}
