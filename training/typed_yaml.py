"""YAML whose texts are read as they were typed: what a value means follows from the type of its setting.

YAML alone would read the text `no` as a truth value, `2018_05` as a number and `x #1.txt` as `x`, and OmegaConf
`${a}` as another setting's value.
"""

from __future__ import annotations

import re
from types import NoneType
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


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
    """A value of the command line: as it was typed where its type is text, and else YAML. `null` is None, and so is
    nothing at all where a text may be None."""
    if is_text(hint) and text != "null" and (text or hint is str):
        return as_typed(yaml.ScalarNode(TEXT, text))
    return parse(text, origin)


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
