"""A page of Markdown with the figures of training, from the logs of runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import matplotlib.style

from figures.logged_runs import LoggedRun, NotLoggedError, differing_settings, gate_error
from figures.loss_over_time import (
    Comparison,
    LossOverTime,
    compare_sampling,
    largest_fall,
    loss_over_own_time,
    loss_over_t,
    timestep_cdf,
)
from figures.runs import plot_loss_over_time, plot_training, plot_warmup, training_panels
from figures.style import save_figure
from ldlm_hf.evaluation.markdown import cell, markdown_table
from ldlm_hf.evaluation.provenance import without_path
from ldlm_hf.hub.model_card import duration, measured_metrics
from ldlm_hf.hub.training_curves import series


# of the longest run, the window that curves of training text are smoothed over
SMOOTHING_SHARE = 0.02
# a loss over t that falls by more than this share of its range does not grow, whatever its noise
FALL_TOLERANCE = 0.2
# the logged gate is the formula's own value; more than this is another formula
GATE_TOLERANCE = 1e-6
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
    "training weights: {smoothing}, and faintly what was logged, one batch a point. On the right, held-out text "
    "with the averaged weights. The training loss is over the times that each run samples; the held-out one is "
    "over evenly spaced t, and compares between samplers. Both are mean squared errors of the latents: where "
    "latents shrink, they fall with them."
)
LOSS_CAPTION = (
    "Held-out diffusion loss over the time that each run samples uniformly: t, or u = F(t) of the adaptive "
    "sampler. Points are measured; lines are the straight lines that fit them best; in brackets, the deviation "
    "from them as a share of the range. On the right, the share F(t) of the draws that fall below t."
)
DEVIATION_MEANING = (
    "The deviation is the distance of the points from their least-squares straight line, as a share of the curve's "
    "range (largest − smallest point): its root mean square, and its maximum. The formula is ours, the same for all "
    "runs, and does not change with the scale of the latents. *Scatter* is the part of the root mean square that "
    "noise from point to point alone would make, from second differences (a sharp bend counts as noise too): a "
    "deviation of that size is a straight line as far as so many sequences can tell. The last column is over t for "
    "every run: of an adaptive run, the same model over the other time."
)
WARMUP_CAPTION = (
    "Gate γ(s) of the diffusion loss's gradient into the encoder. Lines are Equations 29 and 30 with each run's "
    "settings; points are what the run has logged."
)

Measured = TypeVar("Measured")


def write_report(
    runs: Sequence[LoggedRun], output_dir: Path, smoothing_steps: int | None = None, last_evaluations: int = 1
) -> str:
    """Writes the figures and `report.md` into a folder, which is made if it is not there; the report's text.

    Curves of training text are moving means over `smoothing_steps`, by default 2% of the longest run; the loss over
    time is the mean of the last evaluations. ValueError where these do not suit the runs.
    """
    if last_evaluations < 1:
        raise ValueError(f"--last_evaluations {last_evaluations} must be at least 1.")
    if smoothing_steps is None:
        smoothing_steps = round(SMOOTHING_SHARE * max(run.last_step for run in runs))
    if smoothing_steps < 0:
        raise ValueError(f"--smoothing_steps {smoothing_steps} must not be negative.")
    if output_dir.exists() and not output_dir.is_dir():
        raise OSError(f"--output_dir {str(output_dir)!r} is a file; name a folder.")
    sections = [
        ["# Report of training: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")],
        runs_section(runs),
        numbers_section(runs),
    ]
    # as for a model card: no settings of the user's
    with matplotlib.style.context("default", after_reset=True):
        output_dir.mkdir(parents=True, exist_ok=True)
        sections += [
            training_section(runs, output_dir, smoothing_steps),
            loss_over_time_section(runs, output_dir, last_evaluations),
            warmup_section(runs, output_dir),
        ]
    text = "\n".join("\n".join(lines) + "\n" for lines in sections)
    (output_dir / "report.md").write_text(text, encoding="utf-8")
    return text


def picture(name: str, caption: str) -> list[str]:
    """Lines that show a figure, its caption below it."""
    return [f"![{caption.partition('.')[0]}]({name}.png)", "", f"*{caption}*"]


def paragraphs(texts: Sequence[str]) -> list[str]:
    """Lines of paragraphs that follow something."""
    return [line for text in texts for line in ("", text)]


def runs_section(runs: Sequence[LoggedRun]) -> list[str]:
    """What each run is."""
    keys = [key for key in differing_settings(runs) if key != "loop.seed"]
    columns = ["run", "optimiser steps", "seed", "trained on", "in", "settings in which the runs differ"]
    texts = []
    if len(runs) > 1 and not keys:
        texts.append("The runs have the same settings, but for the seed and the folders of the machine.")
    shared = [key for key in ("model.backbone", "data.source", "loop.batch_size") if key not in keys]
    if shared:
        texts.append(f"{'All of them' if len(runs) > 1 else 'It has'}: {settings_text(runs[0], shared)}.")
    if any(run.results is None for run in runs):
        texts.append("A run without `results.json` has not ended, or has left it out; its machine is not known here.")
    rows = []
    for run in runs:
        steps, seed = f"{run.last_step:,}", str(run.settings["loop.seed"])
        if run.last_step < run.settings["loop.max_steps"]:
            steps += f" of {run.settings['loop.max_steps']:,}, not finished"
        hardware, seconds = (run.results.hardware, run.results.seconds) if run.results else (None, None)
        time = "–" if seconds is None else duration(seconds)
        rows.append([run.name, steps, seed, hardware or "–", time, settings_text(run, keys) or "–"])
    return ["## Runs", "", *markdown_table(columns, rows), *paragraphs(texts)]


def settings_text(run: LoggedRun, keys: Sequence[str]) -> str:
    """Settings as they are typed."""
    return ", ".join(f"`{key}={without_path(run.settings.get(key))}`" for key in keys)


def numbers_section(runs: Sequence[LoggedRun]) -> list[str]:
    """The last numbers that each run has logged, and the scores of its samples."""
    logged = {key: column for key, column in FINAL_NUMBERS.items() if any(series(run.log, key)[0] for run in runs)}
    scores = [run.results.sample_scores if run.results else None for run in runs]
    metrics = measured_metrics(*scores)
    rows, remarks = [], []
    for run, measured in zip(runs, scores, strict=True):
        cells = [run.name, f"{run.evaluations[-1]['step']:,}"]
        for key, (_, digits) in logged.items():
            values = series(run.log, key)[1]
            cells.append(cell(values[-1] if values else None, None, digits))
        values_of_run = measured.values if measured else {}
        cells += [cell(values_of_run.get(name), None, metric.digits) for name, metric in metrics.items()]
        rows.append(cells)
        if run.results and run.results.judge and measured:
            judge = run.results.judge["name"]
            remarks.append(f"The judge of {run.name} is `{judge}`, over {measured.num_texts} samples.")
        skipped = series(run.log, "skipped_steps")[1]
        if skipped and skipped[-1]:
            remarks.append(f"{run.name} skipped {skipped[-1]:,} steps, whose loss or gradient was not finite.")
    titles = [title for title, _ in logged.values()] + [f"samples' {metric.title}" for metric in metrics.values()]
    return [
        "## Final numbers",
        "",
        *markdown_table(["run", "evaluated after step", *titles], rows),
        "",
        "Held-out numbers are of the averaged weights at the last evaluation; numbers of training text are of the "
        "last line of the log, one batch.",
        *remarks,
    ]


def training_section(runs: Sequence[LoggedRun], output_dir: Path, smoothing_steps: int) -> list[str]:
    """Figure 3, middle and right."""
    lines = ["## Diffusion loss and decoder accuracy over training (Figure 3, middle and right)", ""]
    if not training_panels(runs):
        return [*lines, "Not drawn: no log has a curve of training that Figure 3 shows."]
    save_figure(plot_training(runs, smoothing_steps), output_dir / "figure_3_training")
    lines_in_window = max(1 + smoothing_steps // logging_steps(run) for run in runs)
    window = f"a window of {smoothing_steps:,} steps"
    smoothing = f"moving means over {window}, which holds {lines_in_window} lines of the log"
    if lines_in_window == 1:
        smoothing = f"not smoothed, since {window} holds one line of the log"
    return [*lines, *picture("figure_3_training", TRAINING_CAPTION.format(smoothing=smoothing))]


def logging_steps(run: LoggedRun) -> int:
    """Fewest steps between two lines of the log that hold numbers of training text."""
    steps, _ = series(run.log, "latent_std")
    return min((later - earlier for earlier, later in pairwise(steps)), default=run.last_step + 1)


def loss_over_time_section(runs: Sequence[LoggedRun], output_dir: Path, count: int) -> list[str]:
    """Figure 5, and the deviation from a straight line as a number."""
    lines = ["## Diffusion loss over time, and the straight line (Figure 5, Section 5.3)", ""]
    curves, without_curve = of_each(runs, loss_over_own_time, count)
    over_t, without_t = of_each(runs, loss_over_t, count)
    cdfs, without_cdf = of_each(runs, timestep_cdf, count)
    left_out = list(dict.fromkeys([*without_curve, *without_t, *without_cdf]))
    if not curves:
        return [*lines, "Not drawn.", *left_out]
    save_figure(plot_loss_over_time(runs, curves, cdfs), output_dir / "figure_5_loss_over_time")
    remarks = [remark for run in runs for remark in remarks_on_loss(run, curves.get(run.name), over_t.get(run.name))]
    return [
        *lines,
        *picture("figure_5_loss_over_time", LOSS_CAPTION),
        "",
        *deviation_table(runs, curves, over_t),
        *paragraphs([DEVIATION_MEANING, *left_out, *remarks]),
        "",
        *comparison_lines(compare_sampling(runs, curves)),
    ]


def of_each(
    runs: Sequence[LoggedRun], measure: Callable[[LoggedRun, int], Measured], count: int
) -> tuple[dict[str, Measured], list[str]]:
    """What is measured over the last `count` evaluations of each run, by its name; remarks on those left out."""
    found, left_out = {}, []
    for run in runs:
        try:
            found[run.name] = measure(run, count)
        except NotLoggedError as error:
            left_out.append(f"Left out: {error}.")
    return found, left_out


def remarks_on_loss(run: LoggedRun, curve: LossOverTime | None, over_t: LossOverTime | None) -> list[str]:
    """What the loss over its own time rests on, and where over t it is not what Section 5.3 takes it for."""
    remarks = []
    if curve is not None and curve.is_interpolated:
        remarks.append(
            f"The log of {run.name} has no loss over u: it is interpolated between the logged times t, which "
            "reach down to the first of them, and its scatter is that of the interpolation."
        )
    if curve is not None and curve.variable == "t" and run.is_adaptive:
        remarks.append(f"The adaptive sampler of {run.name} had not taken over yet: it drew t uniformly.")
    fall = 0.0 if over_t is None else largest_fall(over_t.losses)
    if fall > FALL_TOLERANCE:
        remarks.append(
            f"The loss of {run.name} over t falls with t somewhere, by {fall:.0%} of its range. Section 5.3 takes "
            "it to grow, and the adaptive sampler draws no times where it falls."
        )
    return remarks


def deviation_table(
    runs: Sequence[LoggedRun], curves: Mapping[str, LossOverTime], over_t: Mapping[str, LossOverTime]
) -> list[str]:
    """How straight the loss of each run is, and what the numbers rest on."""
    columns = ["run", "over", "after step", "points", "held-out sequences a point", "RMS deviation", "maximum"]
    rows = []
    for run in (run for run in runs if run.name in curves):
        curve = curves[run.name]
        line = curve.deviation
        steps = ", ".join(f"{step:,}" for step in curve.steps)
        shares = (line.rms, line.maximum, line.scatter, over_t[run.name].deviation.rms)
        what = [run.name, curve.variable, steps, str(len(curve.times)), sequences_a_point(run)]
        rows.append([*what, *(f"{share:.2%}" for share in shares)])
    return markdown_table([*columns, "scatter", "RMS deviation over t"], rows)


def sequences_a_point(run: LoggedRun) -> str:
    """How many held-out sequences the loss at one time is the mean of; a run deals them out to the times in turn."""
    grid_size = run.settings["evaluation.grid_size"]
    if run.results is None:
        wanted = run.settings["evaluation.num_sequences"]
        return f"{-(-wanted // grid_size)} at most"
    fewest, rest = divmod(run.results.num_held_out, grid_size)
    return f"{fewest} to {fewest + 1}" if rest else str(fewest)


def comparison_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """The claim of Figure 5 as a ratio, for every adaptive run and the uniform runs that are most like it."""
    if not comparisons:
        return [
            "The deviation of an adaptive run as a share of a uniform run's is not given: it takes one of each, with "
            "their losses over time in the log."
        ]
    rows = []
    for pair in comparisons:
        holds = "yes" if pair.rms < 0.5 else "no"
        others = ", ".join(f"`{key}`" for key in pair.other_settings) or "none"
        rows.append([pair.adaptive, pair.uniform, f"{pair.rms:.3f}", f"{pair.maximum:.3f}", holds, others])
    columns = ["adaptive run, over u", "uniform run, over t", "ratio of RMS deviations", "ratio of maxima"]
    columns += ["less than half (RMS)", "other settings in which they differ"]
    alike = [pair.rms for pair in comparisons if set(pair.other_settings) <= {"loop.seed"}]
    texts = []
    if len(alike) > 1:
        texts.append(
            f"Over the {len(alike)} pairs that differ in nothing but the sampler and the seed, the ratio of RMS "
            f"deviations is {statistics.fmean(alike):.3f} ± {statistics.stdev(alike):.3f} (mean and standard "
            "deviation)."
        )
    if len(alike) < len(comparisons):
        texts.append("Where other settings differ too, a ratio does not tell what the sampler alone does.")
    return [*markdown_table(columns, rows), *paragraphs(texts)]


def warmup_section(runs: Sequence[LoggedRun], output_dir: Path) -> list[str]:
    """Figure 6, and whether the logged gate is the formula's."""
    save_figure(plot_warmup(runs), output_dir / "figure_6_warmup")
    lines = ["## Diffusion-to-encoder warmup (Figure 6, Appendix A.2)", ""]
    columns = ["run", "steps S_wu", "midpoint c", "steepness k", "largest distance of a logged gate from the formula"]
    rows = [[run.name, *(f"{value:,}" for value in run.warmup), gate_distance(run)] for run in runs]
    return [*lines, *picture("figure_6_warmup", WARMUP_CAPTION), "", *markdown_table(columns, rows)]


def gate_distance(run: LoggedRun) -> str:
    """How far the logged gate is from the formula."""
    error = gate_error(run)
    if error is None:
        return "no gate logged"
    return f"{error:.1e}" + (": **not the settings' warmup**" if error > GATE_TOLERANCE else "")
