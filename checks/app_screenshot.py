"""Drives the page of `ldlm_hf.app` in a real browser, and compares the texts that it shows with the pipeline's own.

    python checks/app_screenshot.py --pipeline runs/demo/pipeline [--seed 0] [--num_inference_steps 128]

It serves the page, opens it in a headless Chromium, generates with a seed and interpolates between two texts. Another
process prints what the pipeline gives for the same seed and texts. What was seen is written to
checks/app_screenshot.md, with three pictures. The exit status is not zero if a text differs, if another host is asked
for anything, or if the browser's log has an error. `tests/test_app.py` covers Stop, two visitors and bad values.

Needs the extra `app`, `pip install selenium`, and Chromium with its driver (Debian: chromium, chromium-driver).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import torch
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from ldlm_hf.evaluation.machine import device_name
from ldlm_hf.evaluation.markdown import markdown_table


HERE = Path(__file__).resolve().parent
WIDTH, HEIGHT = 1100, 720
NUM_TEXTS, DECODE_EVERY, NUM_POINTS = 2, 8, 5
FIRST_TEXT = "The Congress has passed laws for the peace and the prosperity of our people."
SECOND_TEXT = "Our army and our navy are ready to defend the freedom of all nations in the world."
BROWSER_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--window-size={WIDTH},{HEIGHT}",
]
# the pieces of a text in the order of the page; gradio shows a line break as an element of its own
READ_TEXT = """
return [...arguments[0].querySelectorAll(".textfield .text, .textfield br")]
    .map(node => node.tagName === "BR" ? "\\n" : node.textContent).join("")
"""
# what the page has to show: texts of a seed, and reconstructions of the interpolation's ends
PROGRAM = """
import json, sys, torch
from ldlm_hf import LDLMPipeline

path, batch_size, num_inference_steps, seed, *texts = sys.argv[1:]
pipe = LDLMPipeline.from_pretrained(path)
generator = torch.Generator().manual_seed(int(seed))
sampled = pipe(int(batch_size), int(num_inference_steps), generator=generator).texts
print(json.dumps([sampled, [pipe.decode(pipe.encode(text))[0] for text in texts]]))
"""


@contextmanager
def served_page(pipeline: str) -> Iterator[str]:
    """Runs the command of the page; gives its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ldlm_hf.app", "--pipeline", pipeline, "--port", str(port), "--device", "cpu"]
    url = f"http://127.0.0.1:{port}/"
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:

            def answers(_: None) -> bool:
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"The page's server has ended:\n{log.read()}")
                with urlopen(url):
                    return True

            WebDriverWait(None, timeout=120, ignored_exceptions=[OSError]).until(answers)
            yield url
        finally:
            server.terminate()


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """A headless Chromium without a past."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise OSError(f"Not on PATH: {' and '.join(missing)}. On Debian: apt install chromium chromium-driver.")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = paths["chromium"]
        for option in [*BROWSER_OPTIONS, f"--user-data-dir={profile}"]:
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(paths["chromedriver"]))
        try:
            yield driver
        finally:
            driver.quit()


class Page:
    """The page in the browser's tab."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: driver.find_elements(By.ID, "generate"))

    def wait(self, condition: Callable[[], Any], seconds: float = 300) -> Any:
        return WebDriverWait(
            self.driver, seconds, poll_frequency=0.05, ignored_exceptions=[NoSuchElementException]
        ).until(lambda _: condition())

    def enter(self, element_id: str, value: object) -> None:
        """Types a value into the field with this id."""
        field = self.driver.find_element(By.CSS_SELECTOR, f"#{element_id} :is(input[type=number], textarea)")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(value), Keys.TAB)

    def press(self, element_id: str) -> None:
        self.driver.find_element(By.ID, element_id).click()

    @property
    def status(self) -> str:
        return self.driver.find_element(By.ID, "status").text

    def boxes(self, name: str) -> list[WebElement]:
        """The boxes with texts that the page shows."""
        found = self.driver.find_elements(By.CSS_SELECTOR, f"[id^={name}-]")
        return [box for box in found if box.is_displayed()]

    def texts(self, name: str) -> list[str]:
        return [self.driver.execute_script(READ_TEXT, box) for box in self.boxes(name)]

    def picture(self, name: str) -> str:
        """Writes a picture of the whole page."""
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        path = HERE / f"app_screenshot_{name}.png"
        self.driver.save_screenshot(str(path))
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        return path.name


