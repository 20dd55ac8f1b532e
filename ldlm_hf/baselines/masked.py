"""Masked diffusion: MDLM (Sahoo et al., 2024), and ReMDM's samplers (Wang et al., 2025) for the same weights.

Each word becomes a mask m with probability 1 - alpha_t. The network predicts the words p behind the masks, and is not
told the time.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from .categorical import Generators, cross_entropy, draw_words, uniform_like
from .noise_schedule import is_loop_step, linear_grid, log_linear_alpha, loop_grid, training_times
from .token_scheduler import TokenScheduler
from .token_training import TokenDiffusionObjective, TokenDiffusionRecipe
from .token_transformer import TokenDiffusionTransformer


# 1. The process, its loss and its transitions


def mask_words(token_ids: torch.Tensor, alpha: torch.Tensor, mask_id: int, generators: Generators) -> torch.Tensor:
    """z_t of clean ids (B, L) at alpha_t (B,): the mask with probability 1 - alpha_t."""
    is_masked = uniform_like(token_ids, generators) >= alpha[:, None]
    return token_ids.masked_fill(is_masked, mask_id)


def masked_loss(cross_entropies: torch.Tensor, is_masked: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The bound in nats of each word (B, L): -alpha'/(1 - alpha_t) (-log p_o) behind a mask and 0 elsewhere.

    On the log-linear schedule that weight is 1/t exactly, whatever alpha_1.

    Args:
        cross_entropies: -log p_o, (B, L).
        is_masked: bool (B, L).
        times: t in (0, 1], (B,).
    """
    weights = (1 / times)[:, None].to(cross_entropies.dtype)
    return torch.where(is_masked, weights * cross_entropies, 0)


def unmasking_probability(alpha_t: float, alpha_s: float, remasking: float | torch.Tensor) -> float | torch.Tensor:
    """That a mask becomes a word on the way from t to s: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).

    With the probability sigma that words become masks again, ReMDM's; with 0, MDLM's.
    """
    return (alpha_s - (1 - remasking) * alpha_t) / (1 - alpha_t)


def remasking_bound(alpha_t: float, alpha_s: float) -> float:
    """The largest sigma that keeps the marginals: min(1, (1 - alpha_s) / alpha_t)."""
    return min(1.0, (1 - alpha_s) / alpha_t) if alpha_t > 0 else 1.0


def confidence_shares(confidences: torch.Tensor) -> torch.Tensor:
    """softmax(-c) over the positions of each text (B, L), of the probabilities c that its words were drawn with; masks
    have c = inf and no share. Zero in a text of masks alone."""
    return (-confidences).softmax(-1).nan_to_num(0.0)


# 2. Samplers


