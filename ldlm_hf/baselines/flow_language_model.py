"""FLM, a flow from noise to one-hot vectors, and FMLM, the flow map that it is distilled into (Lee et al., 2026).

Time runs the other way here: t = 0 is noise and t = 1 data, x_t = (1 - t) eps + t onehot(x) in R^K for each word. The
network is told tau, uniform in training, in place of t = g(tau): a share tau of the words has the right argmax
([`one_hot_noise.warp_time`]). It predicts the clean words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from ..loading.checks import check_settings
from .categorical import Generators, cross_entropy, normal, row_generators
from .one_hot_noise import embedded_noise, unwarp_time, warp_time
from .token_scheduler import TokenScheduler
from .token_training import TokenDiffusionObjective, TokenDiffusionRecipe, TokenDiffusionSettings
from .token_transformer import TokenDiffusionTransformer


# as in the authors' code, where it keeps the last step finite
EULER_GUARD = 1e-5

# 1. Steps


def flow_step(sample: torch.Tensor, predicted: torch.Tensor, t: float, next_t: float) -> torch.Tensor:
    """FLM's Euler step in t: z + (t' - t) (p - z) / (1 - t + 1e-5)."""
    return sample + (next_t - t) / (1 - t + EULER_GUARD) * (predicted - sample)


def flow_map_jump(sample: torch.Tensor, predicted: torch.Tensor, s: float, t: float) -> torch.Tensor:
    """X_st(z) = ((1 - t) z + (t - s) D(z; s, t)) / (1 - s), exact where D is."""
    return ((1 - t) * sample + (t - s) * predicted) / (1 - s)


def landing_time(next_t: float, gamma: float) -> float:
    """t~ = 1 - (1 - t') sqrt(1 - gamma^2), from which noise of the standard deviation gamma (1 - t') leads to t'."""
    return 1 - (1 - next_t) * (1 - gamma**2) ** 0.5


# 2. Samplers


