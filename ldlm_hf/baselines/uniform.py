"""Uniform diffusion: Duo (Sahoo et al., 2025) with its Gaussian curriculum, and psi-samplers (Deschenaux et al.,
2026).

Each word is replaced by one of all K words with probability 1 - alpha_t. The network is told c = -log alpha_t. What it
learns is the posterior of each word given the *other* noisy words: z_l itself enters by Bayes' rule, in the
transitions below.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..loading.checks import check_settings
from ..training.randomness import RowRandomness
from ..training.recipe import StepLosses
from ..training.settings import LoopSettings, OptimizerSettings
from .categorical import (
    POSITIONS_AT_ONCE,
    Generators,
    by_slices,
    draw,
    random_words_like,
    row_generators,
    uniform_like,
)
from .noise_schedule import (
    ALPHA_END,
    grid_parts,
    is_loop_step,
    linear_grid,
    log_linear_alpha,
    loop_grid,
    training_times,
)
from .one_hot_noise import argmax_signal, argmax_signal_slope
from .token_scheduler import TokenScheduler
from .token_training import (
    TokenDiffusionObjective,
    TokenDiffusionRecipe,
    TokenDiffusionSettings,
    TokenRecipe,
    TokenRunSettings,
    draws,
    load_teacher,
    papers_optimizer,
)
from .token_transformer import TokenDiffusionTransformer


# 1. The process and its loss


def replace_words(
    token_ids: torch.Tensor, alpha: torch.Tensor, vocab_size: int, generators: Generators
) -> torch.Tensor:
    """z_t of clean ids (B, L) at alpha_t (B,): a uniform draw of all K words with probability 1 - alpha_t."""
    is_replaced = uniform_like(token_ids, generators) >= alpha[:, None]
    return torch.where(is_replaced, random_words_like(token_ids, vocab_size, generators), token_ids)


def uniform_loss(
    logits: torch.Tensor, noisy_ids: torch.Tensor, token_ids: torch.Tensor, alpha: torch.Tensor, slope: torch.Tensor
) -> torch.Tensor:
    """Duo's bound in nats of each word, (n,), by one pass over the vocabulary.

    With r = K alpha / (1 - alpha), l_j = log1p(r p_j), i the noisy word and o the right one,

        z  = x:  S = (K l_i - sum l - (K - 1) log1p(r)) / (1 + r)
        z != x:  S =  K l_i - sum l + r (l_i - l_o) + (1 + r) log1p(r)
        loss = -alpha' / (K alpha) (S + K / (1 - alpha) (1 / (1 + r p_i) - 1 / (1 + r [z = x])))

    Args:
        logits: (n, K), float32 or float64.
        noisy_ids, token_ids: i and o, (n,).
        alpha: in (0, 1), float64, (n,).
        slope: d alpha/dt, negative, float64, (n,).
    """
    vocab_size = logits.shape[-1]
    # 1 - alpha has lost digits in float32
    r, end_weight, weight = (
        value.to(logits.dtype)
        for value in (vocab_size * alpha / (1 - alpha), vocab_size / (1 - alpha), -slope / (vocab_size * alpha))
    )
    probabilities = logits.softmax(-1)
    levels = torch.log1p(r[:, None] * probabilities)
    level_i, level_o, p_i = (
        values.gather(-1, ids[:, None])[:, 0]
        for values, ids in ((levels, noisy_ids), (levels, token_ids), (probabilities, noisy_ids))
    )
    is_right = noisy_ids == token_ids
    excess = vocab_size * level_i - levels.sum(-1)
    kept = (excess - (vocab_size - 1) * torch.log1p(r)) / (1 + r)
    replaced = excess + r * (level_i - level_o) + (1 + r) * torch.log1p(r)
    ratios = torch.where(is_right, kept, replaced)
    ends = end_weight * (1 / (1 + r * p_i) - 1 / (1 + r * is_right))
    return weight * (ratios + ends)


# 2. The curriculum: Gaussian noise whose argmax is the process

LARGEST_OTHERS = 8


def log_noise_ratio(times: torch.Tensor, gamma_min: float, gamma_max: float) -> torch.Tensor:
    """gamma_t = gamma_min + t (gamma_max - gamma_min), the log of the variances of noise over signal."""
    return gamma_min + times * (gamma_max - gamma_min)


def argmax_alpha(gamma: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha = A(mu) at mu = exp(-gamma/2), and d alpha/d gamma = -A'(mu) mu/2; float64, of the shape of gamma."""
    mu = torch.exp(-gamma.double().cpu() / 2)
    return argmax_signal(mu, vocab_size), -argmax_signal_slope(mu, vocab_size) * mu / 2


