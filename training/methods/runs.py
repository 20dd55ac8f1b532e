"""Methods as training runs of as many FLOPs, or of as many steps, and as evaluations of what they have trained."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ablations.definitions import check_known
from ablations.execution import launch_command
from ablations.runs import UNSCORED, AblationRun, as_overrides, scaled_values
from ldlm_hf.evaluation.provenance import source
from ldlm_hf.loading.settings_reader import flatten, load_settings
from ldlm_hf.objective import JointObjective
from ldlm_hf.training.flops import count_flops
from ldlm_hf.training.settings import TrainingSettings
from methods.definitions import SCRIPTS, Method, MethodBase, MethodEvaluation, Methods


# settings of each run that the command line has options for
OWN_SETTINGS = {"loop.seed": "--seeds", "loop.output_dir": "--output_dir", "loop.max_steps": "--base_steps"}


@dataclass(frozen=True)
class MethodRun(AblationRun):
    """A method with a seed: one training run and its folder."""

    @cached_property
    def settings(self) -> Any:
        """The merged settings; errors are those of `load_settings`."""
        return load_settings(SCRIPTS[self.script].settings_class, str(self.config), self.overrides)

    def check_teacher(self) -> None:
        """Raises ValueError for a distilled method whose teacher was trained anew since."""
        if self.needs is None:
            return
        own, taught_by = (one.pipeline / "README.md" for one in (self, self.needs))
        if own.is_file() and taught_by.is_file() and own.stat().st_mtime < taught_by.stat().st_mtime:
            raise ValueError(
                f"{self.folder} was distilled from {self.needs.name} before that was trained anew; delete it."
            )

    @cached_property
    def flops_of_step(self) -> float:
        """Model FLOPs of a training step; of a distilled method once what it needs is there."""
        return flops_of_step(self.script, self.settings)


def flops_of_step(script: str, settings: TrainingSettings) -> float:
    """Model FLOPs of a training step (`ldlm_hf/training/flops.py`)."""
    recipe = SCRIPTS[script](settings, Accelerator(cpu=True))
    recipe.load()
    if isinstance(recipe.module, JointObjective):
        # a token encoder that passes for a fitted one: its products are the same
        recipe.module.token_encoder.config.num_statistics_tokens = 1
    tokens = settings.loop.batch_size * recipe.sequence_length
    return count_flops(recipe.module, recipe.sequence_length).per_token * tokens


@dataclass(frozen=True)
class MethodPlan:
    """How methods become runs: a base, in a folder. `equal` is what all have as much of, `flops` or `steps`."""

    methods: Methods
    directory: Path  # of the methods' file
    base_name: str
    equal: str
    overrides: tuple[str, ...]  # for all runs, over their configurations
    evaluation: MethodEvaluation
    root: Path  # of the runs' folders

    def __post_init__(self) -> None:
        for key in sorted(OWN_SETTINGS.keys() & {override.partition("=")[0] for override in self.overrides}):
            raise ValueError(f"{key} differs from run to run: use {OWN_SETTINGS[key]} instead of an override.")

    @property
    def base(self) -> MethodBase:
        """The base."""
        return self.methods.bases[self.base_name]

    @property
    def accelerate(self) -> Path:
        """How commands are launched."""
        return self.directory / self.base.accelerate

    def run(self, name: str, seed: int) -> MethodRun:
        """The run that trains a method, or whose weights it samples."""
        name = self.methods.trained_as(name)
        check_known(f"on base {self.base_name!r}, method", name, self.methods.on_base(self.base_name))
        method = self.methods.methods[name]
        needs = None if method.needs is None else self.run(method.needs, seed)
        folder, config = self.root / name / f"seed-{seed}", self.config(method)
        changed, settings, steps = self.values(method), self.settings(method), self.steps(name)
        if needs is not None:
            changed["components"] = str(needs.pipeline)
        changed |= scaled_values(flatten(asdict(settings)), steps / settings.loop.max_steps) | UNSCORED
        changed |= {"loop.max_steps": steps, "loop.seed": seed, "loop.output_dir": str(folder)}
        given = {override.partition("=")[0] for override in self.overrides}
        kept = {key: value for key, value in changed.items() if key not in given}
        assert method.script is not None
        return MethodRun(name, seed, method.script, config, (*as_overrides(kept), *self.overrides), folder, needs)

    def config(self, method: Method) -> Path:
        """A method's configuration on the base."""
        return self.directory / method.configs[self.base_name]

    def settings(self, method: Method) -> Any:
        """A method's settings as its configuration has them, before its steps are changed."""
        assert method.script is not None
        overrides = [*as_overrides(self.values(method)), *self.overrides]
        return load_settings(SCRIPTS[method.script].settings_class, str(self.config(method)), overrides)

    def values(self, method: Method) -> dict[str, Any]:
        """What a method sets over its configuration."""
        return {**self.base.overrides, **method.overrides, **method.bases.get(self.base_name, {})}

    def steps(self, name: str) -> int:
        """Training steps of a method: as many FLOPs as the reference has in its steps, or as many steps; a distilled
        method has its share of those of what it starts from."""
        method = self.methods.methods[name]
        if method.needs is not None:
            return max(1, round(method.steps_share * self.steps(method.needs)))
        if self.equal == "steps":
            return self.base.steps
        return round(self.base.steps * self.step_flops(self.base.reference) / self.step_flops(name))

    @cached_property
    def counted(self) -> dict[str, float]:
        """What [`~MethodPlan.step_flops`] has counted."""
        return {}

    def step_flops(self, name: str) -> float:
        """FLOPs of a training step of a method that is not distilled from another."""
        if name not in self.counted:
            method = self.methods.methods[name]
            assert method.script is not None
            self.counted[name] = flops_of_step(method.script, self.settings(method))
        return self.counted[name]


