"""LIK"""

from __future__ import annotations

import math
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from ..objective import AdaptiveTimestepSampler, LikelihoodBound
from ..objective.likelihood import (
    TimeProposal,
    estimate,
    stratified_uniforms,
    sum_of_squares,
)
from ..pipelines.pipeline_ldlm import LDLMPipeline
from ..training.checkpoints import find_checkpoints
from .markdown import cell, markdown_table


# ours: the decoder's input is then as noisy as in training to within 0.5%
ENCODER_NOISE_SHARE = 0.1
# evenly spaced; the best one is taken
NUM_END_TIMES = 20
# name in the results → what the table calls it
TERMS = {
    "hidden_reconstruction": "hidden-state reconstruction, -log p(h given z~) (Eq. 17)",
    "token_reconstruction": "token reconstruction, -log p(w given z~) (Eq. 18)",
    "diffusion": "diffusion integral, likelihood weighting (Eq. 21, 22)",
    "last_step": "last step of the prior, KL (Eq. 21)",
    "terminal_kl": "terminal KL at t = 1 (Eq. 21)",
    "prior_cross_entropy": "prior cross-entropy: the three above + n/2 log(2 pi e s_enc^2) (Eq. 21)",
    "encoder_entropy": "encoder entropy, n/2 log(2 pi e s_enc^2), subtracted (Eq. 16)",
    "rate": "rate: prior cross-entropy - encoder entropy, bounds KL(q(z given w), p(z)) (Eq. 14)",
    "total": "**joint bound on -log p(w, h)**: reconstructions + rate (Eq. 23)",
    "tokens_only": "**bound on -log p(w)**: token reconstruction + rate",
}


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