def distinct_others(token_ids: torch.Tensor, count: int, vocab_size: int, generators: Generators) -> torch.Tensor:
    """`count` distinct words, none of them the token's own, uniformly and in random order: (B, L, count)."""
    taken = token_ids[..., None]
    for i in range(count):
        # the n-th of the words that are not taken yet
        word = random_words_like(token_ids, vocab_size - 1 - i, generators)
        for other in taken.sort(-1).values.unbind(-1):
            word = word + (word >= other)
        taken = torch.cat([taken, word[..., None]], dim=-1)
    return taken[..., 1:]


def largest_normals(like: torch.Tensor, count: int, total: int, generators: Generators) -> torch.Tensor:
    """The `count` largest of `total` standard normal numbers, falling, for each entry of a tensor (B, L): (B, L,
    count), float64.

    Their ranks are U_1 = R_1^(1/n), U_(q+1) = U_q R_(q+1)^(1/(n-q)) with uniform R, and the numbers Phi^-1(U).
    """
    numbers = uniform_like(like[..., None].expand(*like.shape, count), generators)
    log_ranks = (torch.log1p(-numbers) / torch.arange(total, total - count, -1, device=like.device)).cumsum(-1)
    # 1 - U keeps its digits where U is near 1
    return -torch.special.ndtri(-torch.expm1(log_ranks))


def gaussian_words(
    token_ids: torch.Tensor, gamma: torch.Tensor, vocab_size: int, temperature: float, generators: Generators
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest entries of w = a onehot(x) + b eps, with a^2 = sigmoid(-gamma) and b^2 = sigmoid(gamma).

    Only the right word's entry and the largest of the others are drawn, by their order (Duo++'s way). At the
    temperature of training, 1e-3, all the rest have no weight in softmax(w / temperature).

    Args:
        token_ids: x, (B, L).
        gamma: (B,).
        vocab_size: words K.
        temperature: of the softmax.
        generators: one for each row.

    Returns:
        z = argmax w, (B, L); ids of the entries, (B, L, k + 1); and their weights, which sum to 1, float64.
    """
    gamma = gamma.double().to(token_ids.device)[:, None]
    signal, noise = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    count = min(LARGEST_OTHERS, vocab_size - 1)
    right = signal + noise * torch.special.ndtri(uniform_like(token_ids, generators).clamp(min=2**-53))
    others = noise[..., None] * largest_normals(token_ids, count, vocab_size - 1, generators)
    entries = torch.cat([right[..., None], others], dim=-1)
    ids = torch.cat([token_ids[..., None], distinct_others(token_ids, count, vocab_size, generators)], dim=-1)
    largest = entries.argmax(-1, keepdim=True)
    return ids.gather(-1, largest)[..., 0], ids, (entries / temperature).softmax(-1)


def argmax_words(
    token_ids: torch.Tensor, others: torch.Tensor, right: torch.Tensor, largest: torch.Tensor, gamma: torch.Tensor
) -> torch.Tensor:
    """argmax w: the right word where exp(-gamma/2) + its noise is more than the largest noise of the others, (B, L).

    Args:
        token_ids: x, (B, L).
        others: whose noise is the largest, (B, L).
        right, largest: noise of x, and of the other, (B, L).
        gamma: (B,).
    """
    mu = torch.exp(-gamma.double() / 2).to(token_ids.device)[:, None]
    return torch.where(mu + right > largest, token_ids, others)


# 3. Transitions


def transition_weights(
    p_i: torch.Tensor, alpha_t: float, alpha_s: float, vocab_size: int, kappa: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How the word z_s is drawn: it stays i / is one of p / is one of all words, with probabilities that sum to 1.

    The ancestral posterior q(z_s | z_t = i, p) has them in the proportions

        K alpha_t p_i + alpha_t/alpha_s - alpha_t : alpha_s - alpha_t : (1 - alpha_t/alpha_s) (1 - alpha_s)

    and the psi-sampler takes kappa of it and 1 - kappa of alpha_s q(z_0 | z_t, p) + (1 - alpha_s) uniform.

    Args:
        p_i: predicted probability of the present word, of any shape.
        alpha_t, alpha_s: with alpha_t <= alpha_s.
        vocab_size: words K.
        kappa: in [0, 1].
    """
    alpha_ts = alpha_t / alpha_s
    total = vocab_size * alpha_t * p_i + 1 - alpha_t
    stays = kappa * (vocab_size * alpha_t * p_i + alpha_ts - alpha_t)
    stays = (stays + (1 - kappa) * alpha_s * vocab_size * alpha_t * p_i) / total
    predicted = (kappa * (alpha_s - alpha_t) + (1 - kappa) * alpha_s * (1 - alpha_t)) / total
    uniform_weight = kappa * (1 - alpha_ts) * (1 - alpha_s) / total + (1 - kappa) * (1 - alpha_s)
    return stays, predicted, uniform_weight


