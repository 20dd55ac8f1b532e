"""A likelihood bound for people: means and errors of its terms, a table, and what the numbers can be compared with."""

from __future__ import annotations

import math
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


def estimate(draws: torch.Tensor) -> dict[str, float]:
    """Mean and errors of a term, of K independent draws for each of N sequences: (K, N), K and N at least 2.

    `monte_carlo_error` is the standard error from noise and times, for these very sequences; `standard_error` has that
    of having these sequences and no others, too. What differs between the sequences' means is in part the draws' own
    spread, which counts once only. Errors are in nats.
    """
    num_draws, num_sequences = draws.shape
    if num_draws < 2 or num_sequences < 2:
        raise ValueError(f"Errors need 2 draws of 2 sequences at least, not {num_draws} of {num_sequences}.")
    draws = draws.double()
    monte_carlo_variance = float(draws.mean(1).var()) / num_draws
    between = float(draws.mean(0).var() - draws.var(0).mean() / num_draws)
    return {
        "nats_per_token": float(draws.mean()),
        "bits_per_token": float(draws.mean()) / math.log(2),
        "monte_carlo_error": math.sqrt(monte_carlo_variance),
        "standard_error": math.sqrt(monte_carlo_variance + max(between, 0.0) / num_sequences),
    }


CAVEATS = """\
**The joint bound (Eq. 23)** is on a density of tokens and hidden states: it may be negative, has no floor, and moves
with the units of the hidden states. It is **not** a token perplexity, and is comparable with no autoregressive or
discrete model's number; only with that of a model of the same token encoder, layer, statistics, tokenizer, text and
sequence length, each with its own noise levels reported.

**The bound on -log p(w)** is a number of discrete tokens, an upper bound beside other upper bounds (MDLM's, for one)
on the same text, tokenizer and chunks without context before them. It may be loose by any amount: training minimises
no likelihood, and the rate pays for latents to a precision of s_enc, whether or not the decoder needs them. A large
value is no evidence of poor samples.

**Both depend on the noise levels** s_enc and delta; every choice gives a valid bound, of a model of its own. The
corruption delta costs reconstruction and saves no rate: at the same noise on the decoder's input, `--decoder_noise 0`
with `--encoder_noise` sqrt(s_enc^2 + delta^2) has the smallest rate."""


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    columns = ["term", "nats a token", "bits a token", "Monte-Carlo error", "with sampling of sequences"]
    keys = ("nats_per_token", "bits_per_token", "monte_carlo_error", "standard_error")
    rows = [[TERMS[name], *(cell(values[key], None, 4) for key in keys)] for name, values in results["terms"].items()]
    terms = markdown_table(columns, rows)
    settings = markdown_table(["setting", "value"], [[key, str(value)] for key, value in results["settings"].items()])
    uniform = results["uniform_nats_per_token"]
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"# Likelihood bound of {results['pipeline']}\n\n" + "\n".join(terms) + "\n\n"
        "Errors are standard errors in nats a token: of noise and times for these very sequences, and with that of "
        f"having drawn these sequences. Guessing each token uniformly costs {uniform:.2f} nats.\n\n"
        f"## What the numbers are\n\n{CAVEATS}\n\n"
        "## Settings\n\n" + "\n".join(settings) + "\n\n"
        f"{results['seconds']:.0f} s on {results['hardware']}; {used}.\n"
    )
