"""Rows as training runs: a row on a base, at a scale and with a seed, has settings, a folder and results."""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from ablations.definitions import SETTINGS_CLASSES, TOKEN_DECODER, Ablations, Base, EvaluationPlan, check_known
from ldlm_hf.evaluation.provenance import source
from ldlm_hf.evaluation.samplers import OWN
from ldlm_hf.hub.run_files import read_settings_and_log
from ldlm_hf.loading.settings_reader import differences, flatten, load_settings
from ldlm_hf.training.recipes.token_decoder import TokenDecoderSettings
from ldlm_hf.training.run_folder import END_OF_RUN, RESUMABLE_CHANGES
from ldlm_hf.training.settings import RunSettings


# what `--scale` shrinks; a decay is raised to the power 1 / scale, which scales its time constant
SCALED_STEPS = (
    "loop.max_steps",
    "loop.checkpointing_steps",
    "warmup.steps",
    "optimizer.lr_warmup_steps",
    "optimizer.lr_decay_steps",
    "timestep_sampler.update_every",
    "evaluation.every",
    "conditioning.start_step",
    "curriculum.steps",
    "noise.round_steps",
)
SCALED_DECAYS = ("optimizer.ema_decay", "timestep_sampler.ema_decay")
# settings of each run that the command line has options for
OPTIONS = {"loop.seed": "--seeds", "loop.output_dir": "--output_dir"}
# every row is scored afterwards, once, by evaluate.py; an override may ask for more
UNSCORED: dict[str, Any] = {
    "evaluation.num_samples": 0,
    "evaluation.judge": None,
    # the paper's, for all rows alike: some learn no times for another one's grid
    "evaluation.sampler": OWN,
    "loop.trackers": [],
    "loop.checkpoints_total_limit": 1,
}
# sections of a token decoder's settings that are those of the base
SHARED_SECTIONS = ("data", "optimizer", "loop", "evaluation")


@dataclass(frozen=True)
class AblationRun:
    """A row with a seed: one training run and its folder."""

    row: str
    seed: int
    script: str
    config: Path | None  # None where the overrides hold everything
    overrides: tuple[str, ...]
    folder: Path
    needs: AblationRun | None  # whose pipeline this one starts from

    @cached_property
    def settings(self) -> RunSettings | TokenDecoderSettings:
        """The merged settings; errors are those of `load_settings`."""
        config = None if self.config is None else str(self.config)
        return load_settings(SETTINGS_CLASSES[self.script], config, self.overrides)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row} (seed {self.seed})"

    @property
    def pipeline(self) -> Path:
        """Folder of the trained pipeline."""
        return self.folder / "pipeline"

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation."""
        return self.folder / "evaluation"

    @property
    def log(self) -> Path:
        """What training and evaluation have printed; beside the run's folder, which training makes its own."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def has_pipeline(self) -> bool:
        """Whether the run ends with a pipeline, and not with an autoencoder that others need."""
        return not isinstance(self.settings, RunSettings) or self.settings.stage != "autoencoder"

    @property
    def tokenizer(self) -> str:
        """Where the tokens of its texts come from."""
        if self.needs is not None:
            return self.needs.tokenizer
        assert isinstance(self.settings, RunSettings), "every other run needs one"
        return self.settings.model.tokenizer or self.settings.model.backbone


def with_needs(runs: Iterable[AblationRun]) -> list[AblationRun]:
    """Runs and what they need, each once, and after all that it needs."""
    ordered: dict[AblationRun, None] = {}
    for run in runs:
        needed = [] if run.needs is None else with_needs([run.needs])
        ordered |= dict.fromkeys([*needed, run])
    return list(ordered)


def check_finished(run: AblationRun) -> bool:
    """Whether what a run writes last is there.

    ValueError where the folder holds a run with other settings, or one that started from components that have changed.
    """
    saved = run.folder / "settings.yaml"
    if not saved.is_file():
        return False
    changed = differences(run.settings, saved.read_text(encoding="utf-8"))
    changed = [key for key in changed if key in END_OF_RUN or not key.startswith(RESUMABLE_CHANGES)]
    # the folder of all runs may have moved; the components themselves are compared below
    if set(changed) - {"components"}:
        raise ValueError(
            f"{run.folder} holds a run whose settings differ in {', '.join(changed)}; delete that folder or name "
            "another --output_dir."
        )
    # the card of a pipeline, and of other components the tokenizer
    last = "README.md" if run.has_pipeline else "tokenizer/tokenizer_config.json"
    if not (run.pipeline / last).is_file():
        return False
    # a part that training leaves as it is
    part = "transformer" if run.script == TOKEN_DECODER else "token_decoder"
    for file in [] if run.needs is None else (run.needs.pipeline / part).glob("*.safetensors"):
        if not filecmp.cmp(file, run.pipeline / part / file.name, shallow=False):
            raise ValueError(
                f"{run.folder} holds a run that started from other components than those of {file.parents[1]}, "
                "which were trained anew since; delete that folder."
            )
    return True


