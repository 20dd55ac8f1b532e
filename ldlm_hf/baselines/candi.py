"""CANDI (Pynadath et al., 2025): each word is either clean, or its one-hot vector has Gaussian noise.

Each word is revealed with probability alpha_t; all others become y = onehot(x) + sigma_t eps. The network is told
c = -log alpha_t, and predicts the words that are hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config

from ..loading.checks import check_settings
from .categorical import Generators, cross_entropy, draw_words, normal, row_generators, uniform_like
from .masked import masked_loss
from .noise_schedule import LAST_TIME, linear_grid, log_linear_alpha, training_times
from .one_hot_noise import embedded_noise
from .token_scheduler import TokenScheduler
from .token_training import TokenDiffusionObjective, TokenDiffusionRecipe, TokenDiffusionSettings
from .token_transformer import TokenDiffusionTransformer


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

    Args:
        clean: e_x, (B, L, D).
        noise: standard normal, (B, L, D).
        sigma: of shape (B, 1, 1), or a number.
        embeddings: e, (K, D).
    """
    return (clean + sigma * embedded_noise(noise, embeddings)) / (1 + sigma**2) ** 0.5


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
        shape = (*token_ids.shape, embeddings.shape[1])
        noise = normal(shape, row_generators(generator, len(token_ids)), token_ids.device)
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


# 3. Training


@dataclass
class CANDINoiseSettings:
    """The Gaussian noise.

    Attributes:
        rank_min, rank_max: shares of wrong words whose entries exceed the right one's at t = 0 and 1, the paper's on
            OpenWebText.
    """

    rank_min: float = 0.05
    rank_max: float = 0.25

    def __post_init__(self) -> None:
        check_settings(type(self).__init__, vars(self), rank_min="(0, 0.5)", rank_max=f"[{self.rank_min}, 0.5)")


@dataclass
class CANDISettings(TokenDiffusionSettings):
    """Settings of `train_baseline.py candi`; the paper's OpenWebText run has 200,000 steps."""

    noise: CANDINoiseSettings = field(default_factory=CANDINoiseSettings)


class CANDIObjective(TokenDiffusionObjective):
    """CANDI's loss, MDLM's on hidden words. It leaves the Gaussian part out: no bound to compare with MDLM's."""

    def __init__(self, transformer: TokenDiffusionTransformer, noise: CANDINoiseSettings):
        super().__init__(transformer)
        self.settings = noise

    def token_losses(self, input_ids: torch.Tensor, uniforms: torch.Tensor, generators: Generators) -> torch.Tensor:
        times = training_times(uniforms).to(input_ids.device)
        alpha = log_linear_alpha(times)
        hidden = uniform_like(input_ids, generators) >= alpha[:, None]
        embeddings = self.transformer.word_embeddings
        sigma = noise_level(times, self.settings.rank_min, self.settings.rank_max, self.vocab_size)
        noise = normal((*input_ids.shape, embeddings.shape[1]), generators, input_ids.device)
        sigma = sigma[:, None, None].to(embeddings.dtype)
        noisy = noisy_embeddings(embeddings[input_ids], noise, sigma, embeddings)
        logits = self.transformer(input_ids, -torch.log(alpha), inputs_embeds=noisy, noisy=hidden).logits
        return masked_loss(cross_entropy(logits, input_ids), hidden, times)


class CANDIRecipe(TokenDiffusionRecipe):
    """Training of CANDI."""

    settings_class = CANDISettings
    settings: CANDISettings
    process = "candi"

    def objective(self, transformer: TokenDiffusionTransformer) -> CANDIObjective:
        noise = self.settings.noise
        check_ranks(noise.rank_min, noise.rank_max, transformer.config.vocab_size)
        return CANDIObjective(transformer, noise)

    def scheduler(self) -> CANDIScheduler:
        noise = self.settings.noise
        return CANDIScheduler(len(self.tokenizer), noise.rank_min, noise.rank_max)