def kappa_of(remasking: float, alpha_s: float) -> float:
    """kappa = clip(1 - sigma / (1 - alpha_s), 0, 1): with it, a psi-sampler of masks is ReMDM with sigma."""
    return min(max(1 - remasking / (1 - alpha_s), 0.0), 1.0)


# 4. Samplers


class DuoScheduler(TokenScheduler):
    r"""
    Duo's ancestral sampler. Times are even from 1 to 1e-5, and the last evaluation, there, draws the words themselves.
    So `num_inference_steps` cost one evaluation more. Samples are token ids (B, L).

    Args:
        temperature, top_p, keep_crossing: as for every sampler, see [`TokenScheduler`]; of the predicted words, before
            the posterior is made of them, as Duo's code has it since its second version.
        final (`str`, defaults to `"ancestral"`): how the last words are drawn; `"argmax"` takes the most likely
            prediction, which suits few steps (Duo's "greedy tail").
    """

    process = "uniform"

    @register_to_config
    def __init__(
        self, temperature: float = 1.0, top_p: float = 1.0, keep_crossing: bool = True, final: str = "ancestral"
    ):
        super().__init__(final=("ancestral", "argmax"))

    def alpha(self, time: float) -> float:
        """alpha_t"""
        return float(log_linear_alpha(torch.tensor(time, dtype=torch.float64)))

    def time_grid(self, num_steps: int) -> torch.Tensor:
        return linear_grid(num_steps)

    def kappa(self, index: int) -> float:
        """Share of the ancestral posterior in the step from `grid[index]`."""
        return 1.0

    def start(
        self, token_ids: torch.Tensor, vocab_size: int, generator: Any, embeddings: torch.Tensor
    ) -> torch.Tensor:
        return random_words_like(token_ids, vocab_size, row_generators(generator, len(token_ids)))

    def model_inputs(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> dict[str, torch.Tensor]:
        times = torch.as_tensor(timestep, dtype=torch.float64)
        return {"input_ids": sample, "timestep": -torch.log(log_linear_alpha(times))}

    def take_step(
        self, logits: torch.Tensor, index: int, sample: torch.Tensor, generators: Generators, **inputs: Any
    ) -> torch.Tensor:
        is_last = index == self.num_inference_steps
        if is_last and self.config.final == "argmax":
            return logits.argmax(-1)
        alpha_t = self.alpha(self.grid[index])
        alpha_s = 1.0 if is_last else self.alpha(self.grid[index + 1])
        kappa = 1.0 if is_last else self.kappa(index)
        uniforms = torch.stack([uniform_like(sample, generators) for _ in range(3)], dim=-1)  # (B, L, 3)
        slices = (x.flatten(0, 1).split(POSITIONS_AT_ONCE) for x in (logits, sample, uniforms))
        parts = [
            self.draw_transition(some, ids, numbers, alpha_t, alpha_s, kappa)
            for some, ids, numbers in zip(*slices, strict=True)
        ]
        return torch.cat(parts).view(sample.shape)

    def draw_transition(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        uniforms: torch.Tensor,
        alpha_t: float,
        alpha_s: float,
        kappa: float,
    ) -> torch.Tensor:
        """z_s of some positions (n,), by logits (n, K) and three numbers in [0, 1) each (n, 3): where from is drawn
        first, a word only where it is needed."""
        vocab_size = logits.shape[-1]
        probabilities = self.probabilities(logits)
        p_i = probabilities.gather(-1, ids[:, None])[:, 0].double()
        stays, predicted, _ = transition_weights(p_i, alpha_t, alpha_s, vocab_size, kappa)
        numbers, any_word, place = uniforms.unbind(-1)
        words = (any_word * vocab_size).long()
        from_prediction = (numbers >= stays) & (numbers < stays + predicted)
        words[from_prediction] = draw(probabilities[from_prediction], place[from_prediction])
        return torch.where(numbers < stays, ids, words)


class PsiScheduler(DuoScheduler):
    r"""
    Psi-samplers for Duo's weights: of each step, kappa is the ancestral posterior and the rest noises the predicted
    clean words anew, which keeps the marginals and lets later predictions correct earlier ones. kappa follows from a
    remasking probability, kappa = clip(1 - sigma / (1 - alpha_s), 0, 1):

        rescale      sigma = eta min(1, (1 - alpha_s) / alpha_t), or as their code has it, eta min(eta, ...)
        cap          sigma = min(eta, (1 - alpha_s) / alpha_t)
        loop         sigma = eta while the middle part of the steps stays at `loop_time`; ancestral before and after
        constant     `kappa` itself in the middle part; ancestral before and after

    Their settings on OpenWebText with 256 steps: rescale 0.05 and cap 0.01 with top-p 0.9, loop 0.01 with top-p 0.95.

    Args:
        mode (`str`, defaults to `"rescale"`): one of these.
        eta (`float`, defaults to 0.05): in [0, 1].
        kappa (`float`, defaults to 0.95): in [0, 1], of `"constant"`.
        rescale_as_coded (`bool`, defaults to `True`): see above; with eta = 0.05 and 256 steps a word is noised anew
            0.6 times in all as coded, and 9 times by the definition.
        loop_time, high_share, middle_share: time of the loop, and the shares of the steps before and in the middle
        part. temperature, top_p, keep_crossing, final: as of [`DuoScheduler`].
    """

    @register_to_config
    def __init__(
        self,
        mode: str = "rescale",
        eta: float = 0.05,
        kappa: float = 0.95,
        rescale_as_coded: bool = True,
        loop_time: float = 0.1,
        high_share: float = 0.45,
        middle_share: float = 0.5,
        temperature: float = 1.0,
        top_p: float = 0.9,
        keep_crossing: bool = True,
        final: str = "ancestral",
    ):
        TokenScheduler.__init__(
            self,
            mode=("rescale", "cap", "loop", "constant"),
            eta="[0, 1]",
            kappa="[0, 1]",
            loop_time="(0, 1)",
            high_share="[0, 1]",
            middle_share=f"[0, {1 - high_share}]",
            final=("ancestral", "argmax"),
        )

    def time_grid(self, num_steps: int) -> torch.Tensor:
        config = self.config
        if config.mode != "loop":
            return linear_grid(num_steps)
        return loop_grid(num_steps, config.loop_time, config.high_share, config.middle_share)

    def kappa(self, index: int) -> float:
        config, (t, s) = self.config, self.grid[index : index + 2]
        shares = config.high_share, config.middle_share
        if config.mode == "constant":
            first, count, _ = grid_parts(len(self.grid), *shares)
            return config.kappa if first <= index < first + count else 1.0
        alpha_t, alpha_s = self.alpha(t), self.alpha(s)
        bound = (1 - alpha_s) / alpha_t
        if config.mode == "loop":
            return kappa_of(config.eta, alpha_s) if is_loop_step(index, len(self.grid), *shares) else 1.0
        if config.mode == "cap":
            return kappa_of(min(config.eta, bound), alpha_s)
        return kappa_of(config.eta * min(config.eta if config.rescale_as_coded else 1.0, bound), alpha_s)


# 5. Training


@dataclass
class CurriculumSettings:
    """Duo's curriculum, of the first steps.

    Attributes:
        steps: how many; the run goes on with the plain loss.
        gamma_min, gamma_max: log of the variances of noise over signal at t = 0 and 1: -3.55 and -1.85 on OpenWebText,
            -3.5 and -1.75 on LM1B.
        temperature: of the softmax that the network reads; up to 0.002, where the largest entries have all its weight.
    """

    steps: int = 500_000
    gamma_min: float = -3.55
    gamma_max: float = -1.85
    temperature: float = 1e-3

    def __post_init__(self) -> None:
        ranges = {"steps": "[0, inf)", "temperature": "(0, 0.002]"}
        check_settings(type(self).__init__, vars(self), gamma_max=f"({self.gamma_min}, inf)", **ranges)


@dataclass
class DuoSettings(TokenDiffusionSettings):
    """Settings of `train_baseline.py duo`."""

    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)


