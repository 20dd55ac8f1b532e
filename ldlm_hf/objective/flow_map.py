"""Distillation of a trained denoiser into one that needs few steps, in the space of latents.

With rho = alpha / sigma the probability-flow ODE of the tangent process is d(z / sigma) = x0(z, t) d(rho). So a step
from time s to an earlier t, however long, is DDIM's with the mean of the clean predictions along the way:

    X_{s,t}(z)  = sigma_t / sigma_s z + sigma_t (rho_t - rho_s) D(z; s, t)
    D(z; s, t)  = 1 / (rho_t - rho_s)  integral of x0(z_r, r) d(rho_r) from s to t

D(z; s, s) is the denoiser itself. Two steps make one, X_{s,t} = X_{u,t} o X_{s,u}, which in terms of D is an average:

    D(z; s, t) = l D(z; s, u) + (1 - l) D(X_{s,u}(z); u, t),   l = (rho_u - rho_s) / (rho_t - rho_s)

A *flow map* learns D for every pair of times from this identity, with its own predictions on the right (the idea of
shortcut models, Frans et al., 2025, whose weights are those of the linear path, l = (s - u) / (s - t)). The identity
alone says little: a D that is one constant fulfils it. So the shortest steps have the teacher on the right, longer
ones follow from shorter ones, and D(z; s, s) is kept at the teacher's prediction. *Progressive* distillation (Salimans
and Ho, 2022) learns D between the neighbours of one grid, with the teacher on the right everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.guidance import guide
from ..models.latent_encoder import LDLMLatentEncoder
from ..models.token_encoder import LDLMTokenEncoder
from ..models.transformer_ldlm import LDLMTransformer1DModel
from ..schedulers.scheduling_tangent import TangentScheduler
from ..schedulers.scheduling_tangent_ddim import ddim_coefficients
from ..schedulers.tangent import signal_to_noise
from .base import Objective, without_autocast_cache
from .draws import Generators, normal_like


# what an example is trained towards: the teacher's prediction at its first time, which is D(z; s, s); two steps of the
# teacher's; two of the student's own
DIAGONAL, BY_TEACHER, BY_STUDENT = TARGETS = ("diagonal", "teacher", "student")

# (noisy latents (B, N, d_z), s of shape (B,), t of shape (B,)) → D(z; s, t)
TwoTimeDenoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def semigroup_weight(s: torch.Tensor, u: torch.Tensor, t: torch.Tensor, d: float) -> torch.Tensor:
    """l = (rho_u - rho_s) / (rho_t - rho_s) for times s > u > t, float64; 0 where t = 0."""
    start = signal_to_noise(s, d)
    return (signal_to_noise(u, d) - start) / (signal_to_noise(t, d) - start)


def flow_map_step(
    latents: torch.Tensor, clean: torch.Tensor, s: torch.Tensor, t: torch.Tensor, d: float
) -> torch.Tensor:
    """X_{s,t}(z) for the mean clean prediction D(z; s, t), both (B, N, d_z), at times (B,)."""
    sample_weight, clean_weight, _ = (weight.to(latents.dtype)[:, None, None] for weight in ddim_coefficients(s, t, d))
    return sample_weight * latents + clean_weight * clean


def semigroup_target(
    denoise: TwoTimeDenoiser, latents: torch.Tensor, s: torch.Tensor, u: torch.Tensor, t: torch.Tensor, d: float
) -> torch.Tensor:
    """What D(z; s, t) is by two steps, s → u → t (B, N, d_z)."""
    first = denoise(latents, s, u)
    second = denoise(flow_map_step(latents, first, s, u, d), u, t)
    weight = semigroup_weight(s, u, t, d).to(latents.dtype)[:, None, None]
    return torch.lerp(second, first, weight)


@dataclass
class DistillationLosses:
    """Mean squared errors of one batch, in units of the latents.

    Attributes:
        total: mean over all examples; the one to call `backward` on.
        semigroup: mean over the examples with two times.
        diagonal: mean over those with one, against the teacher; 0 where there are none.
    """

    total: torch.Tensor
    semigroup: torch.Tensor
    diagonal: torch.Tensor


class DistillationObjective(Objective):
    r"""
    Distils a teacher into a student on the latents of frozen encoders; no tensor of it has the vocabulary's size.

    The student sees no self-condition: in few steps there is hardly an earlier prediction to carry over. The teacher
    sees its own first estimate, as in its training, or is guided by it, and the student learns what it says then.

    Args:
        token_encoder: frozen.
        latent_encoder: frozen.
        transformer: the student, with latents as the teacher's; with `next_timestep_conditioning` it becomes a flow
            map, else a denoiser of one grid by progressive distillation.
        teacher: the trained denoiser; frozen.
        scheduler: the noise process.
        self_condition_scale: weight w of the teacher's self-condition, x^ = x^_0 + w (x^_sc - x^_0), where x^_0 is its
            first estimate and x^_sc what it predicts from that: the student learns w at no cost of its own. 0 leaves
            the second out, as for a teacher that was trained without a self-condition.
        guidance_rescale: how far its guided prediction keeps the standard deviation of x^_sc, see [`guide`].
    """

    # each batch is split at random into examples that the teacher leads and those that the student leads
    batch_sizes_vary = True

    def __init__(
        self,
        token_encoder: LDLMTokenEncoder,
        latent_encoder: LDLMLatentEncoder,
        transformer: LDLMTransformer1DModel,
        teacher: LDLMTransformer1DModel,
        scheduler: TangentScheduler,
        self_condition_scale: float = 1.0,
        guidance_rescale: float = 0.0,
    ):
        super().__init__()
        self.token_encoder = token_encoder.requires_grad_(False)
        self.latent_encoder = latent_encoder.requires_grad_(False)
        self.transformer = transformer
        self.teacher = teacher.requires_grad_(False)
        self.scheduler = scheduler
        self.self_condition_scale = self_condition_scale if teacher.config.self_conditioning else 0.0
        self.guidance_rescale = guidance_rescale
        self.is_flow_map = transformer.config.next_timestep_conditioning

    def student_denoiser(self, latents: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """D(z; s, t) of the student in float32; of a progressive one, which knows the grid, D(z; s)."""
        next_timestep = t.float() if self.is_flow_map else None
        return self.transformer(latents, s.float(), next_timestep=next_timestep).sample.float()

    def teacher_denoiser(self, latents: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The teacher's prediction at s in float32, wherever the step goes: DDIM."""
        estimate = self.teacher(latents, s.float()).sample
        if self.self_condition_scale == 0:
            return estimate.float()
        conditioned = self.teacher(latents, s.float(), estimate).sample
        return guide(estimate, conditioned, self.self_condition_scale, self.guidance_rescale)

    def example_inputs(self, batch_size: int, sequence_length: int) -> dict[str, Any]:
        """Arguments of `forward` for a batch of no particular text, to count what a pass costs.

        All examples take two steps; those of a flow map on the diagonal, and those that the teacher leads, cost as
        much or a little less.
        """
        target = BY_STUDENT if self.is_flow_map else BY_TEACHER
        return {
            "input_ids": torch.zeros(batch_size, sequence_length, dtype=torch.long),
            "times": torch.tensor([0.75, 0.5, 0.25]).repeat(batch_size, 1),
            "targets": [target] * batch_size,
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        times: torch.Tensor,
        targets: Sequence[str],
        generator: Generators = None,
    ) -> DistillationLosses:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): token ids.
            times (`torch.Tensor` of shape `(B, 3)`): s > u > t of each example, in [0, 1], s positive.
            targets (`Sequence[str]` of length `B`):
                What each example is trained towards, of `TARGETS`; for a progressive student `BY_TEACHER`. No tensor:
                what DDP moves to an accelerator cannot be looked at without waiting for it.
            generator: source of the noise; a list gives each example a stream of its own.
        """
        d = self.scheduler.config.tangent_d
        with torch.no_grad():
            hidden_states = self.token_encoder(input_ids, return_dict=True).hidden_states
            latents = self.latent_encoder(hidden_states, return_dict=True).latents.float()  # (B, N, d_z)
        times = times.double()
        s, u, t = times.unbind(-1)
        noisy_latents = self.scheduler.add_noise(latents, normal_like(latents, generator), s)

        rows = {}
        for kind in TARGETS:
            places = [place for place, target in enumerate(targets) if target == kind]
            rows[kind] = torch.tensor(places, dtype=torch.long).to(s.device, non_blocking=True)
        target = torch.empty_like(latents)
        denoisers = {BY_TEACHER: self.teacher_denoiser, BY_STUDENT: self.student_denoiser}
        with torch.no_grad(), without_autocast_cache(latents.device):
            for kind, some in rows.items():
                if len(some) == 0:
                    continue
                if kind == DIAGONAL:
                    target[some] = self.teacher_denoiser(noisy_latents[some], s[some], s[some])
                else:
                    target[some] = semigroup_target(denoisers[kind], noisy_latents[some], s[some], u[some], t[some], d)
        diagonal, pairs = rows[DIAGONAL], torch.cat([rows[BY_TEACHER], rows[BY_STUDENT]])
        end = t.index_copy(0, diagonal, s[diagonal])
        errors = (self.student_denoiser(noisy_latents, s, end) - target).square().flatten(1).mean(1)  # (B,)
        zero = errors.new_zeros(())
        return DistillationLosses(
            total=errors.mean(),
            semigroup=errors.detach()[pairs].mean() if len(pairs) else zero,
            diagonal=errors.detach()[diagonal].mean() if len(diagonal) else zero,
        )
