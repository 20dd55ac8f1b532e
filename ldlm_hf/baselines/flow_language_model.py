"""FLM, a flow from noise to one-hot vectors, and FMLM, the flow map that it is distilled into (Lee et al., 2026).

Time runs the other way here: t = 0 is noise and t = 1 data, x_t = (1 - t) eps + t onehot(x) in R^K for each word. The
network is told tau, uniform in training, in place of t = g(tau): a share tau of the words has the right argmax
([`one_hot_noise.warp_time`]). It predicts the clean words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..loading.checks import check_settings
from ..objective.base import without_autocast_cache
from ..training.randomness import RowRandomness
from ..training.recipe import StepLosses
from .categorical import Generators, by_slices, cross_entropy, normal, row_generators, tempered
from .one_hot_noise import embedded_noise, unwarp_time, warp_time
from .token_scheduler import TokenScheduler
from .token_training import (
    TokenDiffusionObjective,
    TokenDiffusionRecipe,
    TokenDiffusionSettings,
    TokenRecipe,
    TokenRunSettings,
    load_teacher,
)
from .token_transformer import TokenDiffusionTransformer


# as in the authors' code, where it keeps the last step finite
EULER_GUARD = 1e-5

# 1. Steps


def flow_step(sample: torch.Tensor, predicted: torch.Tensor, t: float, next_t: float) -> torch.Tensor:
    """FLM's Euler step in t: z + (t' - t) (p - z) / (1 - t + 1e-5)."""
    return torch.lerp(sample, predicted, (next_t - t) / (1 - t + EULER_GUARD))


def flow_map_jump(
    sample: torch.Tensor, predicted: torch.Tensor, s: float | torch.Tensor, t: float | torch.Tensor
) -> torch.Tensor:
    """X_st(z) = ((1 - t) z + (t - s) D(z; s, t)) / (1 - s), exact where D is; s < 1."""
    return torch.lerp(sample, predicted, (t - s) / (1 - s))


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
        return tempered(logits.to(sample.dtype), self.config.temperature).softmax(-1)

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
        return landed.add_(predicted, alpha=next_t - landing).add_(noise, alpha=gamma * (1 - next_t))


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


# 4. Distillation into a flow map

BOUNDARY_ROWS = 32
SHORTEST_STEP = 1e-6


def distillation_steps(
    rows: torch.Tensor, batch_size: int, uniforms: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """tau_s and tau_t of some rows of a batch, float64.

    Every second row is diagonal, tau_s = tau_t, stratified over [0, 1). The others have a length delta, stratified,
    and begin at v (1 - delta); every 32nd of them goes from 0 to 1.

    Args:
        rows: places in the whole batch, (n,).
        batch_size: rows of the whole batch.
        uniforms: in [0, 1), (n,).
        places: v in [0, 1), even over the whole batch and in another order, (n,).
    """
    index = rows // 2
    stratified = (index + uniforms) / math.ceil(batch_size / 2)
    lengths = stratified.clamp(min=SHORTEST_STEP)
    is_whole = index % BOUNDARY_ROWS == 0
    starts = torch.where(is_whole, 0.0, places * (1 - lengths))
    ends = torch.where(is_whole, 1.0, starts + lengths)
    is_diagonal = rows % 2 == 0
    return torch.where(is_diagonal, stratified, starts), torch.where(is_diagonal, stratified, ends)


def first_half_share(s: torch.Tensor, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """lambda = (1 - t)(u - s) / ((1 - u)(t - s)), the weight of the first of two jumps in the one that they make."""
    return (1 - t) * (u - s) / ((1 - u) * (t - s))


def soft_cross_entropy(
    logits: torch.Tensor, first: torch.Tensor, second: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """-sum_v q_v log p_v with q = share softmax(first) + (1 - share) softmax(second): (n,).

    Args:
        logits: of p, (n, K).
        first, second: logits of the target's parts, (n, K).
        share: (n,).
    """
    share = share[:, None].to(logits.dtype)
    target = torch.lerp(second.to(logits.dtype).softmax(-1), first.to(logits.dtype).softmax(-1), share)
    return -(target * logits.log_softmax(-1)).sum(-1)


@dataclass
class FMLMSettings(TokenRunSettings):
    """Settings of `train_baseline.py fmlm`.

    Attributes:
        components: folder or Hub id of the FLM pipeline that is distilled.
    """

    components: str = ""


class FMLMObjective(FLMObjective):
    """Progressive distillation: a jump is taught by two of half the length, and one of length 0 by FLM.

    The network predicts the end D(x_s; tau_s, tau_t) of a jump. Of the target no gradient is taken. Without ends it
    is FLM's loss. It holds arrays of all words, (B, L, K), since student and teacher read x_s by embeddings of their
    own: take a small `loop.device_batch_size`.
    """

    def __init__(self, transformer: TokenDiffusionTransformer, teacher: TokenDiffusionTransformer):
        super().__init__(transformer)
        self.teacher = teacher.requires_grad_(False)

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Any]:
        inputs = super().example_inputs(batch_size, sequence_length)
        return {**inputs, "ends": [0.5 if row % 2 == 0 else 1.0 for row in range(batch_size)]}

    def token_losses(
        self,
        input_ids: torch.Tensor,
        uniforms: torch.Tensor,
        generators: Generators,
        ends: list[float] | None = None,
    ) -> torch.Tensor:
        if ends is None:
            return super().token_losses(input_ids, uniforms, generators)
        starts, stops = uniforms, torch.tensor(ends, dtype=torch.float64, device="cpu")
        s = self.flow_time(starts, input_ids)
        noise = normal((*input_ids.shape, self.vocab_size), generators, input_ids.device)
        x_s = ((1 - s) * noise).scatter_add_(-1, input_ids[..., None], s.expand(*input_ids.shape, 1))
        with torch.no_grad(), without_autocast_cache(input_ids.device):
            first, second, share = self.targets(x_s, starts, stops)
        logits = self.transformer(weights=x_s, timestep=starts, next_timestep=stops).logits
        return by_slices(soft_cross_entropy, logits, first, second, share.expand(input_ids.shape))

    def flow_time(self, tau: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """t = g(tau), float32 of shape (B, 1, 1), where the ids are."""
        return warp_time(tau, self.vocab_size).to(input_ids.device, torch.float32)[:, None, None]

    def targets(
        self, x_s: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of both parts of the target, (B, L, K), and the first one's share, (B, 1)."""
        is_diagonal = starts == stops
        taught, jumps = is_diagonal.nonzero()[:, 0], (~is_diagonal).nonzero()[:, 0]
        middles = (starts + stops) / 2
        by_teacher = self.teacher(weights=x_s[taught], timestep=starts[taught]).logits
        tau_s, tau_u, tau_t = (times[jumps] for times in (starts, middles, stops))
        s, u, t = (self.flow_time(tau, x_s) for tau in (tau_s, tau_u, tau_t))
        first = self.transformer(weights=x_s[jumps], timestep=tau_s, next_timestep=tau_u).logits
        x_u = flow_map_jump(x_s[jumps], first.float().softmax(-1), s, u)
        second = self.transformer(weights=x_u, timestep=tau_u, next_timestep=tau_t).logits
        order = torch.cat([taught, jumps]).argsort()
        share = torch.cat([torch.ones(len(taught), 1, device=x_s.device), first_half_share(s, u, t)[..., 0]])
        return torch.cat([by_teacher, first])[order], torch.cat([by_teacher, second])[order], share[order]


class FMLMRecipe(TokenRecipe):
    """Distillation of FLM into a flow map."""

    settings_class = FMLMSettings
    settings: FMLMSettings

    def load(self) -> None:
        pipeline = load_teacher(self.settings.components, "flow")
        teacher = pipeline.transformer
        self.tokenizer, self.sequence_length = pipeline.tokenizer, pipeline.sequence_length
        transformer = TokenDiffusionTransformer.from_config(teacher.config, next_timestep_conditioning=True)
        transformer.load_state_dict(teacher.state_dict(), strict=False)
        self.module = FMLMObjective(transformer, teacher)

    def scheduler(self) -> FMLMScheduler:
        return FMLMScheduler(len(self.tokenizer))

    def losses(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        step: int,
        randomness: RowRandomness,
        given: torch.Tensor | None = None,
    ) -> StepLosses:
        rows = torch.arange(randomness.rows.start, randomness.rows.stop)
        starts, ends = distillation_steps(rows, randomness.batch_size, randomness.uniform(), randomness.places())
        generators = randomness.generators(input_ids.device)
        loss = module(input_ids, starts.tolist(), generators, ends=ends.tolist()).total
        return StepLosses(total=loss, values={"distillation_loss": loss})
