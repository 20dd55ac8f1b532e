"""Runs of joint training as their folders tell of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldlm_hf.hub.run_files import RunResults, read_settings_and_log
from ldlm_hf.hub.training_curves import HELD_OUT_PREFIX, series
from ldlm_hf.loading.settings_reader import flatten, with_defaults
from ldlm_hf.objective.warmup import warmup_gate
from ldlm_hf.training.settings import MACHINE_SETTINGS, RunSettings


# sections that only a run of joint training has
JOINT_SECTIONS = {"model", "objective", "timestep_sampler", "warmup"}


class NotLoggedError(ValueError):
    """A log that has not what a figure needs; the others can still be drawn."""


@dataclass(frozen=True)
class LoggedRun:
    """A run of joint training, finished or not."""

    name: str
    settings: dict[str, Any]  # by dotted key; a setting that is younger than the run has its default
    log: list[dict[str, Any]]
    results: RunResults | None  # which a run writes at its end

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Lines of the log that hold held-out numbers."""
        return [record for record in self.log if any(key.startswith(HELD_OUT_PREFIX) for key in record)]

    @property
    def last_step(self) -> int:
        """Optimiser steps that the log reaches to."""
        return max(record["step"] for record in self.log)

    @property
    def warmup(self) -> tuple[int, float, float]:
        """S_wu, c and k of Eq. 29–30."""
        return tuple(self.settings[f"warmup.{key}"] for key in ("steps", "midpoint", "steepness"))  # type: ignore

    @property
    def is_adaptive(self) -> bool:
        """Whether the run is set to sample t by Eq. 5; it begins with uniform t in any case."""
        return self.settings["timestep_sampler.adaptive"]

    def was_active(self, step: int) -> bool:
        """Whether the adaptive sampler had taken over from the uniform draw by then."""
        active = [value for at, value in zip(*series(self.log, "adaptive_timesteps"), strict=True) if at <= step]
        return bool(active and active[-1])


def read_logged_runs(folders: Sequence[str | Path], names: Sequence[str] | None = None) -> list[LoggedRun]:
    """Reads the folders of runs; names are the parts of the paths that tell them apart by default.

    OSError for a folder that is not that of a run; ValueError for folders or names that are given twice or do not
    match, and for a run that is not one of joint training, or has not been evaluated yet.
    """
    paths = [Path(folder).resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"The run {str(folder)!r} is given twice; name it once.")
    names = distinguishing_names(paths) if names is None else list(names)
    if len(names) != len(paths):
        raise ValueError(f"--names gives {len(names)} names for {len(paths)} runs; give one a run, in their order.")
    for name in names:
        if names.count(name) > 1 or not name.strip():
            raise ValueError(f"--names: {name!r} must be a name of one run only, and not empty.")
    return [read_logged_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def distinguishing_names(paths: Sequence[Path]) -> list[str]:
    """The ends of different paths, as long as it takes to tell them apart, without what all of them end with."""
    parts = [path.parts for path in paths]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    ends = [part[-length:] for part in parts]
    while len({end[-1] for end in ends}) == 1 and all(len(end) > 1 for end in ends):
        ends = [end[:-1] for end in ends]
    return ["/".join(end) for end in ends]


def read_logged_run(folder: str | Path, name: str) -> LoggedRun:
    """Reads one run's own files; errors as in [`read_logged_runs`]."""
    folder = Path(folder)
    sections, log = read_settings_and_log(folder)
    if not sections.keys() >= JOINT_SECTIONS:
        raise ValueError(f"{folder} is no run of train_joint.py, whose log alone has a diffusion loss; leave it out.")
    settings = flatten(with_defaults(RunSettings, sections))
    results_file = folder / "results.json"
    run = LoggedRun(name, settings, log, RunResults.load(results_file) if results_file.is_file() else None)
    if not run.evaluations:
        raise ValueError(
            f"{folder / 'metrics.jsonl'} holds no evaluation: wait for the run's first (its evaluation.every is "
            f"{settings['evaluation.every']}; 0 is at the end only), or leave the run out."
        )
    return run


def differing_settings(runs: Sequence[LoggedRun]) -> list[str]:
    """Keys whose values are not the same in all runs, without those that say where a machine keeps files."""
    keys = sorted({key for run in runs for key in run.settings} - set(MACHINE_SETTINGS))
    return [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]


def logged_gate(run: LoggedRun) -> list[tuple[int, float]]:
    """Steps and their logged gate; a line that is written after s steps holds the last one's, gamma(s - 1)."""
    return [(steps - 1, gate) for steps, gate in zip(*series(run.log, "gate"), strict=True)]


def gate_error(run: LoggedRun) -> float | None:
    """Largest distance of the logged gate from Eq. 30 with the run's settings; None where no gate was logged."""
    return max((abs(gate - warmup_gate(step, *run.warmup)) for step, gate in logged_gate(run)), default=None)