class FLMScheduler(TokenScheduler):
    r"""
    FLM's sampler: Euler steps in t, at times that are even in tau from 0 to 1; the last one ends at the prediction, of
    which the most likely words are taken. `num_inference_steps` are as many evaluations, and all randomness is in the
    start. Samples are (B, L, K), float32.

    Args:
        vocab_size (`int`): words K.
        temperature (`float`, defaults to 1.0): that logits are divided by.
    """

    process = "flow"

    @register_to_config
    def __init__(self, vocab_size: int, temperature: float = 1.0):
        super().__init__(vocab_size="[2, inf)", temperature="(0, inf)")

    def time_grid(self, num_steps: int) -> torch.Tensor:
        return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)

    def evaluation_times(self) -> list[float]:
        return self.grid[:-1]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        grid = torch.tensor(self.grid, dtype=torch.float64)
        # t of each tau of the grid
        self.flow_times: list[float] = warp_time(grid, self.config.vocab_size).tolist()

    def start(
        self, token_ids: torch.Tensor, vocab_size: int, generator: Any, embeddings: torch.Tensor
    ) -> torch.Tensor:
        return self.noise((*token_ids.shape, vocab_size), row_generators(generator, len(token_ids)), token_ids.device)

    def noise(self, shape: tuple[int, ...], generators: Generators, device: torch.device) -> torch.Tensor:
        """Standard normal noise (B, L, K)."""
        return normal(shape, generators, device)

    def model_inputs(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weights": sample, "timestep": torch.as_tensor(timestep)}

    def words(self, sample: torch.Tensor) -> torch.Tensor:
        return sample.argmax(-1)

    def predicted(self, logits: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """p (B, L, K), of the sample's type."""
        return (logits.to(sample.dtype) / self.config.temperature).softmax(-1)

    def take_step(
        self, logits: torch.Tensor, index: int, sample: torch.Tensor, generators: Generators, **inputs: Any
    ) -> torch.Tensor:
        predicted = self.predicted(logits, sample)
        t, next_t = self.flow_times[index : index + 2]
        return predicted if index == len(self.timesteps) - 1 else flow_step(sample, predicted, t, next_t)


class FMLMScheduler(FLMScheduler):
    r"""
    Steps of any length with a flow map D(x; tau, tau'), a network with `next_timestep_conditioning`. A step lands
    beyond the grid's next time and goes back by fresh noise: with `gamma` 0 by none, with 1 it lands at data. The
    published values are 1.0 on OpenWebText and 0.8 on LM1B.

    Args:
        vocab_size (`int`): words K.
        gamma (`float`, defaults to 1.0): share of the noise, as a standard deviation, that is fresh, in [0, 1].
        temperature (`float`, defaults to 1.0): that logits are divided by.
    """

    @register_to_config
    def __init__(self, vocab_size: int, gamma: float = 1.0, temperature: float = 1.0):
        TokenScheduler.__init__(self, vocab_size="[2, inf)", temperature="(0, inf)", gamma="[0, 1]")

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        landings = [landing_time(t, self.config.gamma) for t in self.flow_times[1:]]
        # t~ and tau~ of each step
        self.landing_times = landings
        self.next_timesteps = unwarp_time(torch.tensor(landings, dtype=torch.float64), self.config.vocab_size)

    def model_inputs(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> dict[str, torch.Tensor]:
        next_timestep = self.next_timesteps[self.index_of(timestep)]
        return {**super().model_inputs(sample, timestep), "next_timestep": next_timestep}

    def take_step(
        self, logits: torch.Tensor, index: int, sample: torch.Tensor, generators: Generators, **inputs: Any
    ) -> torch.Tensor:
        predicted = self.predicted(logits, sample)
        if index == len(self.timesteps) - 1:
            return predicted
        t, next_t = self.flow_times[index : index + 2]
        landing, gamma = self.landing_times[index], self.config.gamma
        landed = flow_map_jump(sample, predicted, t, landing)
        if gamma == 0:
            return landed
        noise = self.noise(tuple(sample.shape), generators, sample.device).to(sample.dtype)
        return landed + (next_t - landing) * predicted + gamma * (1 - next_t) * noise


# 3. Training


@dataclass
class FLMCapSettings:
    """Soft caps of logits.

    Attributes:
        logits: of the words.
        attention: of attention's scores; None has none, and is the faster.
    """

    logits: float | None = 30.0
    attention: float | None = 50.0

    def __post_init__(self) -> None:
        check_settings(type(self).__init__, vars(self), logits="(0, inf)", attention="(0, inf)")


@dataclass
class FLMSettings(TokenDiffusionSettings):
    """Settings of `train_baseline.py flm`."""

    caps: FLMCapSettings = field(default_factory=FLMCapSettings)


class FLMObjective(TokenDiffusionObjective):
    """FLM's loss, the cross-entropy of the clean words at every position, unweighted. It bounds no likelihood.

    The network reads nothing of x_t but its embedding, (1 - t) eps @ e + t e_x, so the noise is drawn there.
    """

    def token_losses(self, input_ids: torch.Tensor, uniforms: torch.Tensor, generators: Generators) -> torch.Tensor:
        embeddings = self.transformer.word_embeddings
        times = warp_time(uniforms, self.vocab_size).to(input_ids.device)[:, None, None].to(embeddings.dtype)
        noise = normal((*input_ids.shape, embeddings.shape[1]), generators, input_ids.device)
        noisy = (1 - times) * embedded_noise(noise, embeddings) + times * embeddings[input_ids]
        return cross_entropy(self.transformer(inputs_embeds=noisy, timestep=uniforms).logits, input_ids)


class FLMRecipe(TokenDiffusionRecipe):
    """Training of FLM."""

    settings_class = FLMSettings
    settings: FLMSettings
    process = "flow"

    def network_arguments(self) -> dict[str, Any]:
        return {"logit_cap": self.settings.caps.logits, "attention_logit_cap": self.settings.caps.attention}

    def objective(self, transformer: TokenDiffusionTransformer) -> FLMObjective:
        return FLMObjective(transformer)

    def scheduler(self) -> FLMScheduler:
        return FLMScheduler(len(self.tokenizer))
