"""Pages for people: links lead somewhere, commands exist with the options they are given, the README is short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *(REPOSITORY / "training" / folder / "README.md" for folder in ("configs", "data")),
    *sorted((REPOSITORY / "model_cards").rglob("*.md")),
]
MAX_README_LINES = 150
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# where the arguments of a command end: a comment, or what a shell runs next
NEXT_COMMAND = re.compile(r"\s#|[;|&\n]")
SCRIPT = re.compile(r"(?<![\w/])training/(\w+)\.py")
MODULE = re.compile(r"python -m (ldlm_hf[\w.]*)")
REPOSITORY_FILE = re.compile(
    r"(?<![\w/.-])(?:training|tests|checks|docs|ldlm_hf)/[\w./-]+\.(?:py|md|yaml|sh|png|gz)\b"
)


def page_id(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def code_of(page: Path) -> list[str]:
    """Fenced code with its continued lines joined, and code within sentences."""
    text = page.read_text(encoding="utf-8")
    fenced = [code.replace("\\\n", " ") for language, code in FENCE.findall(text) if language != "python"]
    return fenced + INLINE_CODE.findall(FENCE.sub("", text))


def arguments_after(code: str, position: int) -> list[str]:
    """Arguments of the command that ends at a position."""
    return shlex.split(NEXT_COMMAND.split(code[position:], maxsplit=1)[0])


def options_by_command() -> dict[str, dict[str, str]]:
    """Command of `training/` → option → a page that gives it."""
    found: dict[str, dict[str, str]] = {}
    for page in PAGES:
        for code in code_of(page):
            for match in SCRIPT.finditer(code):
                options = found.setdefault(match[1], {})
                for argument in arguments_after(code, match.end()):
                    if argument.startswith("--"):
                        options[argument] = page_id(page)
    return found


def heading_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(REPOSITORY), link
        assert not anchor or anchor in heading_anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_code_names_exist(page: Path) -> None:
    for code in code_of(page):
        for name in REPOSITORY_FILE.findall(code):
            assert "NAME" in name or (REPOSITORY / name).exists(), name


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_every_page_of_the_docs_is_in_their_index() -> None:
    index = REPOSITORY / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text("utf-8"))}
    assert set((REPOSITORY / "docs").rglob("*.md")) - {index} <= linked


@pytest.mark.parametrize(("command", "options"), options_by_command().items(), ids=list(options_by_command()))
def test_commands_have_the_options_that_pages_give_them(
    command: str, options: dict[str, str], run_script: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_script(command, "--help")
    assert stopped.value.code == 0
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    unknown = {option: page for option, page in options.items() if option not in known}
    assert not unknown, f"training/{command}.py lacks {unknown}"


def test_modules_that_pages_run_have_the_options_that_they_give() -> None:
    for page in PAGES:
        for code in code_of(page):
            for match in MODULE.finditer(code):
                place = REPOSITORY / match[1].replace(".", "/")
                file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
                source = file.read_text(encoding="utf-8")
                for argument in arguments_after(code, match.end()):
                    assert not argument.startswith("--") or f'"{argument}"' in source, (page, match[0], argument)
