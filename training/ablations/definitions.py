"""The ablations of `configs/ablations.yaml`: reading them, and the settings of each row on a base.

A row is a named override. On a base (a configuration, and how it is launched and evaluated), at a scale and with a
seed, it is one training run.
"""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file

from ldlm_hf.evaluation.provenance import source
from ldlm_hf.evaluation.report import COLUMNS
from ldlm_hf.evaluation.samplers import OWN
from ldlm_hf.hub.run_files import read_settings_and_log
from ldlm_hf.loading.checks import check_settings
from ldlm_hf.loading.settings_reader import (
    NULL,
    as_typed,
    differences,
    flatten,
    is_text,
    load_settings,
    parse,
    to_config,
    type_of,
)
from ldlm_hf.training.recipes.token_decoder import TokenDecoderSettings
from ldlm_hf.training.run_folder import END_OF_RUN, RESUMABLE_CHANGES
from ldlm_hf.training.settings import RunSettings


JOINT, TOKEN_DECODER = "train_joint.py", "train_token_decoder.py"
SETTINGS_CLASSES: dict[str, type] = {JOINT: RunSettings, TOKEN_DECODER: TokenDecoderSettings}
# what `--scale` shrinks; a decay is raised to the power 1 / scale, which scales its time constant
SCALED_STEPS = (
    "loop.max_steps",
    "loop.checkpointing_steps",
    "warmup.steps",
    "optimizer.lr_warmup_steps",
    "optimizer.lr_decay_steps",
    "timestep_sampler.update_every",
    "evaluation.every",
)
SCALED_DECAYS = ("optimizer.ema_decay", "timestep_sampler.ema_decay")
# settings of each run that the command line has options for
OPTIONS = {"loop.seed": "--seeds", "loop.output_dir": "--output_dir"}
# every row is scored afterwards, once, by evaluate.py; an override may ask for more
UNSCORED = {
    "evaluation.num_samples": 0,
    "evaluation.judge": None,
    # the paper's, for all rows alike: some learn no times for another one's grid
    "evaluation.sampler": OWN,
    "loop.trackers": [],
    "loop.checkpoints_total_limit": 1,
}


@dataclass
class EvaluationPlan:
    """How the runs of a base are evaluated.

    Attributes:
        num_samples: texts of one sampling seed.
        sampling_seeds: how many sampling seeds.
        steps: sampling steps.
        judge: causal language model; None leaves generative perplexity and MAUVE out.
        batch_size: texts sampled at once.
        judge_batch_size: texts of one pass of the judge.
    """

    num_samples: int = 1000
    sampling_seeds: int = 5
    steps: int = 256
    judge: str | None = "openai-community/gpt2-large"
    batch_size: int = 64
    judge_batch_size: int = 16

    def __post_init__(self) -> None:
        positive = ("num_samples", "sampling_seeds", "steps", "batch_size", "judge_batch_size")
        check_settings(type(self).__init__, vars(self), **dict.fromkeys(positive, "[1, inf)"))


@dataclass
class Base:
    """What is ablated. Files are named relative to that of the ablations.

    Attributes:
        config: configuration of the default row.
        accelerate: configuration of `accelerate launch`.
        overrides: settings that all rows of this base share, over the configuration.
        evaluation: how its runs are evaluated.
        token_decoder: fields of `LDLMTokenDecoderConfig` of the token decoders that are trained afterwards.
    """

    config: str = ""
    accelerate: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    token_decoder: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """One training run.

    Attributes:
        overrides: dotted settings.
        factors: dotted settings and what the base's value is multiplied by, a number or a fraction such as `1/3`.
        bases: overrides for one base only, by its name.
        script: the training script.
        needs: the row whose pipeline this one starts from.
        note: for the reader of a table that shows the row.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    script: str = JOINT
    needs: str | None = None
    note: str | None = None


@dataclass
class Group:
    """Rows of a table under a common heading: names and labels, in the order shown."""

    title: str = ""
    rows: dict[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """A table of the paper; `columns` are names of scores."""

    title: str = ""
    reference: str = ""
    columns: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    @property
    def rows(self) -> list[str]:
        """Names of the rows in the table's order, each once."""
        return list(dict.fromkeys(name for group in self.groups for name in group.rows))


@dataclass
class Ablations:
    """Bases, rows and tables by their names."""

    bases: dict[str, Base] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)