@dataclass(frozen=True)
class Evaluation:
    """What is measured of a method's weights: by its own sampler in all numbers of steps, or by others in one."""

    name: str
    run: MethodRun
    kind: str  # steps, frontier
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    plan: MethodPlan

    @property
    def folder(self) -> Path:
        """Where its results are."""
        return self.plan.root / "evaluations" / f"{self.name}-seed-{self.run.seed}" / self.kind

    @property
    def title(self) -> str:
        """What tables call it."""
        title = self.plan.methods.methods[self.name].title
        return title if self.run.seed == 0 else f"{title}, training seed {self.run.seed}"

    def command(self) -> list[str]:
        """The command that measures it."""
        how = self.plan.evaluation
        options = {
            "pipeline": self.run.pipeline,
            "names": self.title,
            "output_dir": self.folder,
            "num_samples": how.num_samples,
            "seeds": how.sampling_seeds,
            "judge": how.judge or "none",
            "batch_size": how.batch_size,
            "judge_batch_size": how.judge_batch_size,
            # the same reference texts for all of them
            "cache_dir": self.plan.root / "reference-features",
            "config": os.path.relpath(self.run.folder / "settings.yaml"),
        }
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        arguments += ["--steps", *map(str, self.steps), "--samplers", *self.samplers]
        return [*launch_command(self.plan.accelerate, "evaluate.py"), *arguments]

    def results(self) -> dict[str, Any] | None:
        """What was measured as planned, of the weights that there are; None where that is still to be done."""
        file, card = self.folder / "results.json", self.run.pipeline / "README.md"
        if not (file.is_file() and card.is_file()) or file.stat().st_mtime < card.stat().st_mtime:
            return None
        results = json.loads(file.read_text(encoding="utf-8"))
        how = self.plan.evaluation
        planned = {
            "num_samples": how.num_samples,
            "seeds": list(range(how.sampling_seeds)),
            "steps": list(self.steps),
            "samplers": list(self.samplers),
            "judge": None if how.judge is None else source(how.judge).name,
        }
        return results if {key: results["settings"][key] for key in planned} == planned else None


def evaluations(plan: MethodPlan, names: Sequence[str], seeds: Sequence[int]) -> list[Evaluation]:
    """What is measured of methods and their training seeds."""
    found = []
    for name in names:
        method = plan.methods.methods[name]
        steps = tuple(dict.fromkeys(method.steps_within(nfe) for nfe in plan.evaluation.nfe))
        for seed in seeds:
            one = Evaluation(name, plan.run(name, seed), "steps", (method.sampler,), steps, plan)
            found.append(one)
            if method.frontier:
                samplers = (method.sampler, *method.frontier)
                at = (method.steps_within(plan.evaluation.frontier_nfe),)
                found.append(replace(one, kind="frontier", samplers=samplers, steps=at))
    return found
