"""A page of Markdown with the figures of training, from the logs of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.style

from figures.logged_runs import LoggedRun, differing_settings
from figures.loss_over_time import MIN_POINTS, LossOverTime, loss_over_time
from figures.runs import plot_loss_over_time, plot_training, plot_warmup
from figures.style import save_figure
from ldlm_hf.evaluation.markdown import cell, markdown_table
from ldlm_hf.evaluation.provenance import without_path
from ldlm_hf.hub.model_card import duration, measured_metrics
from ldlm_hf.hub.training_curves import series


# of the longest run, the window that curves of training text are smoothed over
SMOOTHING_SHARE = 0.02
# keys of the log → columns of the table of final numbers, and their digits
FINAL_NUMBERS = {
    "eval/diffusion_loss": ("held-out diffusion loss", 4),
    "eval/reconstruction_mse": ("held-out MSE of hidden states", 4),
    "eval/reconstruction_accuracy": ("held-out token accuracy", 4),
    "diffusion_loss": ("training diffusion loss", 4),
    "token_accuracy": ("training token accuracy, noisy latents", 4),
    "latent_std": ("standard deviation of latents", 3),
}
TRAINING_CAPTION = (
    "Diffusion loss, decoder accuracy and scale of the latents over training. On the left, training text with the "
    "training weights: moving means over {window:,} steps, and faintly what was logged, one batch a point. On the "
    "right, held-out text with the averaged weights. The training loss is over the times that each run samples; the "
    "held-out one is over evenly spaced t, and compares between samplers. Both are mean squared errors of the "
    "latents: where latents shrink, they fall with them."
)
LOSS_CAPTION = (
    "Held-out diffusion loss over the time that each run samples uniformly: t, or u = F(t) of the adaptive "
    "sampler. Points are measured; lines are the straight lines that fit them best; in brackets, the root mean square "
    "deviation from them as a share of the range, largest − smallest point (ours). On the right, the share F(t) of "
    "the draws that fall below t."
)
WARMUP_CAPTION = (
    "Gate γ(s) of the diffusion loss's gradient into the encoder. Lines are Equations 29 and 30 with each run's "
    "settings; points are what the run has logged."
)


def write_report(runs: Sequence[LoggedRun], output_dir: Path, last_evaluations: int = 1) -> str:
    """Writes the figures and `report.md` into a folder, which is made if it is not there; the report's text.

    The loss over time is the mean of the last evaluations; ValueError where the runs have not as many.
    """
    if last_evaluations < 1:
        raise ValueError(f"--last_evaluations {last_evaluations} must be at least 1.")
    curves = {run.name: loss_over_time(run, last_evaluations) for run in runs}
    measured = {name: curve for name, curve in curves.items() if curve is not None}
    output_dir.mkdir(parents=True, exist_ok=True)
    # as for a model card: no settings of the user's
    with matplotlib.style.context("default", after_reset=True):
        sections = [
            ["# Report of training: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")],
            ["## Runs", "", *runs_table(runs)],
            ["## Final numbers", "", *final_numbers(runs)],
            training_section(runs, output_dir),
            loss_over_time_section(runs, measured, output_dir),
            warmup_section(runs, output_dir),
        ]
    text = "\n".join("\n".join(lines) + "\n" for lines in sections)
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    return text


def picture(name: str, caption: str) -> list[str]:
    """Lines that show a figure, its caption below it."""
    return [f"![{caption.partition('.')[0]}]({name}.png)", "", f"*{caption}*"]


def runs_table(runs: Sequence[LoggedRun]) -> list[str]:
    """What each run is."""
    keys = [key for key in differing_settings(runs) if key != "loop.seed"]
    rows = []
    for run in runs:
        steps, seed = f"{run.last_step:,}", str(run.settings["loop.seed"])
        if run.last_step < run.settings["loop.max_steps"]:
            steps += f" of {run.settings['loop.max_steps']:,}, not finished"
        hardware, seconds = (run.results.hardware, run.results.seconds) if run.results else (None, None)
        time = "–" if seconds is None else duration(seconds)
        settings = ", ".join(f"`{key}={without_path(run.settings.get(key))}`" for key in keys)
        rows.append([run.name, steps, seed, hardware or "–", time, settings or "–"])
    columns = ["run", "optimiser steps", "seed", "trained on", "in", "settings in which the runs differ"]
    return markdown_table(columns, rows)


def final_numbers(runs: Sequence[LoggedRun]) -> list[str]:
    """The last numbers that each run has logged, and the scores of its samples."""
    logged = {key: column for key, column in FINAL_NUMBERS.items() if any(series(run.log, key)[0] for run in runs)}
    scores = [run.results.sample_scores if run.results else None for run in runs]
    metrics = measured_metrics(*scores)
    rows, judges = [], []
    for run, measured in zip(runs, scores, strict=True):
        cells = [run.name, f"{run.evaluations[-1]['step']:,}"]
        for key, (_, digits) in logged.items():
            values = series(run.log, key)[1]
            cells.append(cell(values[-1] if values else None, None, digits))
        of_samples = measured.values if measured else {}
        cells += [cell(of_samples.get(name), None, metric.digits) for name, metric in metrics.items()]
        rows.append(cells)
        if run.results and run.results.judge and measured:
            name = run.results.judge["name"]
            judges.append(f"The judge of {run.name} is `{name}`, over {measured.num_texts} samples.")
    titles = [title for title, _ in logged.values()] + [f"samples' {metric.title}" for metric in metrics.values()]
    return [
        *markdown_table(["run", "evaluated after step", *titles], rows),
        "",
        "Held-out numbers are of the averaged weights at the last evaluation; numbers of training text are of the "
        "last line of the log, one batch.",
        *judges,
    ]


def training_section(runs: Sequence[LoggedRun], output_dir: Path) -> list[str]:
    """Figure 3, middle and right."""
    window = max(1, round(SMOOTHING_SHARE * max(run.last_step for run in runs)))
    save_figure(plot_training(runs, window), output_dir / "figure_3_training")
    heading = "## Diffusion loss and decoder accuracy over training (Figure 3, middle and right)"
    return [heading, "", *picture("figure_3_training", TRAINING_CAPTION.format(window=window))]


def loss_over_time_section(
    runs: Sequence[LoggedRun], curves: Mapping[str, LossOverTime], output_dir: Path
) -> list[str]:
    """Figure 5, and how much straighter adaptive times make the loss."""
    lines = ["## Diffusion loss over time, and the straight line (Figure 5, Section 5.3)"]
    left_out = [run.name for run in runs if run.name not in curves]
    if left_out:
        names = ", ".join(left_out)
        lines += ["", f"Left out, since the log has no {MIN_POINTS} losses over time, all of them finite: {names}."]
    if curves:
        save_figure(plot_loss_over_time(runs, curves), output_dir / "figure_5_loss_over_time")
        lines += ["", *picture("figure_5_loss_over_time", LOSS_CAPTION), "", *deviation_table(curves)]
    comparisons = compare_sampling(runs, curves)
    if comparisons:
        columns = ["adaptive run, over u", "uniform run, over t", "ratio of RMS deviations"]
        lines += ["", *markdown_table([*columns, "other settings in which they differ"], comparisons)]
    return lines


def deviation_table(curves: Mapping[str, LossOverTime]) -> list[str]:
    """How straight the loss of each run is."""
    rows = []
    for name, curve in curves.items():
        steps = ", ".join(f"{step:,}" for step in curve.steps)
        rows.append([name, curve.variable, steps, str(len(curve.times)), f"{curve.deviation:.2%}"])
    return markdown_table(["run", "over", "after step", "points", "RMS deviation"], rows)


def compare_sampling(runs: Sequence[LoggedRun], curves: Mapping[str, LossOverTime]) -> list[list[str]]:
    """A row for each adaptive run and each uniform one that differs from it in the fewest other settings."""
    measured = [run for run in runs if run.name in curves]
    # a run that is set to sample adaptively and has not begun to is neither
    uniform = [run for run in measured if not run.settings["timestep_sampler.adaptive"]]
    rows = []
    for run in (run for run in measured if curves[run.name].variable == "u"):
        others = {
            other.name: [key for key in differing_settings([run, other]) if not key.startswith("timestep_sampler.")]
            for other in uniform
        }
        fewest = min(map(len, others.values()), default=0)
        for name, keys in others.items():
            if len(keys) == fewest:
                ratio = curves[run.name].deviation / curves[name].deviation
                rows.append([run.name, name, f"{ratio:.3f}", ", ".join(f"`{key}`" for key in keys) or "none"])
    return rows


def warmup_section(runs: Sequence[LoggedRun], output_dir: Path) -> list[str]:
    """Figure 6."""
    save_figure(plot_warmup(runs), output_dir / "figure_6_warmup")
    rows = [[run.name, *(f"{value:,}" for value in run.warmup)] for run in runs]
    table = markdown_table(["run", "steps S_wu", "midpoint c", "steepness k"], rows)
    heading = "## Diffusion-to-encoder warmup (Figure 6, Appendix A.2)"
    return [heading, "", *picture("figure_6_warmup", WARMUP_CAPTION), "", *table]
