"""Steering by a reward r, without training: towards p(z) exp(lambda r(z)), with p what the pipeline writes.

By particles, for any reward of what is decoded, or by the gradient of a reward of clean latents. Both act within a
step, between the prediction x^ and the way to the next time.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

from ..schedulers.discrete import Solver
from ..schedulers.tangent import alpha_sigma


# one number for each text, the more the better
Rewards: TypeAlias = Sequence[float] | torch.Tensor


class Steering(Protocol):
    """What may change a step."""

    def __call__(
        self, solver: Solver, i: int, latents: torch.Tensor, clean_latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noisy latents (B, N, d_z) of step i and their prediction, from which the solver goes on."""


def one_reward(**rewards: Callable[[Any], Any] | None) -> tuple[str, Callable[[Any], Any]]:
    """Name and function of the only reward that is given; ValueError where there are none or several."""
    given = [(name, function) for name, function in rewards.items() if function is not None]
    if len(given) != 1:
        found = " and ".join(name for name, _ in given) or "none"
        raise ValueError(f"steer takes exactly one of {', '.join(rewards)}, got {found}.")
    name, function = given[0]
    if not callable(function):
        raise ValueError(f"`{name}` must be a function that returns a number for each text, got {function!r}.")
    return name, function


def check_rewards(name: str, rewards: Rewards, count: int) -> torch.Tensor:
    """Rewards as a tensor (B,), a sequence's in float64; ValueError unless each of B texts has a finite one."""
    try:
        found = rewards if isinstance(rewards, torch.Tensor) else torch.as_tensor(rewards, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`{name}` must return a number for each text, in a list or a tensor, got {reprlib.repr(rewards)}."
        ) from error
    if found.shape != (count,):
        raise ValueError(
            f"`{name}` must return {count} numbers, one for each text, got the shape {tuple(found.shape)}."
        )
    if not torch.isfinite(found).all():
        raise ValueError(
            f"`{name}` returned {reprlib.repr(found.tolist())}: rewards must be finite. Let a large negative number "
            "stand for what is ruled out."
        )
    return found


# --- particles


def effective_sample_size(weights: torch.Tensor) -> float:
    """1 / sum_m w_m^2, for weights (M,) that sum to 1: M where all are equal, 1 where one has all."""
    return 1 / float(weights.square().sum())


def systematic_resampling(weights: torch.Tensor, uniform: float, count: int) -> torch.Tensor:
    """Indices (count,) of the particles that are kept: those whose share of [0, 1) holds (m + u) / count.

    Each is kept `count` times its weight times on average, rounded up or down.

    Args:
        weights: (M,), which sum to 1.
        uniform: u, drawn evenly from [0, 1).
        count: how many are kept.
    """
    positions = (torch.arange(count, dtype=weights.dtype) + uniform) / count
    # the last share ends at 1, whatever rounding made of it
    return torch.searchsorted(weights.cumsum(0)[:-1].contiguous(), positions, right=True)


def check_draws_noise(solver: Solver) -> None:
    """Raises ValueError for a solver whose steps add no noise, as copies of a particle would stay alike."""
    steps = getattr(solver.scheduler, "step_weights", [])
    if not any(step.noise for step in steps[:-1]):
        raise ValueError(
            f"{type(solver.scheduler).__name__} adds no noise in {len(solver.times)} steps, without which the "
            "particles of a reward stay alike. Take 2 steps or more of a stochastic scheduler of ldlm_hf: "
            "pipe.scheduler = TangentDDIMScheduler.from_config(pipe.scheduler.config, eta=1.0)."
        )


