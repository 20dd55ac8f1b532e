"""The page as a person uses it, in a headless Chromium (Debian's package `chromium`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ldlm_hf import LDLMPipeline


playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")]


@pytest.fixture
def page() -> Iterator[playwright.Page]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1200, "height": 900})
        browser.close()


def shown(page: playwright.Page, box: str) -> str:
    return "".join(page.locator(f"#{box} .text").all_text_contents())


def expect_marked(page: playwright.Page, box: str, words: list[str]) -> None:
    """Waits until a box marks these words, and no others."""
    playwright.expect(page.locator(f"#{box} .highlighted")).to_have_text(words, timeout=30_000)


def test_a_person_continues_fills_and_edits(
    make_conditional_pipeline: Callable[[], LDLMPipeline],
    launch: Callable[[LDLMPipeline], str],
    page: playwright.Page,
    tmp_path: Path,
):
    pipeline = make_conditional_pipeline()
    arguments = {"num_inference_steps": 64}
    page.goto(launch(pipeline))

    page.get_by_role("tab", name="Continue").click()
    page.get_by_label("Prompt").fill("w5 w6")
    page.locator("#new-tokens input[type=number]").fill("20")
    page.locator("#continue").click()
    long = {"num_texts_per_prompt": 2, "max_new_tokens": 20, **arguments}
    for box, text in enumerate(pipeline("w5 w6", generator=torch.Generator().manual_seed(0), **long).texts):
        written = page.locator(f"#continued-{box} .unlabeled")
        playwright.expect(written).to_have_text(text.removeprefix("w5 w6"), timeout=30_000)
        expect_marked(page, f"continued-{box}", ["w5 w6"])
    page.screenshot(path=tmp_path / "continue.png")

    page.get_by_role("tab", name="Infill").click()
    page.get_by_label("Text with gaps").fill("w5 ___ w6 w7")
    page.locator("#infill").click()
    expect_marked(page, "filled", ["w5", "w6 w7"])
    filled = pipeline.infill("w5 ___ w6 w7", gap_tokens=4, generator=torch.Generator().manual_seed(0), **arguments)
    assert shown(page, "filled") == filled.texts[0]
    page.screenshot(path=tmp_path / "infill.png")
    # one line, not a line for each piece
    tops = page.locator("#filled .text").evaluate_all("pieces => pieces.map(one => one.getBoundingClientRect().top)")
    assert max(tops) - min(tops) < 10

    page.get_by_label("Text with gaps").fill("w5 w6")
    page.locator("#infill").click()
    message = page.get_by_text("`gap`='___' does not occur in 'w5 w6'; mark the gaps with it.")
    playwright.expect(message).to_be_visible()

    page.get_by_role("tab", name="Edit").click()
    page.locator("#unedited textarea").fill("w5 w6 w7 w8")
    page.locator("#edit").click()
    edited = pipeline.edit("w5 w6 w7 w8", strength=0.2, generator=torch.Generator().manual_seed(0), **arguments)
    pairs = list(zip(["w5", "w6", "w7", "w8"], edited.texts[0].split(), strict=True))
    playwright.expect(page.locator("#edited .highlighted").first).to_be_visible(timeout=30_000)
    assert [shown(page, "original"), shown(page, "edited")] == ["w5 w6 w7 w8", edited.texts[0]]
    for side, box in enumerate(("original", "edited")):
        words = " ".join(page.locator(f"#{box} .highlighted").all_inner_texts()).split()
        assert words == [pair[side] for pair in pairs if pair[0] != pair[1]]
    page.screenshot(path=tmp_path / "edit.png")
