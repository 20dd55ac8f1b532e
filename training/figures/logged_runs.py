"""Runs of joint training as their folders tell of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldlm_hf.hub.run_files import RunResults, read_settings_and_log
from ldlm_hf.hub.training_curves import HELD_OUT_PREFIX
from ldlm_hf.loading.settings_reader import saved_values
from ldlm_hf.training.settings import MACHINE_SETTINGS, RunSettings


# sections that only a run of joint training has
JOINT_SECTIONS = {"model", "objective", "timestep_sampler", "warmup"}


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


def read_logged_runs(folders: Sequence[str | Path], names: Sequence[str] | None = None) -> list[LoggedRun]:
    """Reads the folders of runs; by default their names are the paths below the folder that all of them lie in.

    OSError for a folder that is not that of a run; ValueError for names that do not match or are not all different,
    and for a run that is not one of joint training, or has not been evaluated yet.
    """
    if names is None:
        paths = [Path(folder).resolve() for folder in folders]
        common = os.path.commonpath([path.parent for path in paths])
        names = [str(path.relative_to(common)) for path in paths]
    names = list(names)
    if len(names) != len(folders):
        raise ValueError(f"--names gives {len(names)} names for {len(folders)} runs; give one a run, in their order.")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is the name of two runs; leave one out, or give other --names.")
    return [read_logged_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_logged_run(folder: str | Path, name: str) -> LoggedRun:
    """Reads one run's own files; errors as in [`read_logged_runs`]."""
    folder = Path(folder)
    sections, log = read_settings_and_log(folder)
    if not sections.keys() >= JOINT_SECTIONS:
        raise ValueError(f"{folder} is no run of train_joint.py, whose log alone has a diffusion loss; leave it out.")
    settings = saved_values(RunSettings, sections)
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