class Particles:
    """Sequential Monte Carlo (Feynman-Kac steering, Singhal et al., arXiv 2501.06848, with the difference potential).

    Each text has M particles, rows of the batch one behind the other. A reward multiplies their weights by
    exp(lambda (r - r')), r' being the reward before and at first 0, so that over all steps their product is
    exp(lambda r) of the last prediction. Where the effective sample size of a text's particles falls below M / 2, they
    are resampled.

    Args:
        reward: clean latents (B M, N, d_z) → rewards (B M,).
        num_texts: B.
        num_particles: M.
        scale: lambda.
        every: steps from one reward to the next.
        generator: source of the draws, one for all texts or a list of one for each.
    """

    def __init__(
        self,
        reward: Callable[[torch.Tensor], torch.Tensor],
        num_texts: int,
        num_particles: int,
        scale: float,
        every: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        self.reward, self.scale, self.every = reward, scale, every
        self.generators = generator if isinstance(generator, list) else [generator] * num_texts
        self.log_weights = torch.zeros(num_texts, num_particles, dtype=torch.float64)
        self.rewards = torch.zeros_like(self.log_weights)

    def __call__(
        self, solver: Solver, i: int, latents: torch.Tensor, clean_latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # the last prediction is weighed by `draw`
        if (i + 1) % self.every or i + 1 == len(solver.times):
            return latents, clean_latents
        self.weigh(clean_latents)
        rows = self.resample().to(latents.device)
        solver.select(rows)
        return latents[rows], clean_latents[rows]

    def weigh(self, clean_latents: torch.Tensor) -> None:
        """log w += lambda (r - r')"""
        rewards = self.reward(clean_latents).detach().cpu().double().view_as(self.rewards)
        self.log_weights += self.scale * (rewards - self.rewards)
        self.rewards = rewards

    def resample(self) -> torch.Tensor:
        """Rows (B M,) that particles go on from."""
        num_texts, num_particles = self.log_weights.shape
        kept = torch.arange(num_particles).repeat(num_texts, 1)
        for text, weights in enumerate(self.log_weights.softmax(-1)):
            if effective_sample_size(weights) < num_particles / 2:
                kept[text] = systematic_resampling(weights, self._uniform(text), num_particles)
                self.log_weights[text] = 0
        self.rewards = self.rewards.gather(1, kept)
        return self._rows(kept)

    def draw(self, clean_latents: torch.Tensor) -> torch.Tensor:
        """Of the last predictions (B M, N, d_z) one for each text, by its weight: (B, N, d_z)."""
        self.weigh(clean_latents)
        weights = self.log_weights.softmax(-1)
        drawn = [systematic_resampling(one, self._uniform(text), 1) for text, one in enumerate(weights)]
        return clean_latents[self._rows(torch.stack(drawn)).to(clean_latents.device)]

    def _rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Rows of the batch, by indices (B, ...) of each text's particles."""
        num_texts, num_particles = self.log_weights.shape
        return (indices + num_particles * torch.arange(num_texts)[:, None]).flatten()

    def _uniform(self, text: int) -> float:
        generator = self.generators[text]
        device = "cpu" if generator is None else generator.device
        return float(torch.rand((), generator=generator, device=device, dtype=torch.float64))


# --- gradients


def reward_gradient(reward: Callable[[torch.Tensor], torch.Tensor], clean_latents: torch.Tensor) -> torch.Tensor:
    """grad r (B, N, d_z) at clean latents, float32.

    Raises:
        ValueError: rewards that are no tensor (B,) computed from the latents, or have no finite gradient.
    """
    with torch.enable_grad():
        latents = clean_latents.detach().float().requires_grad_()
        rewards = check_rewards("latent_reward", reward(latents), len(latents))
        if not rewards.requires_grad:
            raise ValueError("`latent_reward` has no gradient: compute it from the latents in torch, without detach.")
        (gradient,) = torch.autograd.grad(rewards.sum(), latents)
    if not torch.isfinite(gradient).all():
        raise ValueError("The gradient of `latent_reward` is not finite; give it one everywhere.")
    return gradient


def steered_prediction(
    clean_latents: torch.Tensor, gradient: torch.Tensor, sigma: float, scale: float
) -> torch.Tensor:
    """x^ + lambda sigma^2 grad r(x^)

    Guidance moves the score s by lambda grad_z r(x^(z)), and by Tweedie's formula x^ = (z + sigma^2 s) / alpha the
    prediction by

        lambda sigma^2 / alpha grad_z r(x^(z)) = lambda sigma^2 / alpha J^T grad r(x^),  J = dx^ / dz

    where sigma^2 / alpha J is the covariance of z_0 given z. For independent latents of variance 1 that is sigma^2,
    which takes its place: without a way back through the denoiser, and without 1 / alpha, which is infinite at t = 1.
    Exact for such Gaussian latents and a linear r. A variance v < 1 has v sigma^2 / (v alpha^2 + sigma^2), which is
    less, down to v where there is nothing but noise.
    """
    return clean_latents.float() + scale * sigma**2 * gradient


class LatentGradient:
    """Moves each prediction along the gradient of a reward of clean latents.

    Args:
        reward: clean latents (B, N, d_z), float32 → rewards (B,).
        scale: lambda.
        given: bool (B, N), latents that are given and stay.
    """

    def __init__(
        self, reward: Callable[[torch.Tensor], torch.Tensor], scale: float, given: torch.Tensor | None = None
    ):
        self.reward, self.scale, self.given = reward, scale, given

    def __call__(
        self, solver: Solver, i: int, latents: torch.Tensor, clean_latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = reward_gradient(self.reward, clean_latents)
        if self.given is not None:
            gradient = gradient.masked_fill(self.given.to(gradient.device)[..., None], 0)
        _, sigma = alpha_sigma(solver.times[i].cpu(), solver.scheduler.config.tangent_d)
        return latents, steered_prediction(clean_latents, gradient, float(sigma), self.scale)
