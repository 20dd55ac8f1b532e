"""The denoising loop: noise to clean latents, guided by the self-condition and by what is given."""

from __future__ import annotations

import copy
import math
import numbers
import reprlib
import threading
from collections.abc import Iterator

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..models.guidance import guide
from ..schedulers.discrete import Solver, check_schedule, is_discrete
from ..schedulers.tangent import alpha_sigma
from .calls import CallState
from .sampling import DenoisingStep, Sampling, check_counts, check_number
from .steering import Steering
from .text_latents import TextLatentPipeline


# one for all pipelines, since several may share a scheduler, as those do that `from_pipe` makes
SCHEDULER_LOCK = threading.Lock()


class LatentDenoisingPipeline(TextLatentPipeline):
    """The denoiser, its scheduler, and the loop that they take turns in."""

    _callback_tensor_inputs = ["latents", "clean_latents"]

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the running or last call."""
        return self._calls.current.num_timesteps

    @property
    def num_function_evaluations(self) -> int:
        """How often the transformer has seen each sample in the running or last call (NFE)."""
        return self._calls.current.num_function_evaluations

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback asks for that with `pipeline._interrupt = True`."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return self._calls.current.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._calls.current.interrupt = value

    def check_inputs(self, batch_size: int, sampling: Sampling, latents: torch.Tensor | None = None) -> None:
        """Raises ValueError, naming argument, value and remedy, for everything that generation cannot work with."""
        check_counts(batch_size=batch_size, num_inference_steps=sampling.num_inference_steps)
        self.check_guidance(sampling.self_condition_scale, sampling.self_condition_decay, sampling.guidance_rescale)
        check_number("guidance_scale", sampling.guidance_scale or 0.0)
        interval = sampling.guidance_interval
        is_list = isinstance(interval, (list, tuple)) and len(interval) == 2
        is_pair = is_list and all(isinstance(time, numbers.Real) for time in interval)
        if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"`guidance_interval` must be two times in [0, 1], the lower one first, got {interval}.")
        generator = sampling.generator
        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but `batch_size` is {batch_size}; give one generator, or "
                "one for each sample."
            )
        if latents is not None:
            if not isinstance(latents, torch.Tensor):
                raise ValueError(f"`latents` must be a tensor of noise, got {reprlib.repr(latents)}.")
            expected = (batch_size, self.transformer.config.sample_size, self.transformer.config.in_channels)
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` of shape {tuple(latents.shape)} must have the shape (batch_size, sample_size, "
                    f"in_channels) = {expected}."
                )
            if not latents.is_floating_point():
                raise ValueError(f"`latents` must be floating-point noise, got {latents.dtype}.")
        unknown = [name for name in sampling.callback_tensors if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found "
                f"{unknown}."
            )

    def set_guidance(
        self,
        self_condition_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """Makes guidance that of calls without any, which is saved with the pipeline; what is None stays as it was.

        Raises:
            ValueError: some that the denoiser cannot be given.
        """
        if self.transformer is not None:
            self.check_guidance(self_condition_scale, rescale=guidance_rescale)
        own = self.config
        self._register_guidance(
            own.self_condition_scale if self_condition_scale is None else self_condition_scale,
            own.guidance_rescale if guidance_rescale is None else guidance_rescale,
            own.guidance_scale if guidance_scale is None else guidance_scale,
        )

    def _register_guidance(
        self, self_condition_scale: float | None, guidance_rescale: float | None, guidance_scale: float | None
    ) -> None:
        check_number("self_condition_scale", self_condition_scale or 0.0)
        check_number("guidance_rescale", guidance_rescale or 0.0, highest=1)
        check_number("guidance_scale", guidance_scale or 0.0)
        values = {
            "self_condition_scale": self_condition_scale,
            "guidance_rescale": guidance_rescale,
            "guidance_scale": guidance_scale,
        }
        self.register_to_config(**{name: None if value is None else float(value) for name, value in values.items()})

    def check_guidance(self, scale: float | None, decay: float = 0.0, rescale: float | None = None) -> None:
        """Raises ValueError for guidance by the self-condition that the denoiser cannot be given."""
        check_number("self_condition_scale", scale or 0.0)
        check_number("self_condition_decay", decay)
        check_number("guidance_rescale", rescale or 0.0, highest=1)
        if scale and not self.transformer.config.self_conditioning:
            raise ValueError(
                f"`self_condition_scale`={scale}: this transformer was trained without a self-condition; leave it out."
            )

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise of shape (B, N, d_z) to start from, or the given one; float32 whatever the models' type."""
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        shape = (batch_size, self.transformer.config.sample_size, self.transformer.config.in_channels)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return noise * self.scheduler.init_noise_sigma

    def prepare_solver(self, num_inference_steps: int, timesteps: list[float] | None, device: torch.device) -> Solver:
        """A copy of the scheduler at the beginning of a call's grid, for this call's steps alone.

        The pipeline's own scheduler is given the grid too, for those who read its timesteps, but takes no step.

        Raises:
            ValueError: a scheduler of another noise schedule, explicit times for one that has none, or a flow map's
                scheduler for a transformer that is no flow map.
        """
        name = type(self.scheduler).__name__
        check_schedule(self.scheduler)
        if timesteps is not None and is_discrete(self.scheduler):
            raise ValueError(
                f"`timesteps` are times in [0, 1], but {name} counts discrete levels; leave them out, or use a "
                "scheduler of the tangent schedule."
            )
        with SCHEDULER_LOCK:
            if timesteps is None:
                self.scheduler.set_timesteps(num_inference_steps, device=device)
            else:
                self.scheduler.set_timesteps(timesteps=timesteps, device=device)
            solver = Solver(copy.deepcopy(self.scheduler))
        if solver.next_times is not None and not self.transformer.config.next_timestep_conditioning:
            raise ValueError(
                f"{name} takes steps of a flow map, which this transformer is not (next_timestep_conditioning=False). "
                "Distil it by training/distill.py, or use another scheduler."
            )
        return solver

    def scale_or_own(self, self_condition_scale: float | None) -> float:
        """The scale of a call, or where it names none the pipeline's own, or 1, or 0 for a model trained without a
        self-condition: one that has taken the place of the denoiser that the pipeline's own is for, perhaps."""
        if self_condition_scale is not None:
            return self_condition_scale
        if not self.transformer.config.self_conditioning:
            return 0.0
        own = self.config.self_condition_scale
        return 1.0 if own is None else own

    def self_condition_weights(self, times: torch.Tensor, scale: float | None, decay: float) -> list[float]:
        """Weights w of the self-condition, one a step: w = 1 + (scale - 1) exp(-decay sigma / alpha).

        With a decay the weight is 1, plain carry-over, where there is mostly noise, and goes to `scale` as it clears.
        The first step's is 1: it has no prediction to be conditioned on.

        Args:
            times: those of the steps, in [0, 1].
            scale: w without noise; None as for [`~LDLMPipeline.scale_or_own`].
            decay: how fast w - 1 falls as the noise level sigma / alpha grows.
        """
        scale = self.scale_or_own(scale)
        if decay == 0 or scale == 1:
            weights = [float(scale)] * len(times)
        else:
            alpha, sigma = alpha_sigma(times.cpu(), self.scheduler.config.tangent_d)
            weights = [1 + (scale - 1) * math.exp(-decay * level) for level in (sigma / alpha).tolist()]
        return [1.0, *weights[1:]]

    def denoising_steps(self, solver: Solver, sampling: Sampling) -> Iterator[DenoisingStep]:
        """The steps of a grid; a `guidance_rescale` of None is the pipeline's own, or 0."""
        rescale = sampling.guidance_rescale
        if rescale is None:
            rescale = self.config.guidance_rescale or 0.0
        weights = self.self_condition_weights(
            solver.times, sampling.self_condition_scale, sampling.self_condition_decay
        )
        scales = [1.0] * len(solver.times)
        if sampling.guidance_scale not in (None, 1):
            first, last = sampling.guidance_interval
            scales = [sampling.guidance_scale if first <= t <= last else 1.0 for t in solver.times.cpu().tolist()]
        guidance = None
        if self.transformer.config.guidance_embeds:
            # the transformer has learned what guidance gives, and is told how much of it
            guidance = torch.tensor([weight or 1.0 for weight in weights], device=solver.times.device)
            weights = [float(bool(weight)) for weight in weights]
        modulations = self.transformer.modulations(solver.times, solver.next_times, guidance)
        for i, (weight, modulation) in enumerate(zip(weights, modulations, strict=True)):
            conditions = {"modulation": modulation}
            if solver.next_times is not None:
                conditions["next_timestep"] = solver.next_times[i]
            if guidance is not None:
                conditions["guidance"] = guidance[i]
            yield DenoisingStep(solver.timesteps[i], solver.times[i], weight, scales[i], rescale, conditions)

    def predict(
        self,
        latents: torch.Tensor,
        step: DenoisingStep,
        self_condition: torch.Tensor,
        given: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The denoiser's prediction (B, N, d_z), guided by its self-condition and by what is given:

            x^ = x^_0 + w (x^_sc - x^_0) + (v - 1) (x^_sc - x^_null)

        x^_sc is the prediction from the self-condition, x^_0 that without one, and x^_null that without what is given.
        For w = 1 and w = 0, and for v = 1, one of each two is all that counts, and the transformer is not asked for
        the other.

        Args:
            latents: noisy latents (B, N, d_z).
            step: their time, w, v, and what else the transformer is told.
            self_condition: the last prediction (B, N, d_z).
            given: what is given, as [`Conditions.of_denoiser`] says it.
        """
        given = given or {}
        latents, self_condition = latents.to(self.transformer.dtype), self_condition.to(self.transformer.dtype)
        nothing = torch.zeros_like(self_condition)
        condition = nothing if step.self_condition_weight == 0 else self_condition
        if step.num_function_evaluations == 1:
            with self.transformer.caching(1):
                return self.transformer(latents, step.time, condition, **step.conditions, **given).sample
        # the predictions that are asked for, each by its self-condition and by what it is told of given latents
        asked = [(condition, given)]
        if step.self_condition_weight not in (0, 1):
            asked.insert(0, (nothing, given))
        if step.guidance_scale != 1:
            asked.append((condition, given | {"given_latents": nothing}))
        told = {name: torch.cat([arguments[name] for _, arguments in asked]) for name in given}
        conditions = torch.cat([one for one, _ in asked])
        latents = torch.cat([latents] * len(asked))
        with self.transformer.caching(len(asked)):
            predictions = self.transformer(latents, step.time, conditions, **step.conditions, **told).sample
        parts = list(predictions.chunk(len(asked)))
        contrast = None
        if step.guidance_scale != 1:
            without = parts.pop().float()
            contrast = (step.guidance_scale - 1) * (parts[-1].float() - without)
            # what is given is as large as before, for the scale that is kept
            contrast = contrast.masked_fill(given["given"][..., None], 0)
        guided = guide(parts[0], parts[-1], step.self_condition_weight, step.guidance_rescale, contrast)
        if not given:
            return guided
        return torch.where(given["given"][..., None], given["given_latents"].to(guided.dtype), guided)

    def denoise(
        self,
        latents: torch.Tensor,
        sampling: Sampling,
        call: CallState,
        given: dict[str, torch.Tensor] | None = None,
        self_condition: torch.Tensor | None = None,
        steering: Steering | None = None,
    ) -> torch.Tensor:
        """Noisy latents at the beginning of a grid → clean ones, (B, N, d_z).

        Args:
            latents: at the grid's first time.
            sampling: how.
            call: the call that this is part of; counts steps and evaluations.
            given: what is given, as [`Conditions.of_denoiser`] says it.
            self_condition: the first one, zeros by default.
            steering: changes latents and prediction of each step.
        """
        solver = self.prepare_solver(int(sampling.num_inference_steps), sampling.timesteps, latents.device)
        # the last prediction of the clean latents is the next step's self-condition
        clean_latents = torch.zeros_like(latents) if self_condition is None else self_condition
        steps = self.denoising_steps(solver, sampling)
        self.transformer.forget_cache()
        call.num_timesteps = len(solver.times)
        with self._calls.running(call), self.progress_bar(total=call.num_timesteps) as progress_bar:
            for i, step in enumerate(steps):
                if call.interrupt:
                    continue
                model_input = solver.model_input(latents, step.timestep)
                clean_latents = self.predict(model_input, step, clean_latents, given)  # (B, N, d_z)
                if steering is not None:
                    latents, clean_latents = steering(solver, i, latents, clean_latents)
                latents = solver.step(clean_latents, step.timestep, latents, sampling.generator)
                call.num_function_evaluations += step.num_function_evaluations

                if sampling.callback_on_step_end is not None:
                    tensors = {"latents": latents, "clean_latents": clean_latents}
                    callback_kwargs = {name: tensors[name] for name in sampling.callback_tensors}
                    callback_outputs = sampling.callback_on_step_end(self, i, step.timestep, callback_kwargs) or {}
                    latents = callback_outputs.pop("latents", latents)
                    clean_latents = callback_outputs.pop("clean_latents", clean_latents)
                progress_bar.update()
        return clean_latents
