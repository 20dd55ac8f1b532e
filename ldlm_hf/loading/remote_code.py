"""Self-contained code for repositories on the Hub, generated from the sources of this package.

With it, `DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)` works where `ldlm_hf` is not installed. The
layout is a format, which published repositories keep for good:

    model_index.json            "_class_name": ["pipeline_ldlm", "LDLMPipeline"],
                                "transformer": ["ldlm_hf", "LDLMTransformer1DModel"], ...
    pipeline_ldlm.py            the pipeline
    <component>/ldlm_hf.py      the class of one component, with all that it needs of this package
    <component>/config.json     of transformers' models, "auto_map": {"AutoModel": "<component>/ldlm_hf.<class>", ...}

diffusers copies each file to one place, executes it there by itself, and forgets where it came from: a file may import
nothing of its repository, two files do not share their classes, and the file of a component is named like this
package, so that the installed class is found where there is one. transformers looks for code from the top of the
repository, whatever the subfolder.

A file holds the definitions that one class needs, in their order and with their comments, under the imports that they
need. Definitions of several modules come to stand side by side, so a name must mean the same in all of them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import PreTrainedModel

from . import recorded_code


PACKAGE = __name__.partition(".")[0]


def class_source(cls: type) -> str | None:
    """The self-contained file of the class of a pipeline or component.

    Returns:
        What [`generate`] makes of a class of this package; the recorded text of a class that itself came out of a
        repository; None for all others, such as a tokenizer's.
    """
    if cls.__module__.startswith(f"{PACKAGE}."):
        return generate(cls)
    return recorded_code.class_source(cls)


@functools.cache
def generate(cls: type) -> str:
    """The self-contained file of one class of this package: a pipeline, or a component of one.

    Raises:
        ValueError: sources that cannot be put into one file; the message says what to change.
    """
    file = SelfContainedFile(cls)
    file.require(cls.__module__, cls.__name__)
    return file.render()


@dataclass
class Definition:
    """A function, class or assignment at the top of a module.

    Attributes:
        source: its text, from the comment above it on.
        names: the names in it.
    """

    source: str
    names: set[str]


@dataclass
class ModuleSource:
    """A module of this package, taken apart.

    Attributes:
        docstring: the module's.
        definitions: by name, in their order.
        imports: name → statements that import it from elsewhere.
        package_imports: name → module of this package that it comes from.
    """

    docstring: str
    definitions: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, set[str]] = field(default_factory=dict)
    package_imports: dict[str, str] = field(default_factory=dict)


@functools.cache
def read_module(name: str) -> ModuleSource:
    """Takes the source of a module of this package apart; ValueError where it holds what cannot be moved."""
    source = inspect.getsource(importlib.import_module(name))
    tree, lines = ast.parse(source), source.splitlines()
    module = ModuleSource(ast.get_docstring(tree) or "")
    end_of_last = 0
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            read_import(statement, name, module)
        elif not (is_docstring(statement) or is_command(statement)):
            first_line = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", []))])
            # comments belong to what follows them
            comments = [line for line in range(end_of_last + 1, first_line) if lines[line - 1].startswith("#")]
            text = "\n".join(lines[min([first_line, *comments]) - 1 : statement.end_lineno])
            names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            module.definitions[bound_name(statement, name)] = Definition(text, names)
        end_of_last = statement.end_lineno or statement.lineno
    return module


def is_docstring(statement: ast.stmt) -> bool:
    """Whether a statement is nothing but text."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def is_command(statement: ast.stmt) -> bool:
    """Whether a statement is what a module does when it is run: `if __name__ == "__main__":`."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"


def bound_name(statement: ast.stmt, module_name: str) -> str:
    """The name that a statement at the top of a module defines; ValueError unless it defines a plain name."""
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    raise ValueError(
        f"{module_name}, line {statement.lineno}: a self-contained file takes only imports, functions, classes "
        "and assignments of plain names from the top of a module."
    )


def read_import(statement: ast.Import | ast.ImportFrom, module_name: str, module: ModuleSource) -> None:
    """Notes what an import at the top of a module binds; those of this package are relative."""
    for alias in statement.names:
        renamed = f" as {alias.asname}" if alias.asname else ""
        bound = alias.asname or alias.name.partition(".")[0]
        if isinstance(statement, ast.Import):
            module.imports.setdefault(bound, set()).add(f"import {alias.name}{renamed}")
        elif statement.level == 0:
            module.imports.setdefault(bound, set()).add(f"from {statement.module} import {alias.name}{renamed}")
        else:
            origin = "." * statement.level + (statement.module or "")
            package = importlib.import_module(module_name).__package__
            module.package_imports[bound] = importlib.util.resolve_name(origin, package)


class SelfContainedFile:
    """Gathers, name by name, what a class needs, and writes it down."""

    # modules that are others in a generated file
    replacements = {__name__: recorded_code.__name__}

    def __init__(self, cls: type):
        self.cls = cls
        self.definitions: dict[str, set[str]] = {}  # module → names
        self.imports = {"from pathlib import Path"}
        self.components: set[str] = set()
        self.meanings: dict[str, tuple[object, str]] = {"Path": (Path, "pathlib")}

    def claim(self, name: str, module_name: str) -> bool:
        """Takes a name for what it means in a module. Whether it is new; ValueError if it has another meaning."""
        value = getattr(importlib.import_module(module_name), name)
        is_new = name not in self.meanings
        known, where = self.meanings.setdefault(name, (value, module_name))
        if known is not value:
            raise ValueError(
                f"{name!r} is one thing in {where} and another in {module_name}; both come to stand in the "
                f"self-contained file of {self.cls.__name__}, so rename one."
            )
        return is_new

    def require(self, module_name: str, name: str) -> None:
        """Adds a definition, and all that it refers to."""
        module_name = self.replacements.get(module_name, module_name)
        if name in self.definitions.setdefault(module_name, set()):
            return
        self.claim(name, module_name)
        self.definitions[module_name].add(name)
        module = read_module(module_name)
        for used in sorted(module.definitions[name].names):
            origin = module_name if used in module.definitions else module.package_imports.get(used)
            if used in module.imports:
                # the same thing may be imported from several places
                if self.claim(used, module_name):
                    self.imports |= module.imports[used]
            elif origin is not None and not self.is_component(module_name, used):
                self.require(origin, used)
            elif origin is not None:
                self.claim(used, module_name)
                self.components.add(used)

    def is_component(self, module_name: str, name: str) -> bool:
        """Whether a name is the class of a component of the pipeline that this file is for."""
        value = getattr(importlib.import_module(module_name), name)
        component_classes = (ModelMixin, SchedulerMixin, PreTrainedModel)
        is_pipeline = issubclass(self.cls, DiffusionPipeline)
        return is_pipeline and inspect.isclass(value) and issubclass(value, component_classes)

    def sorted_modules(self) -> list[str]:
        """The modules that definitions are taken from, each behind those that it imports."""
        modules: list[str] = []

        def visit(module_name: str) -> None:
            for origin in read_module(module_name).package_imports.values():
                replaced = self.replacements.get(origin, origin)
                if replaced in self.definitions and replaced not in modules:
                    visit(replaced)
            modules.append(module_name)

        visit(self.cls.__module__)
        return modules

    def render(self) -> str:
        """The text of the file."""
        version = sys.modules[PACKAGE].__version__
        header = (
            f"# Generated by {PACKAGE} {version} from {module_path(self.cls.__module__)}, where it is to be edited.\n"
            "# SPDX-License-Identifier: Apache-2.0\n"
            f'"""{read_module(self.cls.__module__).docstring}"""\n\n'
            "from __future__ import annotations\n\n" + "\n".join(sorted(self.imports)) + "\n"
        )
        blocks = []
        if self.components:
            stand_ins = "\n".join(f"{name} = object" for name in sorted(self.components))
            blocks.append(f"# the classes themselves lie in the components' folders\n{stand_ins}")
        for module_name in self.sorted_modules():
            blocks += self.render_module(module_name)
        name = self.cls.__name__
        blocks.append(
            "# what saving a pipeline writes beside its weights\n"
            f'{name}._repository_code = Path(__file__).read_text(encoding="utf-8")'
        )
        return header + "\n\n" + "\n\n\n".join(blocks) + "\n"

    def render_module(self, module_name: str) -> Iterator[str]:
        """The parts of one module, its docstring as a comment above them, since the file has one of its own."""
        module = read_module(module_name)
        comment = ""
        if module_name != self.cls.__module__:
            lines = [f"from {module_path(module_name)}:", "", *module.docstring.splitlines()]
            comment = "\n".join(f"# {line}".rstrip() for line in lines) + "\n\n\n"
        for name, definition in module.definitions.items():
            if name in self.definitions[module_name]:
                yield comment + definition.source
                comment = ""


def module_path(name: str) -> str:
    """Path of a module's file from the top of the repository."""
    is_package = hasattr(importlib.import_module(name), "__path__")
    return name.replace(".", "/") + ("/__init__.py" if is_package else ".py")