def foreign_hosts(driver: webdriver.Chrome, url: str) -> list[str]:
    """Hosts other than the page's own that the page asked anything of."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requests = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    addresses = [urlsplit(request["request"]["url"]) for request in requests if request["documentURL"].startswith(url)]
    hosts = {address.netloc for address in addresses if address.scheme not in ("data", "blob")}
    return sorted(hosts - {urlsplit(url).netloc})


def report(
    arguments: argparse.Namespace,
    texts: dict[str, list[str]],
    status: str,
    pictures: dict[str, str],
    checks: dict[str, bool],
    chromium: str,
) -> str:
    """What was seen, as Markdown."""
    weights = next(Path(arguments.pipeline, "transformer").glob("*.safetensors"))
    cells = [[text.replace("\n", "<br>") for text in column] for column in texts.values()]
    rows = [[str(number), *row] for number, row in enumerate(zip(*cells, strict=True), start=1)]
    images = "\n\n".join(f"{caption}:\n\n![{caption}]({name})" for name, caption in pictures.items())
    seen = [[name, "yes" if passed else "NO"] for name, passed in checks.items()]
    packages = ("torch", "gradio", "selenium")
    installed = ", ".join([*(f"{name} {version(name)}" for name in packages), f"chromium {chromium}"])
    line = "\n"
    return f"""# The page in a browser, beside what the pipeline prints

Written by

    python checks/app_screenshot.py --pipeline PIPELINE --seed {arguments.seed} \\
        --num_inference_steps {arguments.num_inference_steps}

with a pipeline the SHA-256 of whose `transformer/{weights.name}` is
`{hashlib.sha256(weights.read_bytes()).hexdigest()}`. The page was served by
`python -m ldlm_hf.app --pipeline PIPELINE` and driven in a headless Chromium; the pipeline printed its texts in
another process.

## The same texts

Seed {arguments.seed}, {arguments.num_inference_steps} steps, {NUM_TEXTS} texts; every {DECODE_EVERY} steps the
prediction was decoded for the page.

{line.join(markdown_table(["", *texts], rows))}

The page's own line at the end: "{status}".

## Pictures

{images}

## What was checked

{line.join(markdown_table(["", "seen"], seen))}

On {device_name(torch.device("cpu"))}, {os.cpu_count()} cores; {installed}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares what the page shows with what the pipeline prints.")
    parser.add_argument("--pipeline", required=True, help="folder of a pipeline with its encoders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, default=128)
    arguments = parser.parse_args()
    steps, seed = arguments.num_inference_steps, arguments.seed

    command = [sys.executable, "-c", PROGRAM, arguments.pipeline, str(NUM_TEXTS), str(steps), str(seed)]
    program = subprocess.run([*command, FIRST_TEXT, SECOND_TEXT], check=True, capture_output=True, text=True)
    printed, reconstructed = json.loads(program.stdout)
    checks: dict[str, bool] = {}
    with served_page(arguments.pipeline) as url, browser() as driver:
        page = Page(driver, url)

        # 1. The text emerges
        fields = {"steps": steps, "texts": NUM_TEXTS, "decode-every": DECODE_EVERY, "seed": seed}
        for element_id, value in fields.items():
            page.enter(element_id, value)
        page.press("generate")
        page.wait(lambda: page.status.startswith("Step ") and int(page.status.split()[1]) >= steps // 2)
        highlighted = driver.find_elements(By.CSS_SELECTOR, ".textfield .highlighted")
        checks["changed tokens were highlighted on the way"] = len(highlighted) > 0
        pictures = {page.picture("emerging"): "While the text emerges: tokens that changed are highlighted"}
        page.wait(lambda: "tokens/s" in page.status)
        pictures[page.picture("final")] = "At the end"
        status, shown = page.status, page.texts("generated")
        checks["the page's texts are those that the pipeline printed in another process"] = shown == printed

        # 2. Interpolation
        driver.find_element(By.XPATH, "//button[@role='tab' and contains(., 'Interpolate')]").click()
        page.wait(lambda: driver.find_element(By.ID, "interpolate").is_displayed())
        fields = {"points": NUM_POINTS, "first": FIRST_TEXT, "second": SECOND_TEXT}
        for element_id, value in fields.items():
            page.enter(element_id, value)
        page.press("interpolate")
        page.wait(lambda: len(page.boxes("point")) == NUM_POINTS)
        pictures[page.picture("interpolation")] = "Interpolation between two texts"
        ends = page.texts("point")[:: NUM_POINTS - 1]
        checks["the interpolation's ends are the reconstructions that the pipeline printed"] = ends == reconstructed

        # 3. The page keeps to itself
        foreign = foreign_hosts(driver, url)
        checks["the page asked nothing of another host"] = not foreign
        complaints = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        checks["the browser's log has no error"] = not complaints
        chromium = driver.capabilities["browserVersion"]
    texts = {"shown in the page": shown, "printed by the pipeline": printed}
    (HERE / "app_screenshot.md").write_text(report(arguments, texts, status, pictures, checks, chromium))
    for name, passed in checks.items():
        print(f"{'yes' if passed else 'NO '}  {name}")
    if not all(checks.values()):
        sys.exit(f"texts: {texts}\nrequests to: {foreign}\nbrowser's log: {complaints}")


if __name__ == "__main__":
    main()