def load_pipeline(name: str, tokens_only: bool) -> LDLMPipeline:
    """A pipeline that has what the bound needs; ValueError for one that has not."""
    pipeline = LDLMPipeline.from_pretrained(name)
    if pipeline.missing_encoders:
        raise ValueError(
            f"--pipeline {name!r} lacks {' and '.join(pipeline.missing_encoders)}, which turn held-out text into "
            "latents: name the pipeline as training saved it (RUN/pipeline), with its encoders."
        )
    if pipeline.latent_decoder is None and not tokens_only:
        raise ValueError(
            f"--pipeline {name!r} has no latent_decoder (its token decoder reads latents), so there is no likelihood "
            "of hidden states: use --tokens_only."
        )
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def load_timestep_sampler(path: Path) -> AdaptiveTimestepSampler:
    """The sampler of a run's newest checkpoint, of a checkpoint, or of its file.

    Raises:
        OSError: there is no such file, or it is none of a checkpoint.
        ValueError: the run sampled uniformly.
    """
    file = path
    if path.is_dir() and not (path / "rank_0.pt").is_file():
        checkpoints = find_checkpoints(path)
        if not checkpoints:
            raise OSError(f"--timestep_sampler {str(path)!r} holds no checkpoint; use --proposal log_snr.")
        file = checkpoints[-1] / "rank_0.pt"
    elif path.is_dir():
        file = path / "rank_0.pt"
    if not file.is_file():
        raise OSError(f"--timestep_sampler {str(path)!r}: there is no {file.name}; use --proposal log_snr.")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)["task"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise OSError(f"--timestep_sampler {str(path)!r}: {file.name} is no file of a checkpoint.") from error
    if not state:
        raise ValueError(
            f"--timestep_sampler {str(path)!r} belongs to a run that sampled its times uniformly; use --proposal "
            "uniform or log_snr."
        )
    sampler = AdaptiveTimestepSampler(num_bins=state["num_bins"])
    sampler.load_state_dict(state)
    return sampler


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
    bound: LikelihoodBound,
    sequences: torch.Tensor,
    timesteps: torch.Tensor,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> Calibration:
    """Measures on training sequences (n, L), which are dealt out to the times in turn."""
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


def draw_terms(
    bound: LikelihoodBound,
    sequences: torch.Tensor,
    proposal: TimeProposal,
    num_draws: int,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> dict[str, torch.Tensor]:
    """Each term in nats a token, for K draws of N sequences (N, L): float64 of shape (K, N)."""
    # two streams: times that came from the noise's own random bits would not be independent of it
    generator = torch.Generator(device).manual_seed(seed)
    uniforms = stratified_uniforms(num_draws, len(sequences), torch.Generator().manual_seed(seed + 1))
    timesteps = proposal.quantile(uniforms)
    densities = proposal.density(timesteps)
    columns: list[dict[str, torch.Tensor]] = []
    progress = tqdm(
        total=num_draws * len(sequences),
        desc="likelihood",
        unit="draw",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    for first in range(0, len(sequences), batch_size):
        rows = slice(first, first + batch_size)
        input_ids = sequences[rows].to(device)
        encoded = bound.encode(input_ids)
        draws: list[dict[str, torch.Tensor]] = []
        for some_times, some_densities in zip(timesteps[:, rows], densities[:, rows], strict=True):
            terms = bound.draw(input_ids, *encoded, some_times, some_densities, generator)
            values = {
                "hidden_reconstruction": terms.hidden,
                "token_reconstruction": terms.token,
                "diffusion": terms.diffusion,
                "last_step": terms.last_step,
                "terminal_kl": terms.terminal,
                "prior_cross_entropy": terms.prior,
                "encoder_entropy": torch.full_like(terms.prior, terms.entropy),
                "rate": terms.rate,
                "total": terms.total,
                "tokens_only": terms.tokens_only,
            }
            draws.append({name: value.cpu() for name, value in values.items() if value is not None})
            progress.update(len(input_ids))
        columns.append({name: torch.stack([draw[name] for draw in draws]) for name in draws[0]})
    progress.close()
    return {name: torch.cat([some[name] for some in columns], 1) / sequences.shape[1] for name in columns[0]}


def summarize(draws: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Mean, in nats and bits a token, and errors, in nats a token, of each term's draws (K, N)."""
    summary = {}
    for name, values in draws.items():
        measured = estimate(values)
        summary[name] = {
            "nats_per_token": measured.mean,
            "bits_per_token": measured.mean / math.log(2),
            "monte_carlo_error": measured.monte_carlo_error,
            "standard_error": measured.standard_error,
        }
    return summary


def table(terms: dict[str, dict[str, float]]) -> str:
    """The terms as a Markdown table."""
    columns = ["term", "nats a token", "bits a token", "Monte-Carlo error", "with sampling of sequences"]
    keys = ("nats_per_token", "bits_per_token", "monte_carlo_error", "standard_error")
    rows = [[TERMS[name], *(cell(values[key], None, 4) for key in keys)] for name, values in terms.items()]
    return "\n".join(markdown_table(columns, rows))


def caveats(results: dict[str, Any]) -> str:
    """What the numbers are, and what they can and cannot be compared with."""
    sizes, settings, uniform = results["sizes"], results["settings"], results["uniform_nats_per_token"]
    tokens_only = results["terms"]["tokens_only"]["nats_per_token"]
    verdict = "says less than" if tokens_only > uniform else "is below"
    paragraphs = [
        f"**The bound on -log p(w)** is an upper bound on what the tokens cost under Eq. 11 with the hidden states "
        f"integrated out. It is a number of discrete tokens, never negative, and an upper bound beside other upper "
        f"bounds (MDLM's, for one) on the same text, tokenizer and chunks of {sizes['sequence_length']} tokens "
        f"without context before them. Here it {verdict} guessing each token uniformly, log V = {uniform:.2f} nats. "
        f"It may be loose by any amount: training minimises no likelihood (unweighted diffusion loss, a stop-gradient "
        f"before the token decoder), and the rate pays for {sizes['latent_entries_per_token']:g} latent entries a "
        f"token to a precision of s_enc, whether or not the decoder needs them. A large value is no evidence of poor "
        f"samples; sampling also ends at t_min and decodes without noise.",
        f"**It depends on the noise levels**, s_enc = {settings['encoder_noise']:g} and delta = "
        f"{settings['decoder_noise']:g} here; every choice gives a valid bound, of a model of its own. The corruption "
        f"delta costs reconstruction and saves no rate: at the same noise on the decoder's input, "
        f"--encoder_noise {math.hypot(settings['encoder_noise'], settings['decoder_noise']):.4g} --decoder_noise 0 "
        f"has the smallest rate.",
    ]
    if "total" in results["terms"]:
        paragraphs.insert(
            0,
            f"**The joint bound (Eq. 23)** is on -log p(w, h), h the {sizes['hidden_entries_per_token']:g} "
            f"standardised hidden-state entries of each token. h follows from w, so it carries no information beyond "
            f"it; its density is taken at a point all the same, in units of the standardised h. That is a "
            f"differential quantity: it may be negative, has no floor, moves by "
            f"{sizes['hidden_entries_per_token']:g} log c nats a token if h is measured in units c times smaller, and "
            f"falls as D gets better and s_dec ({settings['hidden_noise']:.4g} here) with it. It is **not** a token "
            f"perplexity, and is comparable with no autoregressive model's, MDLM's or any discrete model's. A fair "
            f"reading: differences between models with the same token encoder, layer, statistics, tokenizer, text and "
            f"sequence length, each with its own noise levels reported.",
        )
    return "\n\n".join(paragraphs)


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings = markdown_table(["setting", "value"], [[key, str(value)] for key, value in results["settings"].items()])
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"# Likelihood bound of {results['pipeline']}\n\n{table(results['terms'])}\n\n"
        "Errors are standard errors in nats a token: of noise and times for these very sequences, and with that of "
        f"having drawn these sequences.\n\n## What the numbers are\n\n{caveats(results)}\n\n"
        "## Settings\n\n" + "\n".join(settings) + "\n\n"
        f"{results['seconds']:.0f} s on {results['hardware']}; {used}.\n"
    )