def read_ablations(path: Path) -> Ablations:
    """Reads and checks a file of ablations.

    Raises:
        OSError: the file is not there.
        ValueError: an unknown key, or a name that is not defined.
    """
    if not path.is_file():
        raise OSError(f"--config {str(path)!r}: there is no such file of ablations.")
    node = parse(path.read_text(encoding="utf-8"), str(path))
    loaded = to_config(keep_override_texts(node), str(path))
    try:
        ablations: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Ablations), loaded))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]} ({error.full_key}).") from error
    for name, row in ablations.rows.items():
        where = f"{path}: row {name!r}:"
        if row.script not in SETTINGS_CLASSES:
            raise ValueError(f"{where} script={row.script!r} is unknown; it is one of {', '.join(SETTINGS_CLASSES)}.")
        if row.needs is not None:
            # of the rows above it, so that no row can need itself by way of others
            check_known(f"{where} needs", row.needs, list(ablations.rows)[: list(ablations.rows).index(name)])
        elif row.script == TOKEN_DECODER:
            raise ValueError(f"{where} a token decoder is trained on another row's components; name it as `needs`.")
        for base in row.bases:
            check_known(f"{where} base", base, ablations.bases)
    for number, table in ablations.tables.items():
        for name in table.rows:
            check_known(f"{path}: table {number}: row", name, ablations.rows)
        for name in table.columns:
            check_known(f"{path}: table {number}: column", name, COLUMNS)
    return ablations


def keep_override_texts(node: yaml.Node) -> yaml.Node:
    """The nodes of a file of ablations, with the texts of overrides as they were typed."""
    if not isinstance(node, yaml.MappingNode):
        return node
    pairs = []
    for key, value in node.value:
        is_override = any(is_text(type_of(one, key.value)) for one in SETTINGS_CLASSES.values())
        keep = is_override and isinstance(value, yaml.ScalarNode) and value.tag != NULL
        pairs.append((key, as_typed(value) if keep else keep_override_texts(value)))
    return yaml.MappingNode(node.tag, pairs)


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError, naming the known ones, for a name that is none of them."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown; known: {', '.join(known)}.")


@dataclass(frozen=True)
class AblationRun:
    """A row with a seed: one training run and its folder.

    Attributes:
        row: name of the row.
        seed: of the training.
        script: the training script.
        config: the base's configuration; None where the overrides hold everything.
        overrides: `key=value`, over the configuration.
        folder: of the run.
        needs: the run whose pipeline this one starts from.
    """

    row: str
    seed: int
    script: str
    config: Path | None
    overrides: tuple[str, ...]
    folder: Path
    needs: AblationRun | None = None

    @cached_property
    def settings(self) -> Any:
        """The merged settings.

        Raises:
            ValueError: as of `load_settings`.
        """
        config = None if self.config is None else str(self.config)
        return load_settings(SETTINGS_CLASSES[self.script], config, self.overrides)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row} (seed {self.seed})"

    @property
    def has_pipeline(self) -> bool:
        """Whether the run ends with a pipeline, and not with an autoencoder that others need."""
        return self.script == TOKEN_DECODER or self.settings.stage != "autoencoder"

    @property
    def tokenizer(self) -> str:
        """Where the tokens of its texts come from."""
        if self.needs is not None:
            return self.needs.tokenizer
        return self.settings.model.tokenizer or self.settings.model.backbone

    @property
    def is_finished(self) -> bool:
        """Whether what a run writes last is there.

        Raises:
            ValueError: the folder holds a run with other settings, or one that started from other components than
                those that are there now.
        """
        saved = self.folder / "settings.yaml"
        if not saved.is_file():
            return False
        text = saved.read_text(encoding="utf-8")
        changed = [
            key
            for key in differences(self.settings, text)
            if key in END_OF_RUN or not key.startswith(RESUMABLE_CHANGES)
        ]
        # ROW/seed-K/pipeline, wherever the folder of all runs lies
        if "components" in changed:
            mine, theirs = self.settings.components, yaml.safe_load(text).get("components", "")
            if Path(mine).parts[-3:] == Path(theirs).parts[-3:]:
                changed.remove("components")
        if changed:
            raise ValueError(
                f"{self.folder} holds a run whose settings differ in {', '.join(changed)}; delete that folder or name "
                "another --output_dir."
            )
        # the card of a pipeline, and of other components the tokenizer
        last = "README.md" if self.has_pipeline else "tokenizer/tokenizer_config.json"
        if not (self.pipeline / last).is_file():
            return False
        if self.needs is not None and not self.started_from(self.needs.pipeline):
            raise ValueError(
                f"{self.folder} holds a run that started from other components than those of {self.needs.pipeline}, "
                "which were trained anew since; delete that folder."
            )
        return True

    def started_from(self, components: Path) -> bool:
        """Whether the finished pipeline has the weights of these components in the part that training leaves as it is;
        True if they are not there any more."""
        part = "transformer" if self.script == TOKEN_DECODER else "token_decoder"
        return all(
            same_weights(file, self.pipeline / part / file.name) for file in (components / part).glob("*.safetensors")
        )

    @property
    def pipeline(self) -> Path:
        """Folder of the trained pipeline."""
        return self.folder / "pipeline"

    @property
    def log(self) -> Path:
        """What training and evaluation have printed; beside the run's folder, which training makes its own."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation."""
        return self.folder / "evaluation"

    def scores(self, plan: EvaluationPlan) -> dict[str, Any] | None:
        """What `evaluate.py` has measured of the trained pipeline as planned; None where it has not."""
        file, card = self.evaluation / "results.json", self.pipeline / "README.md"
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

    def held_out(self) -> dict[str, float]:
        """The last evaluation on held-out text of the training's log."""
        _, log = read_settings_and_log(self.folder)
        last = [record for record in log if "eval/reconstruction_accuracy" in record][-1]
        return {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}


