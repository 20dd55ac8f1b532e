"""The direction of imports: downwards only, without a circle (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
# from the bottom up; a room imports from its own floor and those below it
FLOORS = (
    {"loading"},
    {"models", "schedulers", "metrics", "data"},
    {"pipelines", "objective"},
    {"hub", "app"},
    {"evaluation"},
    {"training"},
    {"baselines"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LIBRARY = sorted((REPOSITORY / "ldlm_hf").rglob("*.py"))
COMMANDS = sorted((REPOSITORY / "training").glob("*.py"))
PARTS_OF_COMMANDS = sorted((REPOSITORY / "training").glob("*/*.py"))


def module_name(file: Path) -> str:
    """The name that a module is imported by: a script finds what lies beside it in `training/`."""
    root = REPOSITORY if file.is_relative_to(REPOSITORY / "ldlm_hf") else REPOSITORY / "training"
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# `evaluate` is the package, which training/evaluate.py shares its name with
MODULES = {module_name(file): file for file in [*LIBRARY, *COMMANDS, *PARTS_OF_COMMANDS] if file.stem != "evaluate"}


def imported(file: Path, tree: ast.AST) -> Iterator[str]:
    """Modules of ours that are imported anywhere in a tree."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                yield from (name for name in [f"{origin}.{alias.name}", origin] if name in MODULES)


def of_file(file: Path) -> set[str]:
    return set(imported(file, ast.parse(file.read_text(encoding="utf-8")))) - {module_name(file)}


def room(name: str) -> str | None:
    """`ldlm_hf.hub.publish` → `hub`; None for what lies above all rooms."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ldlm_hf" and len(parts) > 1 and parts[1] in FLOOR_OF else None


def test_every_folder_of_the_library_is_a_room_with_a_floor() -> None:
    folders = {path.parent.name for path in (REPOSITORY / "ldlm_hf").glob("*/__init__.py")}
    assert folders <= FLOOR_OF.keys()


@pytest.mark.parametrize("file", LIBRARY, ids=module_name)
def test_no_room_imports_from_a_floor_above_it(file: Path) -> None:
    here = room(module_name(file))
    if here is None:
        return
    for name in of_file(file):
        assert name.startswith("ldlm_hf"), f"imports the script or part of one {name}"
        there = room(name)
        assert there is not None, f"imports {name}, which lies above all rooms"
        assert FLOOR_OF[there] <= FLOOR_OF[here], f"imports {name} from a floor above"


def test_no_module_imports_a_command() -> None:
    commands = {module_name(file) for file in COMMANDS}
    for file in MODULES.values():
        assert not of_file(file) & commands, file


def test_imports_have_no_circle() -> None:
    # a package's __init__ is run before its modules, whose names it may hand on
    packages = {module_name(file) for file in MODULES.values() if file.name == "__init__.py"}
    graph = {name: of_file(file) - packages for name, file in MODULES.items() if name not in packages}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(graph)


def test_rooms_have_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, file in MODULES.items():
        here = room(name)
        if here is not None:
            graph.setdefault(here, set()).update(there for one in of_file(file) if (there := room(one)) is not None)
    list(TopologicalSorter({here: rooms - {here} for here, rooms in graph.items()}).static_order())


def test_only_the_root_and_the_page_import_the_root() -> None:
    allowed = {"ldlm_hf", "ldlm_hf.registration", "ldlm_hf.app"}
    for file in LIBRARY:
        if module_name(file) not in allowed:
            assert "ldlm_hf" not in of_file(file), file
