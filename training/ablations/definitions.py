"""What `configs/ablations.yaml` holds: bases, rows and tables, read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldlm_hf.evaluation.report import COLUMNS
from ldlm_hf.loading.checks import check_settings
from ldlm_hf.loading.settings_reader import NULL, as_typed, is_text, parse, to_config, type_of
from ldlm_hf.training.recipes.token_decoder import TokenDecoderSettings
from ldlm_hf.training.settings import RunSettings


JOINT, TOKEN_DECODER = "train_joint.py", "train_token_decoder.py"
SETTINGS_CLASSES: dict[str, type[RunSettings] | type[TokenDecoderSettings]] = {
    JOINT: RunSettings,
    TOKEN_DECODER: TokenDecoderSettings,
}


@dataclass
class EvaluationPlan:
    """How the runs of a base are evaluated; without a judge, generative perplexity and MAUVE are left out."""

    num_samples: int = 1000  # of each sampling seed
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
    """What is ablated. Files are named relative to that of the ablations."""

    config: str = ""  # of the default row
    accelerate: str = ""  # of `accelerate launch`
    overrides: dict[str, Any] = field(default_factory=dict)  # of all rows
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    # fields of `LDLMTokenDecoderConfig` of the token decoders that are trained afterwards
    token_decoder: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """One training run."""

    overrides: dict[str, Any] = field(default_factory=dict)
    # what the base's value is multiplied by, a number or a fraction such as `1/3`
    factors: dict[str, Any] = field(default_factory=dict)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)  # overrides for one base only
    script: str = JOINT
    needs: str | None = None  # the row whose pipeline this one starts from
    note: str | None = None  # for the reader of a table that shows the row


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
    """Reads and checks a file of ablations; ValueError for an unknown key, or a name that is not defined."""
    if not path.is_file():
        raise OSError(f"--config {str(path)!r}: there is no such file of ablations.")
    node = parse(path.read_text(encoding="utf-8"), str(path))
    loaded = to_config(keep_override_texts(node), str(path))
    try:
        ablations: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Ablations), loaded))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]} ({error.full_key}).") from error
    check_names(ablations, path)
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


def check_names(ablations: Ablations, path: Path) -> None:
    """Raises ValueError for a script, base, row or column that a row or table names and that does not exist."""
    earlier: list[str] = []
    for name, row in ablations.rows.items():
        where = f"{path}: row {name!r}:"
        check_known(f"{where} script", row.script, SETTINGS_CLASSES)
        if row.needs is not None:
            # only rows above, so that no row needs itself by way of others
            check_known(f"{where} needs", row.needs, earlier)
        elif row.script == TOKEN_DECODER:
            raise ValueError(f"{where} a token decoder is trained on another row's components; name it as `needs`.")
        for base in row.bases:
            check_known(f"{where} base", base, ablations.bases)
        earlier.append(name)
    for number, table in ablations.tables.items():
        for name in table.rows:
            check_known(f"{path}: table {number}: row", name, ablations.rows)
        for name in table.columns:
            check_known(f"{path}: table {number}: column", name, COLUMNS)


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError, naming the known ones, for a name that is none of them."""
    known = list(known)
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown; known: {', '.join(known)}.")


def selected_rows(ablations: Ablations, tables: Sequence[str], rows: Sequence[str] | None) -> list[str]:
    """Names of the rows asked for: those given, or all of the tables, each once."""
    for table in tables:
        check_known("table", table, ablations.tables)
    known = dict.fromkeys(name for table in tables for name in ablations.tables[table].rows)
    if rows is None and not known:
        raise ValueError(f"Nothing to do: give --table N ({', '.join(ablations.tables)}) or --rows ROW ...")
    for name in rows or ():
        check_known(f"row of table {' and '.join(tables)}" if tables else "row", name, known or ablations.rows)
    return list(known if rows is None else dict.fromkeys(rows))
