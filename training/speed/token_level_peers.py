"""Language models that work on tokens, to compare the speed of latent diffusion with.

Two discrete diffusion models on the denoiser's own backbone, one whose noise masks tokens and one whose noise replaces
them by any other, and an autoregressive model with a KV cache. Nothing is trained: they are here to be timed. Their
steps are those of the published methods, but for working through the vocabulary in slices of positions, which saves
memory and costs no time.

Both diffusions keep a token with probability alpha(t) = 1 − t, t from 1 (noise) to 0. Each position is drawn from the
posterior q(z_s | z_t, x), s < t, with the prediction in the place of the clean token x, in float64: with fewer digits
the Gumbel noise lacks its tail, and samples come out less diverse than the model is. B batch, L tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from ldlm_hf.models.layers import AdaLayerNormModulation, DiffusionTransformerBlock, initialize_layer, modulate


# logits of 256 positions are 50 MB in float32 at a vocabulary of 50,257, and the float64 numbers that are made of them
# twice and four times that
POSITIONS_AT_ONCE = 256


class TokenLevelDenoiser(nn.Module):
    """DiT over token embeddings with the sizes of a GPT-2; it reads a mask, of the id V, that it does not predict."""

    _repeated_blocks = [DiffusionTransformerBlock.__name__]

    def __init__(self, config: GPT2Config):
        super().__init__()
        vocab_size, hidden_size = config.vocab_size, config.n_embd
        intermediate_size = config.n_inner or 4 * hidden_size
        self.embedding = nn.Embedding(vocab_size + 1, hidden_size)
        self.positions = nn.Parameter(0.02 * torch.randn(config.n_positions, hidden_size))
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.time_embedder = TimestepEmbedding(256, hidden_size)
        blocks = [
            DiffusionTransformerBlock(hidden_size, config.n_head, intermediate_size) for _ in range(config.n_layer)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.modulation_out = AdaLayerNormModulation(hidden_size, 2)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.apply(lambda module: initialize_layer(module, initializer_range=0.02))

    def forward(self, token_ids: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the vocabulary projection `head` reads, (B, L, D), of tokens (B, L) at one time () for all."""
        frequencies = self.time_proj(timestep.reshape(1).float())
        time_embedding = self.time_embedder(frequencies.to(self.positions.dtype))  # (1, D)
        hidden_states = self.embedding(token_ids) + self.positions  # (B, L, D)
        for block in self.blocks:
            hidden_states = block(hidden_states, time_embedding)
        return modulate(hidden_states, *self.modulation_out(time_embedding))


def sample_categorical(probabilities: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws one index (...) from each row (..., V) of weights, which need not sum to 1, by the Gumbel-max trick.

    argmax_k log p_k + G_k with Gumbel noise G = −log E is argmax_k p_k / E_k with exponential noise E.
    """
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    # max finds the index several times faster than argmax on a CPU
    return torch.div(probabilities, noise, out=noise).max(-1).indices


def masked_posterior(
    clean_probabilities: torch.Tensor, token_ids: torch.Tensor, alpha_t: float, alpha_s: float
) -> torch.Tensor:
    """Absorbing-state diffusion (Sahoo et al. 2024, "MDLM"): a token that is there stays, and a mask m turns into

        q(z_s | z_t = m, x) = [(alpha_s − alpha_t) x + (1 − alpha_s) m] / (1 − alpha_t)

    Args:
        clean_probabilities: x, (..., V).
        token_ids: z_t, (...), of which V is the mask.

    Returns:
        Probabilities (..., V + 1), float64, the mask's last.
    """
    vocab_size = clean_probabilities.shape[-1]
    index = token_ids[..., None]
    is_mask = (index == vocab_size).double()  # (..., 1)
    posterior = clean_probabilities.new_empty((*token_ids.shape, vocab_size + 1), dtype=torch.float64)
    torch.mul(clean_probabilities, is_mask * (alpha_s - alpha_t) / (1 - alpha_t), out=posterior[..., :-1])
    posterior[..., -1:] = is_mask * (1 - alpha_s) / (1 - alpha_t)
    return posterior.scatter_add_(-1, index, 1 - is_mask)


def uniform_posterior(
    clean_probabilities: torch.Tensor, token_ids: torch.Tensor, alpha_t: float, alpha_s: float
) -> torch.Tensor:
    """Uniform-state diffusion (Austin et al. 2021, "D3PM"; Schiff et al. 2024, "UDLM"), probabilities (..., V).

    By Bayes' rule from q(z_t | z_s) and q(z_s | x), with alpha_t|s = alpha_t / alpha_s and one-hot vectors z_t:

        [V alpha_t z_t * x + (alpha_t|s − alpha_t) z_t + (alpha_s − alpha_t) x + (1 − alpha_t|s)(1 − alpha_s) / V]
        / [V alpha_t <z_t, x> + 1 − alpha_t]
    """
    vocab_size = clean_probabilities.shape[-1]
    alpha_ts = alpha_t / alpha_s
    index = token_ids[..., None]
    of_token = clean_probabilities.gather(-1, index).double()  # <z_t, x>, (..., 1)
    normalizer = vocab_size * alpha_t * of_token + 1 - alpha_t
    posterior = clean_probabilities * ((alpha_s - alpha_t) / normalizer)
    posterior += (1 - alpha_ts) * (1 - alpha_s) / vocab_size / normalizer
    return posterior.scatter_add_(-1, index, (vocab_size * alpha_t * of_token + alpha_ts - alpha_t) / normalizer)


Posterior = Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]


@torch.no_grad()
def denoising_step(
    denoiser: TokenLevelDenoiser,
    posterior: Posterior,
    token_ids: torch.Tensor,
    t: float,
    s: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Tokens z_s (B, L) from tokens z_t, by one call of the denoiser and one of the posteriors."""
    hidden_states = denoiser(token_ids, torch.tensor(t, device=token_ids.device)).flatten(0, 1)  # (B L, D)
    parts = []
    for some, ids in zip(
        hidden_states.split(POSITIONS_AT_ONCE), token_ids.flatten().split(POSITIONS_AT_ONCE), strict=True
    ):
        clean_probabilities = denoiser.head(some).float().softmax(-1)
        parts.append(sample_categorical(posterior(clean_probabilities, ids, 1 - t, 1 - s), generator))
    return torch.cat(parts).view_as(token_ids)


@torch.no_grad()
def generate_autoregressively(
    model: GPT2LMHeadModel, batch_size: int, length: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Tokens (B, L), one after the other, each by one call of the model on the one before it and the cache."""
    last = torch.full((batch_size, 1), model.config.bos_token_id, device=model.device)
    cache = DynamicCache(config=model.config)
    tokens = []
    for _ in range(length):
        # by position: its name is another one from version to version
        logits = model(last, cache, use_cache=True).logits  # (B, 1, V)
        last = sample_categorical(logits.float().softmax(-1).double(), generator)  # (B, 1)
        tokens.append(last)
    return torch.cat(tokens, dim=1)
