"""How a pipeline is sampled, as one word of a command line: a scheduler with settings of its own, and guidance.

own                                             the pipeline's scheduler as it is
TangentDDIMScheduler:eta=1.0,time_grid=log_snr  another one, and what differs from the pipeline's configuration
own:self_condition_scale=1.5                    arguments of the pipeline's call
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, get_type_hints

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from ..loading.settings_reader import parse_value, to_config, under
from ..schedulers import DIFFUSERS_SCHEDULERS, SCHEDULERS
from ..schedulers.discrete import diffusers_config
from ..schedulers.scheduling_tangent import TangentScheduler


OWN = "own"
# diffusers has its own, and by registration ours
SCHEDULER_CLASSES: dict[str, type[Any]] = {
    name: getattr(diffusers, name) for name in (*SCHEDULERS, *DIFFUSERS_SCHEDULERS)
}
CALL_ARGUMENTS = ("self_condition_scale", "self_condition_decay", "guidance_rescale", "guidance_scale")


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
        if name != OWN and name not in SCHEDULER_CLASSES:
            known = ", ".join([OWN, *SCHEDULER_CLASSES])
            raise ValueError(f"sampler {text!r}: unknown scheduler {name!r}; known: {known}.")
        constructor = None if name == OWN else SCHEDULER_CLASSES[name].__init__
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
        """The scheduler in the place of a pipeline's own; ValueError for settings that it refuses."""
        if self.scheduler == OWN:
            return scheduler
        scheduler_class, changes = SCHEDULER_CLASSES[self.scheduler], dict(self.settings)
        if issubclass(scheduler_class, TangentScheduler):
            return scheduler_class.from_config(scheduler.config, **changes)
        return scheduler_class.from_config(diffusers_config(scheduler, **changes))

    def apply(self, pipeline: DiffusionPipeline) -> None:
        """Gives a pipeline the scheduler; ValueError for settings that it refuses, or a pipeline without any."""
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
