"""Reads settings: dataclasses ← YAML file ← dotted overrides (`section.key=value`).

A section is a field of the settings' dataclass: a dataclass of its own, or the arguments of a class
([`arguments_of`]). An unknown key is an error that names the nearest known one. A text is taken as it is typed, and
what a value means follows from the type of its setting: YAML alone would read the text `no` as a truth value,
`2018_05` as a number and `x #1.txt` as `x`, and OmegaConf `${a}` as another setting's value. `null` is None.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


Settings = TypeVar("Settings")


NULL, TEXT, MAPPING, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("null", "str", "map", "merge"))


def is_text(hint: Any) -> bool:
    """Whether an annotated type is text, or text or None."""
    return hint is str or set(get_args(hint)) == {str, NoneType}


def parse(text: str, origin: str) -> yaml.Node:
    """YAML as a tree of nodes; ValueError, with its origin, for what is none."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader) or yaml.ScalarNode(NULL, "null")
    except yaml.YAMLError as error:
        raise ValueError(f"{origin}: no YAML, {' '.join(str(error).split())}.") from error


def parse_value(text: str, hint: Any, origin: str) -> yaml.Node:
    """A value of the command line: as it was typed where its type is text, and else YAML with its texts as they were
    typed. `null` is None, and so is nothing at all where a text may be None."""
    if is_text(hint) and text != "null" and (text or hint is str):
        return as_typed(yaml.ScalarNode(TEXT, text))
    return keep_texts(parse(text, origin), hint)


def as_typed(node: yaml.ScalarNode) -> yaml.ScalarNode:
    """A scalar as a text that stands for itself: quoted for YAML, and escaped for OmegaConf."""
    escaped = re.sub(r"(\\*)\$\{", lambda match: rf"{match[1] * 2}\${{", node.value)
    return yaml.ScalarNode(TEXT, escaped, style=node.style or "'")


def under(key: str, node: yaml.Node) -> yaml.MappingNode:
    """A mapping of one key."""
    return yaml.MappingNode(MAPPING, [(yaml.ScalarNode(TEXT, key, style="'"), node)])


def to_config(node: yaml.Node, origin: str) -> Any:
    """A tree of nodes as OmegaConf reads it; ValueError, with its origin, for what it cannot."""
    try:
        return OmegaConf.create(yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{origin}: {' '.join(str(error).split())}.") from error


def arguments_of(constructor: Callable[..., None]) -> Any:
    """A field that holds arguments of a class, by name; `constructor` is its `__init__`."""
    return field(default_factory=dict, metadata={"arguments_of": constructor})


def hint_of(owner: Any, key: str) -> Any:
    """What a key of a section takes: an annotated type, or again a constructor; None where there is no such key, or
    anything may stand. `owner` describes the section: a dataclass, or the constructor whose arguments it holds.
    """
    if is_dataclass(owner):
        constructors = {item.name: item.metadata.get("arguments_of") for item in fields(owner)}
        return constructors.get(key) or get_type_hints(owner).get(key)
    return get_type_hints(owner).get(key) if inspect.isfunction(owner) else None


def known_keys(owner: Any) -> list[str]:
    """The keys of a section, which `owner` describes as for [`hint_of`]."""
    if is_dataclass(owner):
        return [item.name for item in fields(owner)]
    parameters = inspect.signature(owner).parameters.values()
    return [item.name for item in parameters if item.name != "self" and item.kind is not item.VAR_KEYWORD]


def type_of(settings_class: type, name: str) -> Any:
    """What the setting of a dotted name takes, as [`hint_of`] says it."""
    hint: Any = settings_class
    for key in name.split("."):
        hint = hint_of(hint, key)
    return hint


def override_node(override: str, settings_class: type) -> yaml.Node:
    """`section.key=value` as the nodes of its YAML; ValueError for what is none."""
    name, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"{override!r} is no override; write section.key=value.")
    node = parse_value(value, type_of(settings_class, name), override)
    for key in reversed(name.split(".")):
        node = under(key, node)
    return node


def keep_texts(node: yaml.Node, hint: Any) -> yaml.Node:
    """The nodes of a value of an annotated type, or of a section, the texts in it as they were typed."""
    if isinstance(node, yaml.MappingNode):
        pairs = [
            (key, keep_texts(value, hint if key.tag == MERGE else hint_of(hint, key.value)))
            for key, value in node.value
        ]
        return yaml.MappingNode(node.tag, pairs)
    if isinstance(node, yaml.SequenceNode):
        item_hint = next(iter(get_args(hint)), hint)
        return yaml.SequenceNode(node.tag, [keep_texts(item, item_hint) for item in node.value])
    return as_typed(node) if is_text(hint) and node.tag != NULL else node


