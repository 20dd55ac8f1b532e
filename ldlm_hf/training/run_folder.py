"""The folder of a run: whose it is, and its log."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..loading.settings_reader import differences, flatten, saved_values, to_yaml
from .checkpoints import remove_unfinished, resolve_checkpoint
from .settings import LoopRunSettings, TrainingSettings


METRICS = "metrics.jsonl"
# where a run ends, and how
END_OF_RUN = ("loop.max_steps", "optimizer.lr_decay_steps")
# settings that a resumed run may change: they decide neither which tokens a step sees nor, but for rounding, what it
# makes of them
RESUMABLE_CHANGES = (
    "data.cache_dir",
    "data.max_validation_documents",
    "data.num_proc",
    "data.validation_split",
    "evaluation.",
    "loop.checkpointing_steps",
    "loop.checkpoints_total_limit",
    "loop.compile",
    "loop.dataloader_workers",
    "loop.device_batch_size",
    "loop.gradient_checkpointing",
    "loop.logging_steps",
    "loop.max_nonfinite_steps",
    "loop.output_dir",
    "loop.peak_tflops",
    "loop.trackers",
    *END_OF_RUN,
)
# what the statistics of hidden states, which a checkpoint holds, were measured on
TOKEN_ENCODER_SETTINGS = ("model.backbone", "model.layer", "model.representation", "model.prefix")
# text may have moved: a position in text at random access knows which text it is of, and one in a stream does not
MOVABLE = "data.source"


def check_output_dir(settings: TrainingSettings, resume_from_checkpoint: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, if any; writes nothing, so that it can be asked before any work is done.

    `latest` is the standing flag of a job that may be queued again: where no step was taken yet it starts the run.
    ValueError where the folder holds another run, OSError where the checkpoint of one that has taken steps is missing
    or damaged.
    """
    output_dir = Path(settings.loop.output_dir)
    checkpoint = None
    if resume_from_checkpoint is not None:
        checkpoint = resolve_checkpoint(output_dir, resume_from_checkpoint)
        log = output_dir / METRICS
        if checkpoint is None and not overwrite and log.is_file() and log.stat().st_size:
            raise OSError(
                f"--resume_from_checkpoint latest: {output_dir} holds a run that has taken steps, and no checkpoint. "
                "Start it anew with --overwrite_output_dir, or name another folder; loop.checkpointing_steps="
                f"{settings.loop.checkpointing_steps} is how many steps a run is stopped after without one."
            )
    if checkpoint is not None:
        check_token_encoder(settings, checkpoint)
    saved = output_dir / "settings.yaml"
    if not saved.is_file() or (overwrite and checkpoint is None):
        return checkpoint
    if resume_from_checkpoint is None:
        raise ValueError(
            f"loop.output_dir={str(output_dir)!r} holds another run. Name another folder, go on with "
            "--resume_from_checkpoint latest, or delete that run with --overwrite_output_dir."
        )
    changed = differences(settings, saved.read_text(encoding="utf-8"))
    changed = [key for key in changed if not key.startswith(RESUMABLE_CHANGES)]
    if checkpoint is not None and not settings.data.streaming and MOVABLE in changed:
        changed.remove(MOVABLE)
    if changed:
        raise ValueError(
            f"loop.output_dir={str(output_dir)!r} holds a run whose settings differ in {', '.join(changed)}; resume "
            "with the settings that are saved there as settings.yaml, or take other ones from its state on as a new "
            f"run: --resume_from_checkpoint {checkpoint or 'CHECKPOINT'} loop.output_dir=ANOTHER."
        )
    return checkpoint


def check_token_encoder(settings: TrainingSettings, checkpoint: Path) -> None:
    """Raises ValueError where a checkpoint's run had another token encoder than the settings say."""
    saved = checkpoint.parent / "settings.yaml"
    if not saved.is_file():
        return
    theirs = saved_values(type(settings), yaml.safe_load(saved.read_text(encoding="utf-8")))
    mine = flatten(asdict(settings))
    for key in TOKEN_ENCODER_SETTINGS:
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{key}={mine[key]} differs from that of the run of --resume_from_checkpoint {checkpoint}, "
                f"{theirs[key]}: its models know the hidden states of that token encoder. Set {key}={theirs[key]}."
            )


def delete_run(output_dir: Path) -> None:
    """Deletes the run that a folder holds, if it holds one."""
    if (output_dir / "settings.yaml").is_file():
        shutil.rmtree(output_dir)


def claim_output_dir(settings: LoopRunSettings) -> None:
    """Makes the folder this run's own: with its settings, and without half-written checkpoints."""
    output_dir = Path(settings.loop.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output_dir)
    (output_dir / "settings.yaml").write_text(to_yaml(settings), encoding="utf-8")


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, in the order of the steps.

    A full disk does not end a run of days: what cannot be written waits, and is written with the next record.
    """

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []

    def rewind(self, step: int) -> None:
        """Drops what is behind a step: a process that was killed may have logged beyond its last checkpoint."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        # the last line may be half a one
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, record: dict[str, Any]) -> str | None:
        """Appends a line; what went wrong, if it could not."""
        self.waiting.append(json.dumps(record) + "\n")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8") as log:
                log.write("".join(self.waiting))
        except OSError as error:
            if self.path.is_file():
                with self.path.open("r+", encoding="utf-8") as log:
                    log.truncate(size)
            return str(error)
        self.waiting.clear()
        return None
