"""How a pipeline is sampled, as one word of a command line: a scheduler with settings of its own, and guidance.

own                                             the pipeline's scheduler as it is
TangentDDIMScheduler:eta=1.0,time_grid=log_snr  another one, and what differs from the pipeline's configuration
ReMDMScheduler:eta=0.015,top_p=0.9              one of the methods that LDLM is compared with
own:self_condition_scale=1.5                    arguments of the pipeline's call
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any, get_type_hints

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from ..loading.settings_reader import parse_value, to_config, under
from ..schedulers import DIFFUSERS_SCHEDULERS, SCHEDULERS, TOKEN_SCHEDULERS
from ..schedulers.discrete import diffusers_config


OWN = "own"
KNOWN_SCHEDULERS = (*SCHEDULERS, *DIFFUSERS_SCHEDULERS, *TOKEN_SCHEDULERS)
# of LDLM's pipeline, and of the autoregressive one
GUIDANCE = ("self_condition_scale", "self_condition_decay", "guidance_rescale", "guidance_scale")
CALL_ARGUMENTS = (*GUIDANCE, "temperature", "top_p")


def scheduler_class(name: str) -> type[Any]:
    """A scheduler's class by its name."""
    if name in TOKEN_SCHEDULERS:
        # their modules import this one
        return getattr(importlib.import_module(f"..baselines.{TOKEN_SCHEDULERS[name]}", __package__), name)
    # diffusers has its own, and by registration ours
    return getattr(diffusers, name)


@dataclass(frozen=True)
class Sampler:
    """A scheduler, by the name of its class, and arguments of the pipeline's call; `text` is what was typed.

    `settings` are of the scheduler, over the pipeline's configuration; they and the arguments are pairs.
    """

    text: str = OWN
    scheduler: str = OWN
    settings: tuple[tuple[str, Any], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Sampler:
        """Reads `NAME[:key=value,...]`; ValueError for an unknown scheduler or setting, or a pair without value."""
        name, _, pairs = text.partition(":")
        if name not in (OWN, *KNOWN_SCHEDULERS):
            known = ", ".join([OWN, *KNOWN_SCHEDULERS])
            raise ValueError(f"sampler {text!r}: unknown scheduler {name!r}; known: {known}.")
        constructor = None if name == OWN else scheduler_class(name).__init__
        own_settings = [] if constructor is None else list(inspect.signature(constructor).parameters)[1:]
        hints = {} if constructor is None else get_type_hints(constructor)
        settings: list[tuple[str, Any]] = []
        arguments: list[tuple[str, Any]] = []
        for pair in filter(None, pairs.split(",")):
            key, separator, value = pair.partition("=")
            if not separator:
                raise ValueError(f"sampler {text!r}: {pair!r} is no key=value.")
            if key not in [*CALL_ARGUMENTS, *own_settings]:
                known = ", ".join([*CALL_ARGUMENTS, *own_settings])
                raise ValueError(f"sampler {text!r}: unknown setting {key!r}; known: {known}.")
            read = to_config(under(key, parse_value(value, hints.get(key), f"sampler {text!r}")), f"sampler {text!r}")
            (settings if key in own_settings else arguments).append((key, read[key]))
        return cls(text, name, tuple(settings), tuple(arguments))

    def scheduler_for(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The scheduler in the place of a pipeline's own; ValueError for settings that it refuses, or one for noise of
        another kind."""
        if self.scheduler == OWN:
            return scheduler
        chosen, changes = scheduler_class(self.scheduler), dict(self.settings)
        kinds = [getattr(one, "process", "latent") for one in (chosen, scheduler)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"sampler {self.text!r}: a {self.scheduler} takes off {kinds[0]} noise, and the pipeline, whose own "
                f"scheduler is a {type(scheduler).__name__}, was trained with {kinds[1]} noise."
            )
        if self.scheduler in DIFFUSERS_SCHEDULERS:
            return chosen.from_config(diffusers_config(scheduler, **changes))
        if self.scheduler in TOKEN_SCHEDULERS:
            # methods have defaults of their own
            defaults = inspect.signature(type(scheduler).__init__).parameters
            changed = {name: scheduler.config[name] for name in list(defaults)[1:]}
            changed = {name: value for name, value in changed.items() if value != defaults[name].default}
            return chosen.from_config(changed, **changes)
        return chosen.from_config(scheduler.config, **changes)

    def apply(self, pipeline: DiffusionPipeline) -> None:
        """Gives a pipeline the scheduler; ValueError for settings that it refuses, and for a pipeline without any or
        whose call lacks the arguments."""
        taken = inspect.signature(type(pipeline).__call__).parameters
        for name, _ in self.arguments:
            if name not in taken:
                raise ValueError(f"sampler {self.text!r}: the call of a {type(pipeline).__name__} has no {name}.")
        if self.scheduler == OWN:
            return
        if pipeline.components.get("scheduler") is None:
            raise ValueError(f"sampler {self.text!r}: a {type(pipeline).__name__} has no scheduler; use {OWN!r}.")
        pipeline.scheduler = self.scheduler_for(pipeline.scheduler)

    def become_default(self, pipeline: DiffusionPipeline) -> None:
        """Gives a pipeline the scheduler and the guidance; ValueError as of `apply`."""
        self.apply(pipeline)
        if self.arguments:
            pipeline.set_guidance(**dict(self.arguments))
