"""A page in the browser: watch texts emerge from noise, continue, fill and edit texts, and walk between two of them.

    python -m ldlm_hf.app --pipeline runs/demo/pipeline

Needs the extra `app` (gradio). A Hub Space serves the same page by
`build_app(pipeline).launch(theme=THEME, css=CSS)`.
"""

try:
    import gradio  # noqa: F401
except ImportError as error:
    raise ImportError("ldlm_hf.app needs gradio; install it with `pip install ldlm_hf[app]`.") from error

from .marked_texts import CSS
from .page import THEME, build_app


__all__ = ["CSS", "THEME", "build_app"]
