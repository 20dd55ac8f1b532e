"""What a run tells of itself: `metrics.jsonl`, trackers, the progress bar and previews of samples."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..loading.settings_reader import flatten
from .flops import RunEstimate
from .recipe import Evaluation
from .run_folder import METRICS, MetricsLog
from .settings import LoopRunSettings
from .tracking import log_figure, log_samples, loss_over_time_figure, start_trackers


class Journal:
    """Writes down what the loop has measured; every process calls it, and the main one writes."""

    def __init__(self, accelerator: Accelerator, settings: LoopRunSettings, estimate: RunEstimate | None):
        self.accelerator = accelerator
        self.settings = settings
        self.estimate = estimate
        self.output_dir = Path(settings.loop.output_dir)
        self.metrics_log = MetricsLog(self.output_dir / METRICS)

    def start(self, step: int) -> None:
        """Starts trackers, progress bar and clock, and takes the log back to the step that the run goes on from."""
        if self.settings.loop.trackers:
            plain = flatten(asdict(self.settings))
            config = {key: value if isinstance(value, (int, float)) else str(value) for key, value in plain.items()}
            start_trackers(self.accelerator, self.output_dir, config, resumed=step > 0)
        if self.accelerator.is_main_process:
            self.metrics_log.rewind(step)
        self.progress = tqdm(
            total=self.settings.loop.max_steps,
            initial=step,
            disable=not self.accelerator.is_main_process,
            desc="training",
            dynamic_ncols=True,
            # in a log file each update is a line of its own
            mininterval=0.1 if sys.stderr.isatty() else 30,
        )
        self.logged_step = step
        self.since = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Time that went into something else than steps: it does not count in tokens a second."""
        self.since += seconds

    def log_step(
        self,
        step: int,
        values: dict[str, torch.Tensor],
        recipe_values: dict[str, float],
        learning_rate: float,
        tokens_per_step: int,
        skipped_steps: int,
    ) -> None:
        """Writes the line of the log after `step` steps, with the means over all ranks of this one's `values`."""
        seconds_per_step = (time.perf_counter() - self.since) / (step - self.logged_step)
        tokens_per_second = tokens_per_step / seconds_per_step
        means = self.accelerator.reduce(torch.stack([value.float() for value in values.values()]), reduction="mean")
        reduced = dict(zip(values, means.tolist(), strict=True))
        record = {
            "step": step,
            **{name: value for name, value in reduced.items() if math.isfinite(value)},
            "learning_rate": learning_rate,
            **recipe_values,
            "tokens": step * tokens_per_step,
            "tokens_per_second": tokens_per_second,
        }
        rates = {"tokens/s": f"{tokens_per_second:.0f}"}
        if self.estimate is not None:
            utilization = self.estimate.model_flops_utilization(tokens_per_second)
            record["model_flops_utilization"] = utilization
            rates["MFU"] = f"{utilization:.1%}"
        record["hours_left"] = (self.settings.loop.max_steps - step) * seconds_per_step / 3600
        record["skipped_steps"] = skipped_steps
        self.write(record)
        self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=step)
        losses = {name.removesuffix("_loss"): f"{value:.3f}" for name, value in reduced.items() if "loss" in name}
        self.progress.set_postfix(losses | rates, refresh=False)
        self.logged_step = step
        self.since = time.perf_counter()

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line to `metrics.jsonl`, or says why it has to wait."""
        if self.accelerator.is_main_process:
            problem = self.metrics_log.write(record)
            if problem is not None:
                tqdm.write(
                    f"step {record['step']}: metrics.jsonl could not be written ({problem}); trying again later"
                )

    def log_evaluation(self, step: int, result: Evaluation, recipe_values: dict[str, float]) -> None:
        """Writes an evaluation to log, trackers and terminal, its samples as a file; only the main process has one."""
        values = {f"eval/{name}": value for name, value in result.values.items()}
        if self.accelerator.is_main_process:
            self.write({"step": step, **values})
            summary = {name: value for name, value in result.values.items() if "/" not in name} | recipe_values
            listed = ", ".join(f"{name} {value:.4f}" for name, value in summary.items())
            tqdm.write(f"held-out text after {step} steps: {listed}")
            self.show(step, result)
        self.accelerator.log(values, step=step)

    def show(self, step: int, result: Evaluation) -> None:
        """Samples as a file, and samples and the loss over t to the trackers."""
        if result.texts:
            preview = self.output_dir / f"samples-{step}.md"
            try:
                preview.write_text(samples_text(result.texts, f"Samples at step {step}"), encoding="utf-8")
            except OSError as error:
                tqdm.write(f"{preview.name} could not be written: {error}")
            log_samples(self.accelerator, result.texts, step)
        if result.loss_over_time and self.settings.loop.trackers:
            figure = loss_over_time_figure(result.loss_over_time, step)
            log_figure(self.accelerator, "diffusion_loss_over_t", figure, step)


def samples_text(texts: Sequence[str], title: str) -> str:
    """Samples as Markdown, quoted whole."""
    return f"# {title}\n\n" + "\n\n".join(f"**{number}.** {text}" for number, text in enumerate(texts, 1)) + "\n"