class MDLMScheduler(TokenScheduler):
    r"""
    MDLM's ancestral sampler. Times are even from 1 to 1e-5. In each step a mask becomes a word with probability
    (t - s) / t, and words stay; the last evaluation, at 1e-5, fills in what is still masked. So `num_inference_steps`
    cost one evaluation more.

    Which masks become words is drawn first and a word only for those, which has the same law as a draw from all K + 1
    and needs no array of its probabilities. Samples are token ids (B, L), in which the mask's is K.

    Args:
        temperature, top_p, keep_crossing: as for every sampler, see [`TokenScheduler`]. MDLM's code has no top-p.
        final (`str`, defaults to `"argmax"`): what remains at the end becomes the most likely word, or a drawn one
            with `"ancestral"`.
    """

    process = "masked"
    takes_given = True

    @register_to_config
    def __init__(
        self, temperature: float = 1.0, top_p: float = 1.0, keep_crossing: bool = True, final: str = "argmax"
    ):
        super().__init__(final=("argmax", "ancestral"))

    def alpha(self, time: float) -> float:
        """alpha_t"""
        return float(log_linear_alpha(torch.tensor(time, dtype=torch.float64)))

    def time_grid(self, num_steps: int) -> torch.Tensor:
        return linear_grid(num_steps)

    def start(
        self, token_ids: torch.Tensor, vocab_size: int, generator: Any, embeddings: torch.Tensor
    ) -> torch.Tensor:
        return torch.full_like(token_ids, vocab_size)

    def give(self, sample: torch.Tensor, token_ids: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return torch.where(given, token_ids, sample)

    def model_inputs(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": sample}

    def remasking(self, index: int) -> float | torch.Tensor:
        """sigma of the step from `grid[index]`, or one for each position (B, L)."""
        return 0.0

    def take_step(
        self, logits: torch.Tensor, index: int, sample: torch.Tensor, generators: Generators, **inputs: Any
    ) -> torch.Tensor:
        is_masked = sample == logits.shape[-1]
        if index == self.num_inference_steps:
            return torch.where(is_masked, self.last_words(logits, is_masked, generators), sample)
        alpha_t, alpha_s = self.alpha(self.grid[index]), self.alpha(self.grid[index + 1])
        remasking = self.remasking(index)
        unmasking = unmasking_probability(alpha_t, alpha_s, remasking)
        uniforms = uniform_like(sample, generators)
        becomes_word = is_masked & (uniforms < unmasking)
        words = draw_words(logits, becomes_word, self.probabilities, generators)
        becomes_mask = ~is_masked & (uniforms < remasking)
        return torch.where(becomes_word, words, sample.masked_fill(becomes_mask, logits.shape[-1]))

    def last_words(self, logits: torch.Tensor, is_masked: torch.Tensor, generators: Generators) -> torch.Tensor:
        """Words for what is masked at the end of the grid."""
        if self.config.final == "argmax":
            return logits.argmax(-1)
        return draw_words(logits, is_masked, self.probabilities, generators)


class ReMDMScheduler(MDLMScheduler):
    r"""
    ReMDM's samplers: words that are there become masks again with probability sigma in each step, so that later,
    better informed predictions replace them.

        rescale      sigma = eta min(1, (1 - alpha_s) / alpha_t)
        cap          sigma = min(eta, (1 - alpha_s) / alpha_t)
        loop         MDLM down to `loop_time`; there, in the middle part of the steps, words are masked with the capped
                     sigma and written anew; MDLM for the rest
        confidence   the largest sigma, shared out by softmax(-c) over the words of a text, c being the probability
                     that a word was drawn with (after the paper's text; not compared with its code)

    Their published settings on OpenWebText are eta = 0.015 (rescale), 0.008 (cap) and 0.02 (loop), with top-p 0.9.
    With eta = 0 it is MDLM.

    Args:
        strategy (`str`, defaults to `"rescale"`): one of these.
        eta (`float`, defaults to 0.015): in [0, 1]; without effect on `"confidence"`.
        loop_time, high_share, middle_share: time of the loop, and the shares of the steps before and in it.
        alpha_end (`float`, defaults to 0.0): alpha at t = 1; 0 as their sampler has it, though MDLM is trained with
            1e-3.
        temperature, top_p, keep_crossing: as for every sampler; by default their nucleus of 0.9, without the word that
            crosses it.
        final: as of [`MDLMScheduler`].
    """

    @register_to_config
    def __init__(
        self,
        strategy: str = "rescale",
        eta: float = 0.015,
        loop_time: float = 0.1,
        high_share: float = 0.45,
        middle_share: float = 0.5,
        alpha_end: float = 0.0,
        temperature: float = 1.0,
        top_p: float = 0.9,
        keep_crossing: bool = False,
        final: str = "argmax",
    ):
        TokenScheduler.__init__(
            self,
            final=("argmax", "ancestral"),
            strategy=("rescale", "cap", "loop", "confidence"),
            eta="[0, 1]",
            loop_time="(0, 1)",
            high_share="[0, 1]",
            middle_share=f"[0, {1 - high_share}]",
            alpha_end="[0, 1)",
        )
        self.confidences: torch.Tensor | None = None

    def alpha(self, time: float) -> float:
        return float(log_linear_alpha(torch.tensor(time, dtype=torch.float64), self.config.alpha_end))

    def time_grid(self, num_steps: int) -> torch.Tensor:
        config = self.config
        if config.strategy != "loop":
            return linear_grid(num_steps)
        return loop_grid(num_steps, config.loop_time, config.high_share, config.middle_share)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.confidences = None

    def remasking(self, index: int) -> float | torch.Tensor:
        config = self.config
        bound = remasking_bound(*(self.alpha(time) for time in self.grid[index : index + 2]))
        if config.strategy == "rescale":
            return config.eta * bound
        if config.strategy == "confidence":
            assert self.confidences is not None
            return bound * confidence_shares(self.confidences)
        in_loop = is_loop_step(index, len(self.grid), config.high_share, config.middle_share)
        return min(config.eta, bound) if config.strategy == "cap" or in_loop else 0.0

    def take_step(
        self, logits: torch.Tensor, index: int, sample: torch.Tensor, generators: Generators, **inputs: Any
    ) -> torch.Tensor:
        if self.config.strategy != "confidence":
            return super().take_step(logits, index, sample, generators)
        if self.confidences is None:
            # words that were given before the first step stay
            self.confidences = torch.full_like(sample, torch.inf, dtype=torch.float64)
        stepped = super().take_step(logits, index, sample, generators)
        is_mask = stepped == logits.shape[-1]
        drawn = (stepped != sample) & ~is_mask
        self.confidences = self.confidences.masked_fill(is_mask, torch.inf)
        self.confidences[drawn] = (-cross_entropy(logits[drawn][None], stepped[drawn][None]))[0].exp().double()
        return stepped


# 3. Training


class MDLMObjective(TokenDiffusionObjective):
    """MDLM's bound."""

    def token_losses(self, input_ids: torch.Tensor, uniforms: torch.Tensor, generators: Generators) -> torch.Tensor:
        times = training_times(uniforms).to(input_ids.device)
        noisy_ids = mask_words(input_ids, log_linear_alpha(times), self.vocab_size, generators)
        logits = self.transformer(noisy_ids).logits
        return masked_loss(cross_entropy(logits, input_ids), noisy_ids == self.vocab_size, times)


class MDLMRecipe(TokenDiffusionRecipe):
    """Training of MDLM; ReMDM samples from the same weights."""

    process = "masked"

    def objective(self, transformer: TokenDiffusionTransformer) -> MDLMObjective:
        return MDLMObjective(transformer)

    def scheduler(self) -> MDLMScheduler:
        return MDLMScheduler()
