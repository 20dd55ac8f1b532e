"""Trackers of a run: tensorboard, wandb and trackio through accelerate, with sample texts and pictures.

Numbers go to every tracker by `accelerator.log`. wandb's `WANDB_MODE=offline` and trackio's default keep them on this
machine. Other trackers of accelerate get the numbers only.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType


if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = "ldlm"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that accelerate does not know or that is not installed, before any training.

    accelerate itself leaves out, without a word, a tracker whose package is missing. The pictures need matplotlib.
    """
    known = [logger.value for logger in LoggerType if logger is not LoggerType.ALL]
    installed = [logger.value for logger in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"loop.trackers: {name!r} is unknown; accelerate knows {', '.join(known)}.")
        if name not in installed:
            raise ValueError(f"loop.trackers: {name!r} is not installed; pip install {name}, or leave it out.")
    if names and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"loop.trackers={list(names)} are given pictures, which need matplotlib: pip install matplotlib, or set "
            "loop.trackers=[]."
        )


def start_trackers(accelerator: Accelerator, output_dir: str | Path, config: Mapping[str, Any], resumed: bool) -> None:
    """Starts the accelerator's trackers; the run is called what its folder is called, in the project `ldlm`.

    wandb's files go into that folder, unless `WANDB_DIR` names another. Where a run is resumed, trackio goes on with
    its run of that name; wandb begins another, unless `WANDB_RUN_ID` and `WANDB_RESUME` say which to go on with.
    """
    name = Path(output_dir).resolve().name
    accelerator.init_trackers(
        PROJECT,
        config=dict(config),
        init_kwargs={
            "wandb": {"name": name, "dir": os.environ.get("WANDB_DIR", str(output_dir))},
            "trackio": {"name": name, "resume": "allow" if resumed else "never"},
        },
    )


def log_samples(accelerator: Accelerator, texts: Sequence[str], step: int) -> None:
    """Writes sample texts to the trackers, as text: `samples` at a step."""
    if not accelerator.is_main_process:
        return
    markdown = "\n\n".join(f"**{number}.** {text}" for number, text in enumerate(texts, 1))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log({"samples": markdown}, step=step)
        elif tracker.name == "wandb":
            rows = [[number, text] for number, text in enumerate(texts, 1)]
            tracker.log_table("samples", columns=["number", "text"], data=rows, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({"samples": trackio.Markdown(markdown)}, step=step)


def log_figure(accelerator: Accelerator, name: str, figure: Figure, step: int) -> None:
    """Writes a matplotlib figure to the trackers, as an image."""
    if not accelerator.is_main_process:
        return
    image = figure_image(figure)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(image)}, step=step)


def figure_image(figure: Figure) -> np.ndarray:
    """A figure as an image of type uint8 and shape (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def loss_over_time_figure(grid: Sequence[tuple[float, float]], step: int) -> Figure:
    """The held-out diffusion loss over t, as pairs of t and loss, drawn as for the model card."""
    from ..hub.training_curves import GRID_PREFIX, plot_diffusion_loss

    return plot_diffusion_loss([{"step": step} | {f"{GRID_PREFIX}{t}": loss for t, loss in grid}])
