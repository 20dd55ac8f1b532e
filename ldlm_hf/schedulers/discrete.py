"""diffusers' own schedulers on the tangent schedule, and the times that they evaluate the model at.

They count K discrete noise levels where the tangent schedule has continuous time. Level k stands for the middle of the
k-th of K equal parts, t_k = (k + 1/2) / K, so that no level is free of noise or nothing else, where their formulas
divide by zero.

    pipe.scheduler = UniPCMultistepScheduler.from_config(diffusers_config(pipe.scheduler))
    pipe.scheduler = TangentDDIMScheduler.from_config(pipe.scheduler.config)   # and back
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_tangent import TangentScheduler
from .tangent import alpha_sigma


def level_times(levels: torch.Tensor, num_levels: int) -> torch.Tensor:
    """t_k = (k + 1/2) / K in float64, for levels k of K, whole or not."""
    return (levels.double() + 0.5) / num_levels


def diffusers_config(scheduler: TangentScheduler, num_train_timesteps: int = 1000, **changes: Any) -> dict[str, Any]:
    """The configuration that makes a scheduler of diffusers one of the tangent schedule.

    For schedulers of variance-preserving processes that take `trained_betas` and can predict the clean sample:
    `DDIMScheduler`, `DPMSolverMultistepScheduler` and `UniPCMultistepScheduler`. They start from the highest level
    (`timestep_spacing="trailing"`) and end at the clean latents rather than at `t_min`. Give the result to their
    `from_config`.

    Args:
        scheduler: one of the tangent schedule. Its own settings are kept, for the way back.
        num_train_timesteps: discrete levels K.
        changes: further settings of the new scheduler, such as `solver_order=3`.

    Raises:
        ValueError: a scheduler of another schedule.
    """
    config = scheduler.config
    if "tangent_d" not in config or is_discrete(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} is no scheduler of the tangent schedule; give one of ldlm_hf, such as "
            "TangentDDIMScheduler."
        )
    own_settings = inspect.signature(type(scheduler).__init__).parameters.keys() - {"self"}
    return {
        # diffusers leaves out, without a warning, what only this class knows
        "_class_name": type(scheduler).__name__,
        **{key: config[key] for key in own_settings},
        "num_train_timesteps": num_train_timesteps,
        "trained_betas": level_betas(num_train_timesteps, config.tangent_d).tolist(),
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
        # latents have no range that they could be clipped to
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
        "final_sigmas_type": "zero",
        **changes,
    }


def level_betas(num_levels: int, d: float) -> torch.Tensor:
    """beta_k = 1 - alpha(t_k)^2 / alpha(t_{k-1})^2 of K levels, with alpha 1 before the first; float64."""
    alpha, _ = alpha_sigma(level_times(torch.arange(num_levels), num_levels), d)
    squares = torch.cat([torch.ones(1, dtype=torch.float64), alpha.square()])
    return 1 - squares[1:] / squares[:-1]


def check_schedule(scheduler: SchedulerMixin) -> None:
    """Raises ValueError unless a scheduler is one of the tangent schedule, for predictions of the clean latents."""
    name, config = type(scheduler).__name__, scheduler.config
    remedy = (
        f"Use {name}.from_config(ldlm_hf.diffusers_config(scheduler)) with the pipeline's own scheduler, or a "
        "scheduler of ldlm_hf."
    )
    if "tangent_d" not in config:
        raise ValueError(f"{name} belongs to another noise schedule than the model: it has no tangent_d. {remedy}")
    if not is_discrete(scheduler):
        return
    levels = len(scheduler.alphas_cumprod)
    alpha, _ = alpha_sigma(level_times(torch.arange(levels), levels), config.tangent_d)
    found = scheduler.alphas_cumprod.double().cpu().sqrt()
    if config.prediction_type != "sample" or not torch.allclose(found, alpha, rtol=1e-2, atol=1e-5):
        raise ValueError(
            f"{name} has other noise levels than the tangent schedule with its tangent_d, or its prediction_type="
            f"{config.prediction_type!r} is not 'sample'. {remedy}"
        )


def is_discrete(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler counts noise levels, as diffusers' own do, where those of this package have times."""
    return hasattr(scheduler, "alphas_cumprod")


def model_times(scheduler: SchedulerMixin) -> torch.Tensor:
    """The times in [0, 1] at which a scheduler evaluates the model, of shape `(num_inference_steps,)`, float32."""
    if is_discrete(scheduler):
        return level_times(scheduler.timesteps, len(scheduler.alphas_cumprod)).float()
    return scheduler.timesteps


class Solver:
    """A scheduler at the beginning of its grid, be it one of this package or one of diffusers'.

    Args:
        scheduler: with its timesteps set; the steps are its own.

    Attributes:
        timesteps: what the scheduler calls its steps by, of shape (S,).
        times: the times in [0, 1] at which the model is evaluated, of shape (S,), float32.
        next_times: where each step lands, of the same shape, for a flow map; None for a denoiser of one time.
    """

    def __init__(self, scheduler: SchedulerMixin):
        if hasattr(scheduler, "set_begin_index"):
            # or else the scheduler reads the first time back from the device to look it up
            scheduler.set_begin_index(0)
        self.scheduler = scheduler
        self.timesteps = scheduler.timesteps
        self.times = model_times(scheduler)
        self.next_times: torch.Tensor | None = getattr(scheduler, "next_timesteps", None)
        # deterministic solvers of diffusers have no noise to draw
        self.draws_noise = "generator" in inspect.signature(scheduler.step).parameters

    def model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the model sees of the latents at a step, as the scheduler scales it."""
        return self.scheduler.scale_model_input(latents, timestep)

    def step(
        self,
        clean_latents: torch.Tensor,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The latents (B, N, d_z) of the next, earlier time, by the prediction for this one."""
        arguments = {"generator": generator} if self.draws_noise else {}
        return self.scheduler.step(clean_latents, timestep, latents, **arguments).prev_sample

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with some rows of the batch, in any order and number; for schedulers of this package."""
        self.scheduler.select(rows)
