"""CANDI (Pynadath et al., 2025): each word is either clean, or its one-hot vector has Gaussian noise.

Each word is revealed with probability alpha_t; all others become y = onehot(x) + sigma_t eps. The network is told
c = -log alpha_t, and predicts the words that are hidden.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config

from .categorical import Generators, draw_words, row_generators, uniform_like
from .noise_schedule import LAST_TIME, linear_grid, log_linear_alpha
from .token_scheduler import TokenScheduler


FIRST_TIME = 0.999

# 1. The process


def noise_level(times: torch.Tensor, rank_min: float, rank_max: float, vocab_size: int) -> torch.Tensor:
    """sigma_t = -1 / (sqrt 2 Phi^-1(r K/(K-1))) with r = r_min + (r_max - r_min)(1 - alpha_t), float64: about a share
    r of the wrong words has a larger entry than the right one."""
    ranks = rank_min + (rank_max - rank_min) * (1 - log_linear_alpha(times.double()))
    return -1 / (math.sqrt(2) * torch.special.ndtri(ranks * vocab_size / (vocab_size - 1)))


def check_ranks(rank_min: float, rank_max: float, vocab_size: int) -> None:
    """Raises ValueError unless 0 < r_min <= r_max, and r_max K/(K-1) < 1/2, where the noise level ends."""
    if not 0 < rank_min <= rank_max < (vocab_size - 1) / vocab_size / 2:
        raise ValueError(
            f"rank_min={rank_min} and rank_max={rank_max} must be shares of {vocab_size} words with 0 < rank_min <= "
            f"rank_max < {(vocab_size - 1) / vocab_size / 2:.4g}; the paper's are 0.05 and 0.25."
        )


def noisy_embeddings(
    clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor | float, embeddings: torch.Tensor
) -> torch.Tensor:
    """What the network reads of y: (sum_v y_v e_v) / sqrt(1 + sigma^2), with e the words' embeddings of length 1.

    eps @ e has the covariance e^T e, so its law is that of standard normal noise of the embeddings' width times the
    Cholesky factor of that, which needs no array of all words.

    Args:
        clean: e_x, (B, L, D).
        noise: standard normal, (B, L, D).
        sigma: of shape (B, 1, 1), or a number.
        embeddings: e, (K, D).
    """
    return (clean + sigma * embedded_noise(noise, embeddings)) / (1 + sigma**2) ** 0.5


def embedded_noise(noise: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """eps @ embeddings in law, by standard normal noise (B, L, D) and embeddings (K, D): (B, L, D)."""
    gram = embeddings.double().mT @ embeddings.double()
    # fewer words than channels leave directions without noise
    ridge = 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(gram + ridge)
    return noise @ factor.mT.to(noise.dtype)


def probability_flow_step(
    embeddings: torch.Tensor, predicted: torch.Tensor, sigma_t: float, sigma_s: float, as_coded: bool = False
) -> torch.Tensor:
    """h + (sigma_s - sigma_t) (h - e) / sigma_t, from the noise level sigma_t to sigma_s; the authors' code divides by
    sigma_s^2 instead.

    Args:
        embeddings: h, of hidden words, (B, L, D).
        predicted: e of the predicted words, (B, L, D).
        sigma_t, sigma_s: noise levels before and after.
        as_coded: as the authors' code has it.
    """
    return embeddings + (sigma_s - sigma_t) / (sigma_s**2 if as_coded else sigma_t) * (embeddings - predicted)


# 2. Sampler


class CANDISample(NamedTuple):
    """Words (B, L), which of them are revealed (B, L), and embeddings of the noisy ones (B, L, D)."""

    words: torch.Tensor
    revealed: torch.Tensor
    embeddings: torch.Tensor


class CANDIScheduler(TokenScheduler):
    r"""
    CANDI's sampler with embedded noise. Times are even from 0.999 to 1e-5, and `num_inference_steps` are as many
    evaluations. In each step words are drawn at all hidden positions, the noisy embeddings move towards them by the
    probability flow, and each hidden position is revealed with probability (t - s) / t. Samples are
    [`CANDISample`]s; `step` needs the words' `embeddings` (K, D), of length 1.

    Args:
        vocab_size (`int`): words K.
        rank_min, rank_max (`float`, defaults to 0.05 and 0.25): shares of wrong words above the right one, at t = 0
            and 1.
        as_coded (`bool`, defaults to `False`): as the authors' code, whose published results it made: the flow is
            divided by sigma_s^2, the network sees the noise level of the next time, and s = t - (1 - 1e-5) / N where
            positions are revealed.
        temperature, top_p, keep_crossing: as for every sampler, see [`TokenScheduler`].
    """

    process = "candi"
    takes_given = True

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        rank_min: float = 0.05,
        rank_max: float = 0.25,
        as_coded: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        keep_crossing: bool = True,
    ):
        super().__init__(vocab_size="[2, inf)")
        check_ranks(rank_min, rank_max, vocab_size)

    def time_grid(self, num_steps: int) -> torch.Tensor:
        return linear_grid(num_steps, FIRST_TIME)

    def evaluation_times(self) -> list[float]:
        return self.grid[:-1]

    def sigma(self, time: float) -> float:
        """sigma_t"""
        config = self.config
        times = torch.tensor(time, dtype=torch.float64)
        return float(noise_level(times, config.rank_min, config.rank_max, config.vocab_size))

    def start(self, token_ids: torch.Tensor, vocab_size: int, generator: Any, embeddings: torch.Tensor) -> CANDISample:
        # by numbers in (0, 1) as all other draws, which have one generator a row
        shape = (*token_ids.shape, embeddings.shape[1])
        generators = row_generators(generator, len(token_ids))
        numbers = uniform_like(token_ids[..., None].expand(shape), generators).clamp(min=2**-53)
        noise = torch.special.ndtri(numbers).to(embeddings.dtype)
        hidden = self.sigma(FIRST_TIME) * embedded_noise(noise, embeddings)
        return CANDISample(torch.zeros_like(token_ids), torch.zeros_like(token_ids, dtype=torch.bool), hidden)

    def give(self, sample: CANDISample, token_ids: torch.Tensor, given: torch.Tensor) -> CANDISample:
        return sample._replace(words=torch.where(given, token_ids, sample.words), revealed=sample.revealed | given)

    def model_inputs(self, sample: CANDISample, timestep: float | torch.Tensor) -> dict[str, torch.Tensor]:
        seen_at = self.grid[self.index_of(timestep) + 1] if self.config.as_coded else float(timestep)
        scaled = sample.embeddings / math.sqrt(1 + self.sigma(seen_at) ** 2)
        times = torch.as_tensor(timestep, dtype=torch.float64)
        # alpha = 1 - t here, as the authors' sampler has it
        condition = -torch.log1p(-times)
        return {
            "input_ids": sample.words,
            "inputs_embeds": scaled,
            "noisy": ~sample.revealed,
            "timestep": condition,
        }

    def words(self, sample: CANDISample) -> torch.Tensor:
        return sample.words

    def take_step(
        self, logits: torch.Tensor, index: int, sample: CANDISample, generators: Generators, **inputs: Any
    ) -> CANDISample:
        t, s = self.grid[index : index + 2]
        hidden = ~sample.revealed
        words = torch.where(hidden, draw_words(logits, hidden, self.probabilities, generators), sample.words)
        predicted = inputs["embeddings"][words]
        sigmas = self.sigma(t), self.sigma(s)
        moved = probability_flow_step(sample.embeddings, predicted, *sigmas, self.config.as_coded)
        step = (1 - LAST_TIME) / len(self.timesteps) if self.config.as_coded else t - s
        revealed = sample.revealed | (uniform_like(words, generators) < step / t)
        return CANDISample(words, revealed, moved)
