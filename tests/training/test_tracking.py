"""The real trackers, offline, in a process of their own: what was written is read back from their files."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldlm_hf.training import tracking


TEXTS = ["w1 | w2\nw3", "“é” <b>"]
MARKDOWN = f"**1.** {TEXTS[0]}\n\n**2.** {TEXTS[1]}"
GRID = [(0.05, 0.5), (0.5, 0.3), (1.0, 0.9)]

# trackio reads its folder when it is imported
WRITE = f"""
import sys
from accelerate import Accelerator
from ldlm_hf.training.tracking import check_trackers, log_figure, log_samples, loss_over_time_figure, start_trackers

folder, names = sys.argv[1], ["tensorboard", "wandb", "trackio"]
check_trackers(names)
for resumed, steps in ((False, [1, 2]), (True, [3])):
    accelerator = Accelerator(cpu=True, log_with=names, project_dir=folder)
    start_trackers(accelerator, folder, {{"loop.seed": 7, "data.source": "here"}}, resumed)
    for step in steps:
        accelerator.log({{"loss": 0.5 / step}}, step=step)
        log_samples(accelerator, {TEXTS!r}, step)
        log_figure(accelerator, "diffusion_loss_over_t", loss_over_time_figure({GRID!r}, step), step)
    accelerator.end_training()
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A run of two steps, and of a third after it was resumed."""
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "wandb").mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(repository),
        "OMP_NUM_THREADS": "1",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder / "wandb"),
        "WANDB_MODE": "offline",
    }
    command = [sys.executable, "-c", WRITE, str(folder / "my-run")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def check_picture(picture: Image.Image) -> None:
    pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 200 and pixels.shape[1] > 300
    assert (pixels[0] == 255).all(), "white around the axes"
    assert 0.5 < (pixels == 255).all(-1).mean() < 0.99, "with lines and letters"


def test_tensorboard(written: Path) -> None:
    events = EventAccumulator(str(written / "my-run" / "ldlm")).Reload()
    assert [(item.step, item.value) for item in events.Scalars("loss")] == [
        (step, pytest.approx(0.5 / step)) for step in (1, 2, 3)
    ]
    texts = events.Tensors("samples/text_summary")
    assert [(item.step, item.tensor_proto.string_val[0].decode()) for item in texts] == [
        (step, MARKDOWN) for step in (1, 2, 3)
    ]
    images = events.Images("diffusion_loss_over_t")
    assert [item.step for item in images] == [1, 2, 3]
    image_file = written / "from_tensorboard.png"
    image_file.write_bytes(images[0].encoded_image_string)
    check_picture(Image.open(image_file))


def test_wandb(written: Path) -> None:
    folders = list((written / "wandb" / "wandb").glob("offline-run-*"))
    numbers = []
    for folder in folders:
        (log,) = folder.glob("run-*.wandb")
        for text in (b"ldlm", b"my-run", b"loop.seed", b"loss"):
            assert text in log.read_bytes()
        tables = sorted((folder / "files" / "media" / "table").glob("samples_*.json"))
        for table in tables:
            assert json.loads(table.read_text(encoding="utf-8")) == {
                "columns": ["number", "text"],
                "data": [[1, TEXTS[0]], [2, TEXTS[1]]],
            }
        pictures = sorted((folder / "files" / "media" / "images").glob("diffusion_loss_over_t_*.png"))
        check_picture(Image.open(pictures[0]))
        numbers.append((len(tables), len(pictures)))
    assert sorted(numbers) == [(1, 1), (2, 2)]


def test_trackio(written: Path) -> None:
    with closing(sqlite3.connect(written / "trackio" / "ldlm.db")) as store:
        rows = store.execute("select run_name, run_id, step, metrics from metrics order by step").fetchall()
        configs = [json.loads(config) for (config,) in store.execute("select config from configs")]
    assert {name for name, *_ in rows} == {"my-run"}
    assert len({run_id for _, run_id, *_ in rows}) == 1, "a resumed run goes on"
    assert all({"loop.seed": 7, "data.source": "here"}.items() <= config.items() for config in configs)
    values = [(step, key, value) for *_, step, metrics in rows for key, value in json.loads(metrics).items()]
    assert [(step, value) for step, key, value in values if key == "loss"] == [
        (step, 0.5 / step) for step in (1, 2, 3)
    ]
    texts = [(step, value["_value"]) for step, key, value in values if key == "samples"]
    assert texts == [(step, MARKDOWN) for step in (1, 2, 3)]
    pictures = [value["file_path"] for _, key, value in values if key == "diffusion_loss_over_t"]
    assert len(pictures) == 3
    check_picture(Image.open(written / "trackio" / "media" / pictures[0]))


def test_no_process_is_left(written: Path) -> None:
    """wandb's service inherits the folder that its run was started in."""

    def processes() -> list[Path]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            # others end while we look
            with suppress(OSError):
                if (process / "cwd").readlink() == written:
                    found.append(process)
        return found

    deadline = time.monotonic() + 10
    while processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes()


def test_loss_over_time_figure() -> None:
    figure = tracking.loss_over_time_figure(list(reversed(GRID)), step=1200)
    (axes,) = figure.axes
    (line,) = axes.lines
    assert [tuple(point) for point in line.get_xydata()] == GRID
    assert "time t" in axes.get_xlabel() and "diffusion loss" in axes.get_ylabel()
    assert "1,200" in axes.get_legend().get_texts()[0].get_text()
    image = tracking.figure_image(figure)
    assert image.dtype == np.uint8 and image.shape[2] == 3


def test_trackers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking.check_trackers([])
    tracking.check_trackers(["tensorboard", "wandb", "trackio"])
    with pytest.raises(ValueError, match=r"loop.trackers: 'tensorbord' is unknown; accelerate knows .*tensorboard"):
        tracking.check_trackers(["tensorbord"])
    with pytest.raises(ValueError, match="'all' is unknown"):
        tracking.check_trackers(["all"])
    (missing, *_) = (name for name in ("aim", "dvclive", "clearml") if importlib.util.find_spec(name) is None)
    with pytest.raises(ValueError, match=f"'{missing}' is not installed; pip install {missing}"):
        tracking.check_trackers(["tensorboard", missing])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        tracking.check_trackers(["tensorboard"])
    tracking.check_trackers([])