def read_scores(run: AblationRun, plan: EvaluationPlan) -> dict[str, Any] | None:
    """What `evaluate.py` has measured of the trained pipeline as planned; None where it has not."""
    file, card = run.evaluation / "results.json", run.pipeline / "README.md"
    if not file.is_file() or file.stat().st_mtime < card.stat().st_mtime:
        return None
    results = json.loads(file.read_text(encoding="utf-8"))
    planned = {
        "num_samples": plan.num_samples,
        "seeds": list(range(plan.sampling_seeds)),
        "steps": [plan.steps],
        "judge": None if plan.judge is None else source(plan.judge).name,
        # as long as nobody has asked for less by hand
        "mauve": plan.judge is not None,
        "dtype": "float32",
    }
    return results if {key: results["settings"][key] for key in planned} == planned else None


def read_held_out(run: AblationRun) -> dict[str, float]:
    """The last evaluation on held-out text of the training's log."""
    _, log = read_settings_and_log(run.folder)
    last = [record for record in log if "eval/reconstruction_accuracy" in record][-1]
    return {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}


@dataclass(frozen=True)
class Plan:
    """How rows become runs: a base at a scale, in a folder."""

    ablations: Ablations
    directory: Path  # of the ablations' file
    base_name: str
    scale: float
    overrides: tuple[str, ...]  # for all rows: over the base, and under what a row sets
    evaluation: EvaluationPlan
    root: Path  # of the rows' folders

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"--scale {self.scale} must be a positive number.")
        for key in OPTIONS.keys() & self.given:
            raise ValueError(f"{key} differs from run to run: use {OPTIONS[key]} instead of an override.")

    @property
    def base(self) -> Base:
        """The base."""
        return self.ablations.bases[self.base_name]

    @property
    def accelerate(self) -> Path:
        """How commands are launched."""
        return self.directory / self.base.accelerate

    @property
    def config(self) -> Path:
        """Configuration of the base."""
        return self.directory / self.base.config

    @property
    def given(self) -> set[str]:
        """Keys of the overrides."""
        return {override.partition("=")[0] for override in self.overrides}

    @property
    def common_overrides(self) -> list[str]:
        """What all rows share, over the configuration."""
        return [*as_overrides(self.base.overrides), *self.overrides]

    @cached_property
    def base_values(self) -> dict[str, Any]:
        """The base's settings by dotted key, before any row and any scale."""
        return dotted_values(load_settings(RunSettings, str(self.config), self.common_overrides))

    def run(self, name: str, seed: int) -> AblationRun:
        """The run of a row."""
        check_known("row", name, self.ablations.rows)
        row = self.ablations.rows[name]
        needs = None if row.needs is None else self.run(row.needs, seed)
        folder = self.root / name / f"seed-{seed}"
        for key in row.factors:
            check_known(f"row {name!r}: factor of setting", key, self.base_values)
        products = {key: times(self.base_values[key], factor) for key, factor in row.factors.items()}
        values = row.overrides | row.bases.get(self.base_name, {}) | products
        if needs is not None:
            values["components"] = str(needs.pipeline)
        config: Path | None = self.config
        common, unscaled = self.common_overrides, self.base_values
        if row.script == TOKEN_DECODER:
            assert needs is not None
            # its settings are other sections than the configuration's, so it is given those that both have
            shared = self.token_decoder_values(needs)
            config, common, unscaled = None, as_overrides(shared), dotted_values(TokenDecoderSettings()) | shared
        values |= scaled_values(unscaled | flatten(values), self.scale)
        values |= {key: value for key, value in UNSCORED.items() if key not in self.given}
        values |= {"loop.seed": seed, "loop.output_dir": str(folder)}
        # a row's value may be scaled, and each key is to be there once
        kept = [override for override in common if override.split("=", 1)[0] not in values]
        return AblationRun(name, seed, row.script, config, (*kept, *as_overrides(values)), folder, needs)

    def token_decoder_values(self, needs: AblationRun) -> dict[str, Any]:
        """Settings that a token decoder trained on a run's components shares with the base and with that run."""
        assert isinstance(needs.settings, RunSettings)
        values = {f"token_decoder.{key}": value for key, value in self.base.token_decoder.items()}
        values["decoder_noise"] = needs.settings.objective.decoder_noise
        values |= {key: value for key, value in self.base_values.items() if key.split(".")[0] in SHARED_SECTIONS}
        defaults = dotted_values(TokenDecoderSettings())
        return {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}


def dotted_values(settings: RunSettings | TokenDecoderSettings) -> dict[str, Any]:
    """Settings by dotted key."""
    return flatten(asdict(settings))


def times(value: float, factor: float | str) -> float:
    """A setting's value times a factor; whole where the value is, and else to six digits."""
    product = value * Fraction(str(factor))
    return round(product) if isinstance(value, int) else float(f"{float(product):.6g}")


def scaled_values(values: dict[str, Any], scale: float) -> dict[str, Any]:
    """The settings that a scale changes: steps times the scale, decays to the power 1 / scale."""
    if scale == 1:
        return {}
    # 0 is no number of steps but "not at all", in all of these
    scaled: dict[str, Any] = {key: max(1, round(values[key] * scale)) for key in SCALED_STEPS if values.get(key)}
    return scaled | {key: round(values[key] ** (1 / scale), 6) for key in SCALED_DECAYS if key in values}


def as_overrides(values: dict[str, Any]) -> list[str]:
    """`key=value` for each, in a form that is read back as the same value."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
