"""The page, served."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from ldlm_hf import LDLMPipeline


if importlib.util.find_spec("gradio") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def launch() -> Iterator[Callable[[LDLMPipeline], str]]:
    """Serves a pipeline's page on the loopback interface; gives its address."""
    from ldlm_hf.app import CSS, THEME, build_app

    apps = []

    def start(pipeline: LDLMPipeline) -> str:
        app = build_app(pipeline)
        apps.append(app)
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, inbrowser=False, theme=THEME, css=CSS)
        return url

    yield start
    for app in apps:
        app.close()