def check_keys(values: Any, settings_class: type, origin: str) -> None:
    """Raises ValueError for a key that no section has, and names the nearest one that there is."""

    def visit(node: Any, owner: Any, prefix: str) -> None:
        if not isinstance(node, dict):
            raise ValueError(f"{origin}: {prefix.rstrip('.') or 'the settings'} must be a section of keys and values.")
        keys = known_keys(owner)
        for key, value in node.items():
            name = f"{prefix}{key}"
            if key not in keys:
                # a slip of the pen, or the right key in the wrong section
                everywhere = list(flatten(asdict(settings_class())))
                nearest = [f"{prefix}{match}" for match in difflib.get_close_matches(str(key), keys, n=1)]
                nearest += [known for known in everywhere if known.split(".")[-1] == key]
                nearest += difflib.get_close_matches(name, everywhere, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known here: {', '.join(keys)}."
                raise ValueError(f"{origin}: unknown setting {name!r}; {hint}")
            child = hint_of(owner, str(key))
            if is_dataclass(child) or inspect.isfunction(child):
                visit(value, child, f"{name}.")

    visit(values, settings_class, "")


def load_settings(
    settings_class: type[Settings], config: str | None, overrides: Sequence[str], ignore_other_sections: bool = False
) -> Settings:
    """Merges a dataclass's defaults, a YAML file and dotted overrides (`section.key=value`), in this order.

    Args:
        ignore_other_sections: read no section of the file that the dataclass does not have, instead of refusing it.

    Raises:
        OSError: the file is not there.
        ValueError: an unknown key, a value of a wrong type, or an override that is not `key=value`.
    """
    layers: list[tuple[str, DictConfig]] = []
    if config is not None:
        if not Path(config).is_file():
            raise OSError(f"--config {config!r}: there is no such file.")
        node = parse(Path(config).read_text(encoding="utf-8"), config)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"--config {config!r} must hold sections of keys and values.")
        if ignore_other_sections:
            known = known_keys(settings_class)
            node.value = [(key, section) for key, section in node.value if key.value in known]
        layers.append((config, to_config(keep_texts(node, settings_class), config)))
    for override in overrides:
        layers.append((override, to_config(override_node(override, settings_class), override)))

    merged = OmegaConf.structured(settings_class)
    for origin, layer in layers:
        check_keys(OmegaConf.to_container(layer), settings_class, origin)
        try:
            merged = OmegaConf.unsafe_merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ValueError(f"{origin}: {str(error).splitlines()[0]} ({error.full_key}).") from error
    values = {}
    for key in merged:
        try:
            values[key] = OmegaConf.to_object(merged[key]) if OmegaConf.is_config(merged[key]) else merged[key]
        except ValueError as error:
            # a section checks itself, and does not know its place
            raise ValueError(f"{key}.{error}") from error
    return settings_class(**values)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def to_yaml(settings: Any) -> str:
    """Settings as YAML text."""
    return yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True)


def added(default: Any, before: Any) -> Any:
    """A setting that came later than others of its section, and the value that says what was done before it came."""
    return field(default=default, metadata={"before": before})


def saved_values(settings_class: type, sections: dict[str, Any]) -> dict[str, Any]:
    """Saved sections of settings by dotted keys.

    A setting that they do not have was added later than they were saved, and had its default then, or the value that
    [`added`] names.
    """
    settings = settings_class()
    values = asdict(settings)
    for key, section in sections.items():
        if not (isinstance(section, dict) and isinstance(values.get(key), dict)):
            values[key] = section
            continue
        if is_dataclass(getattr(settings, key)):
            later = fields(getattr(settings, key))
            values[key] |= {field.name: field.metadata["before"] for field in later if "before" in field.metadata}
        values[key] |= section
    return flatten(values)


def differences(settings: Any, others: str) -> list[str]:
    """Dotted keys in which settings differ from those of a saved YAML text, as [`saved_values`] reads it."""
    mine = flatten(asdict(settings))
    theirs = saved_values(type(settings), yaml.safe_load(others))
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def positive(text: str) -> int:
    """A whole number of at least 1, as a type of argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)
