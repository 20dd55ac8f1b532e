"""A likelihood bound for people: means and errors of its terms, a table, and what the numbers can be compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .markdown import cell, markdown_table


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


@dataclass
class Estimate:
    """A mean over sequences, and how far to trust it.

    Attributes:
        mean: of the draws.
        monte_carlo_error: standard error from noise and times, for these very sequences.
        standard_error: standard error with that of having these sequences and no others.
    """

    mean: float
    monte_carlo_error: float
    standard_error: float


def estimate(draws: torch.Tensor) -> Estimate:
    """Mean and errors of draws (K, N): K independent draws of each of N sequences, K and N at least 2.

    What differs between the sequences' means is in part the draws' own spread, which counts once only.
    """
    num_draws, num_sequences = draws.shape
    if num_draws < 2 or num_sequences < 2:
        raise ValueError(f"Errors need 2 draws of 2 sequences at least, not {num_draws} of {num_sequences}.")
    draws = draws.double()
    monte_carlo_variance = float(draws.mean(1).var()) / num_draws
    between = float(draws.mean(0).var() - draws.var(0).mean() / num_draws)
    return Estimate(
        mean=float(draws.mean()),
        monte_carlo_error=math.sqrt(monte_carlo_variance),
        standard_error=math.sqrt(monte_carlo_variance + max(between, 0.0) / num_sequences),
    )


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
    columns = ["term", "nats a token", "bits a token", "Monte-Carlo error", "with sampling of sequences"]
    keys = ("nats_per_token", "bits_per_token", "monte_carlo_error", "standard_error")
    rows = [[TERMS[name], *(cell(values[key], None, 4) for key in keys)] for name, values in results["terms"].items()]
    terms = markdown_table(columns, rows)
    settings = markdown_table(["setting", "value"], [[key, str(value)] for key, value in results["settings"].items()])
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"# Likelihood bound of {results['pipeline']}\n\n" + "\n".join(terms) + "\n\n"
        "Errors are standard errors in nats a token: of noise and times for these very sequences, and with that of "
        f"having drawn these sequences.\n\n## What the numbers are\n\n{caveats(results)}\n\n"
        "## Settings\n\n" + "\n".join(settings) + "\n\n"
        f"{results['seconds']:.0f} s on {results['hardware']}; {used}.\n"
    )