@dataclass(frozen=True)
class Plan:
    """How rows become runs: a base at a scale, in a folder.

    Attributes:
        ablations: what there is.
        directory: folder of the ablations' file, which its bases' files are named relative to.
        base_name: of the base.
        scale: factor on the steps.
        overrides: `key=value` for all rows: over the base, and under what a row sets.
        evaluation: how its runs are evaluated.
        root: folder that a row's folders are made in.
    """

    ablations: Ablations
    directory: Path
    base_name: str
    scale: float
    overrides: tuple[str, ...]
    evaluation: EvaluationPlan
    root: Path

    def __post_init__(self) -> None:
        check_known("base", self.base_name, self.ablations.bases)
        if not 0 < self.scale < math.inf:
            raise ValueError(f"--scale {self.scale} must be a positive number.")
        for key in OPTIONS.keys() & self.given:
            raise ValueError(f"{key} differs from run to run: use {OPTIONS[key]} instead of an override.")

    @property
    def base(self) -> Base:
        """The base."""
        return self.ablations.bases[self.base_name]

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
        """The run of a row.

        Raises:
            ValueError: an unknown row, a factor of an unknown setting, or settings of the base that are refused.
        """
        check_known("row", name, self.ablations.rows)
        row = self.ablations.rows[name]
        needs = None if row.needs is None else self.run(row.needs, seed)
        folder = self.root / name / f"seed-{seed}"
        for key in row.factors:
            check_known(f"row {name!r}: factor of setting", key, self.base_values)
        values = row.overrides | row.bases.get(self.base_name, {})
        values |= {key: times(self.base_values[key], factor) for key, factor in row.factors.items()}
        if needs is not None:
            values["components"] = str(needs.pipeline)
        config: Path | None = self.config
        common, base_values = self.common_overrides, self.base_values
        if row.script == TOKEN_DECODER:
            assert needs is not None
            # its settings are other sections than the configuration's, so it is given those that both have
            shared = self.token_decoder_values(needs)
            config, common, base_values = None, as_overrides(shared), dotted_values(TokenDecoderSettings()) | shared
        values |= scaled_values(base_values | flatten(values), self.scale)
        values |= {key: value for key, value in UNSCORED.items() if key not in self.given}
        values |= {"loop.seed": seed, "loop.output_dir": str(folder)}
        # a row's value may be scaled, and each key is to be there once
        kept = [override for override in common if override.split("=", 1)[0] not in values]
        return AblationRun(name, seed, row.script, config, (*kept, *as_overrides(values)), folder, needs)

    def token_decoder_values(self, needs: AblationRun) -> dict[str, Any]:
        """Settings that a token decoder trained on a run's components shares with the base and with that run."""
        values = {f"token_decoder.{key}": value for key, value in self.base.token_decoder.items()}
        values["decoder_noise"] = needs.settings.objective.decoder_noise
        shared = ("data", "optimizer", "loop", "evaluation")
        values |= {key: value for key, value in self.base_values.items() if key.split(".")[0] in shared}
        defaults = dotted_values(TokenDecoderSettings())
        return {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two files of weights hold the same tensors."""
    if not other.is_file():
        return False
    if filecmp.cmp(one, other):
        return True
    # another version of the library may have written the same tensors in other words
    mine, theirs = load_file(one), load_file(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def dotted_values(settings: Any) -> dict[str, Any]:
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