class DuoObjective(TokenDiffusionObjective):
    """Duo's bound, of words that were replaced or, in the curriculum, are the argmax of Gaussian noise."""

    def __init__(self, transformer: TokenDiffusionTransformer, curriculum: CurriculumSettings):
        super().__init__(transformer)
        self.settings = curriculum

    def token_losses(
        self, input_ids: torch.Tensor, uniforms: torch.Tensor, generators: Generators, curriculum: bool = False
    ) -> torch.Tensor:
        times = training_times(uniforms)
        if curriculum:
            settings = self.settings
            gamma = log_noise_ratio(times, settings.gamma_min, settings.gamma_max)
            alpha, slope = argmax_alpha(gamma, self.vocab_size)
            slope = slope * (settings.gamma_max - settings.gamma_min)
            noisy_ids, ids, weights = gaussian_words(
                input_ids, gamma, self.vocab_size, settings.temperature, generators
            )
            words = self.transformer.embedding.weight
            embeds = F.embedding_bag(
                ids.flatten(0, 1), words, per_sample_weights=weights.flatten(0, 1).to(words.dtype), mode="sum"
            )
            inputs = {"inputs_embeds": embeds.view(*input_ids.shape, -1)}
        else:
            alpha = log_linear_alpha(times)
            slope = torch.full_like(alpha, ALPHA_END - 1)
            noisy_ids = replace_words(input_ids, alpha.to(input_ids.device), self.vocab_size, generators)
            inputs = {"input_ids": noisy_ids}
        alpha, slope = (value.to(input_ids.device)[:, None].expand(input_ids.shape) for value in (alpha, slope))
        logits = self.transformer(timestep=-torch.log(alpha[:, 0]), **inputs).logits
        return by_slices(uniform_loss, logits, noisy_ids, input_ids, alpha, slope)


