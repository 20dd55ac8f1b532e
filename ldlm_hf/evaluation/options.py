"""What an evaluation is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .real_text import CONTROLS, check_mauve_size
from .samplers import OWN


TASKS = ("unconditional", "continuation", "infilling")


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `evaluate.py`, by their names there; its `--help` says what each of them is.

    Raises:
        ValueError: what no evaluation can work with.
    """

    pipeline: Sequence[str]
    output_dir: Path
    names: Sequence[str] | None = None
    num_samples: int = 1000
    seeds: int = 5
    steps: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024)
    samplers: Sequence[str] = (OWN,)
    judge: str = "gpt2-large"
    no_mauve: bool = False
    batch_size: int = 32
    judge_batch_size: int = 8
    dtype: str = "float32"
    controls: bool = False
    interpolation: bool = False
    num_pairs: int | None = None
    num_positions: int = 11
    cache_dir: Path | None = None
    task: str = "unconditional"
    prompt_tokens: int | None = None
    gap_tokens: int | None = None
    guidance_scales: Sequence[float] = (1.0,)
    steering_scales: Sequence[float] = ()
    bert_score: str | None = None

    def __post_init__(self) -> None:
        self.check_task()
        if self.with_mauve:
            check_mauve_size(self.num_samples)
        if self.names is not None and len(self.names) != len(self.pipeline):
            raise ValueError(f"--names gives {len(self.names)} names to {len(self.pipeline)} pipelines: name each.")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(
                f"The pipelines' names {self.labels} are not all different: tell them apart with --names."
            )
        if len(set(self.steps)) < len(self.steps):
            raise ValueError(f"--steps {list(self.steps)} has a number twice: leave one out.")
        if not self.interpolation:
            if self.num_pairs is not None:
                raise ValueError(
                    f"--num_pairs {self.num_pairs} is of the lines that --interpolation decodes: add that."
                )
        elif not 1 <= self.num_lines <= self.num_samples // 2:
            raise ValueError(
                f"--num_pairs {self.num_lines}: --num_samples {self.num_samples} real texts make at most "
                f"{self.num_samples // 2} pairs. Ask for fewer pairs or more samples."
            )
        elif self.num_positions < 3:
            raise ValueError(f"--num_positions {self.num_positions}: a line needs its ends and a point between.")

    def check_task(self) -> None:
        """Raises ValueError for options of another task."""
        if self.task not in TASKS:
            raise ValueError(f"--task {self.task!r} is unknown: choose from {', '.join(TASKS)}.")
        of_tasks = {
            "--prompt_tokens": (self.prompt_tokens is not None, ("continuation",)),
            "--gap_tokens": (self.gap_tokens is not None, ("infilling",)),
            "--guidance_scales": (tuple(self.guidance_scales) != (1.0,), ("continuation", "infilling")),
            "--steering_scales": (bool(self.steering_scales), ("continuation", "infilling")),
            "--bert_score": (self.bert_score is not None, ("continuation", "infilling")),
            "--controls": (self.controls, ("unconditional",)),
            "--interpolation": (self.interpolation, ("unconditional",)),
        }
        for option, (is_given, tasks) in of_tasks.items():
            if is_given and self.task not in tasks:
                raise ValueError(f"{option} goes with --task {' or '.join(tasks)}, not {self.task}: leave it out.")
        for name, scales in (("guidance", self.guidance_scales), ("steering", self.steering_scales)):
            if any(not 0 <= scale < math.inf for scale in scales) or len(set(scales)) < len(scales):
                raise ValueError(f"--{name}_scales {list(scales)}: weights are at least 0, each once.")

    @property
    def labels(self) -> list[str]:
        """What the results call the pipelines."""
        return list(self.names or map(default_name, self.pipeline))

    @property
    def judge_name(self) -> str | None:
        """The judge; None without one."""
        return None if self.judge == "none" else self.judge

    @property
    def with_mauve(self) -> bool:
        """Whether MAUVE is measured."""
        return self.judge_name is not None and not self.no_mauve

    @property
    def control_names(self) -> list[str]:
        """The controls that are scored."""
        return list(CONTROLS) if self.controls else []

    @property
    def num_lines(self) -> int:
        """Lines between real texts, if they are asked for."""
        return self.num_pairs or self.num_samples // 2


def default_name(pipeline: str) -> str:
    """RUN/pipeline → RUN's name; other folders and Hub ids by their own."""
    path = Path(pipeline)
    if not path.exists():
        return pipeline
    return path.resolve().parent.name if path.name == "pipeline" else path.resolve().name
