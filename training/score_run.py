"""Samples and scores the pipeline of a finished run by other settings of `evaluation`, and writes its card again.

    python training/score_run.py RUN [evaluation.key=value ...]

For a run whose judge was not at hand where it was trained, or for more texts, steps or another sampler than it had.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ldlm_hf import LDLMPipeline
from ldlm_hf.data import load_held_out
from ldlm_hf.hub.run_files import RunResults, read_settings_and_log
from ldlm_hf.loading.settings_reader import flatten, load_settings, saved_values, to_yaml
from ldlm_hf.training.finish import describe, score_run
from ldlm_hf.training.recipes.distillation import DistillationRecipe
from ldlm_hf.training.recipes.joint import JointRecipe
from ldlm_hf.training.recipes.lora import LoraRecipe, LoraRunSettings
from ldlm_hf.training.recipes.token_decoder import TokenDecoderRecipe
from ldlm_hf.training.settings import TrainingSettings


RECIPES = (JointRecipe, DistillationRecipe, TokenDecoderRecipe, LoraRecipe)


def load_run_settings(folder: Path, overrides: list[str]) -> TrainingSettings:
    """The settings of a run, with others for its evaluation.

    Raises:
        OSError: the folder is not that of a run.
        ValueError: a setting that does not exist, or one of another section.
    """
    saved, _ = read_settings_and_log(folder)
    for override in overrides:
        if not override.startswith("evaluation."):
            raise ValueError(f"{override}: the run is over; settings of `evaluation` are all that can still change.")
    classes: list[type[Any]] = [recipe.settings_class for recipe in RECIPES]
    # those of an adapter are those of joint training, and more
    settings_class = min((one for one in classes if saved.keys() <= names(one)), key=lambda one: len(names(one)))
    # settings that came after the run have the values that say what it did
    earlier = saved_values(settings_class, saved)
    added = [f"{key}={typed(earlier[key])}" for key in earlier.keys() - flatten(saved).keys()]
    changes = [*added, *overrides, f"loop.output_dir={folder}"]
    settings: TrainingSettings = load_settings(settings_class, str(folder / "settings.yaml"), changes)
    return settings


def typed(value: Any) -> str:
    """A value as one types it in a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def names(settings_class: type[Any]) -> set[str]:
    """The sections and settings of a run."""
    return {field.name for field in fields(settings_class)}


def load_result(run: Path, settings: TrainingSettings) -> LDLMPipeline:
    """The pipeline of a run, or the one that its adapter is for, with it."""
    if not isinstance(settings, LoraRunSettings):
        return LDLMPipeline.from_pretrained(run / "pipeline", dtype=torch.float32)
    pipeline = LDLMPipeline.from_pretrained(settings.components, dtype=torch.float32)
    pipeline.load_lora_weights(run / LoraRecipe.result_folder)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a finished run")
    parser.add_argument("overrides", nargs="*", metavar="evaluation.key=value", help="settings, over those of the run")
    arguments = parser.parse_args()
    settings = load_run_settings(arguments.run, arguments.overrides)
    results = RunResults.load(arguments.run / "results.json")
    pipeline = load_result(arguments.run, settings)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = load_held_out(settings.data, pipeline.tokenizer, results.sequence_length)
    (arguments.run / "settings.yaml").write_text(to_yaml(settings), encoding="utf-8")
    changed = describe(settings, results.sequence_length).changed_settings
    with torch.no_grad():
        score_run(pipeline, held_out, settings, replace(results, changed_settings=changed))


if __name__ == "__main__":
    main()