class DuoRecipe(TokenDiffusionRecipe):
    """Training of Duo; psi-samplers sample from the same weights."""

    settings_class = DuoSettings
    settings: DuoSettings
    process = "uniform"

    def objective(self, transformer: TokenDiffusionTransformer) -> DuoObjective:
        return DuoObjective(transformer, self.settings.curriculum)

    def scheduler(self) -> DuoScheduler:
        return DuoScheduler()

    def phase(self, step: int) -> dict[str, bool]:
        return {"curriculum": step < self.settings.curriculum.steps}


# 6. Distillation into fewer steps


@dataclass
class DCDNoiseSettings:
    """What is distilled, and in which rounds.

    Attributes:
        round_steps: optimiser steps of a round, after which the student becomes the teacher, and steps are doubled.
        first_length: length of a step in the first round.
        gamma_min, gamma_max: as of the curriculum.
    """

    round_steps: int = 10_000
    first_length: float = 1 / 512
    gamma_min: float = -4.0
    gamma_max: float = -1.0

    def __post_init__(self) -> None:
        ranges = {"round_steps": "[1, inf)", "first_length": "(0, 1)", "gamma_max": f"({self.gamma_min}, inf)"}
        check_settings(type(self).__init__, vars(self), **ranges)

    def length(self, step: int) -> float:
        """Length of the steps that are distilled: 2^n / 512 in round n, at most 1."""
        return min(self.first_length * 2 ** (step // self.round_steps), 1.0)


@dataclass
class DCDSettings(TokenRunSettings):
    """Settings of `train_baseline.py duo_dcd`; Duo's had 50,000 steps of 128 texts.

    Attributes:
        components: folder or Hub id of the Duo pipeline that is distilled.
        noise: see there.
    """

    optimizer: OptimizerSettings = field(
        default_factory=lambda: replace(papers_optimizer(), learning_rate=6e-5, lr_warmup_steps=500, ema_decay=0.999)
    )
    loop: LoopSettings = field(
        default_factory=lambda: LoopSettings(
            output_dir="runs/duo-dcd", max_steps=50_000, batch_size=128, device_batch_size=128
        )
    )
    components: str = ""
    noise: DCDNoiseSettings = field(default_factory=DCDNoiseSettings)


class DCDObjective(DuoObjective):
    """Discrete consistency distillation: the student predicts from z_t what the teacher predicts from the cleaner z_s.

    Both are the argmax of the same Gaussian noise; the loss is KL(student(z_t, t) || teacher(z_s, s)) of each word.
    Without a length it is Duo's bound.
    """

    def __init__(
        self, transformer: TokenDiffusionTransformer, teacher: TokenDiffusionTransformer, noise: DCDNoiseSettings
    ):
        super().__init__(transformer, CurriculumSettings())
        self.teacher = teacher.requires_grad_(False)
        self.noise = noise

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Any]:
        return {**super().example_inputs(batch_size, sequence_length), "length": self.noise.first_length}

    def renew_teacher(self) -> None:
        """Makes the student the teacher."""
        self.teacher.load_state_dict(self.transformer.state_dict())

    def token_losses(
        self,
        input_ids: torch.Tensor,
        uniforms: torch.Tensor,
        generators: Generators,
        length: float | None = None,
    ) -> torch.Tensor:
        if length is None:
            return super().token_losses(input_ids, uniforms, generators)
        ends = (training_times(uniforms) + length).clamp(max=1)
        noise = self.noise
        later, earlier = (log_noise_ratio(t, noise.gamma_min, noise.gamma_max) for t in (ends, ends - length))
        right = torch.special.ndtri(uniform_like(input_ids, generators).clamp(min=2**-53))
        largest = largest_normals(input_ids, 1, self.vocab_size - 1, generators)[..., 0]
        others = distinct_others(input_ids, 1, self.vocab_size, generators)[..., 0]
        z_t, z_s = (argmax_words(input_ids, others, right, largest, gamma) for gamma in (later, earlier))
        c_t, c_s = (-torch.log(argmax_alpha(gamma, self.vocab_size)[0]) for gamma in (later, earlier))
        with torch.no_grad():
            taught = self.teacher(z_s, c_s).logits
        return by_slices(kl_divergence, self.transformer(z_t, c_t).logits, taught)


def kl_divergence(logits: torch.Tensor, other_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of distributions by their logits (n, K): (n,)."""
    log_p, log_q = logits.log_softmax(-1), other_logits.to(logits.dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class DCDRecipe(TokenRecipe):
    """Distillation of Duo in rounds, in each of which the teacher is what the student was after the last one."""

    settings_class = DCDSettings
    settings: DCDSettings
    module: DCDObjective

    def load(self) -> None:
        pipeline = load_teacher(self.settings.components, "uniform")
        self.tokenizer, self.sequence_length = pipeline.tokenizer, pipeline.sequence_length
        teacher = pipeline.transformer
        self.module = DCDObjective(copy.deepcopy(teacher).train(), teacher, self.settings.noise)

    def scheduler(self) -> DuoScheduler:
        return DuoScheduler(final="argmax")

    def losses(
        self,
        module: nn.Module,
        input_ids: torch.Tensor,
        step: int,
        randomness: RowRandomness,
        given: torch.Tensor | None = None,
    ) -> StepLosses:
        noise = self.settings.noise
        if step and step % noise.round_steps == 0:
            # of each pass of the step the same, since no weight changes between them
            self.module.renew_teacher()
        loss = module(input_ids, *draws(randomness, input_ids.device), length=noise.length(step)).total
        return StepLosses(total=loss, values={"distillation_loss": loss})

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.module.teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.module.teacher.load_state_dict(state_dict["teacher"])
