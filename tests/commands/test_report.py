"""Figures and report of runs: from logs whose shape is known to the number, and from a real run to the page."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from figures.logged_runs import (
    NotLoggedError,
    differing_settings,
    distinguishing_names,
    gate_error,
    logged_gate,
    read_logged_run,
    read_logged_runs,
)
from figures.loss_over_time import (
    compare_sampling,
    largest_fall,
    line_deviation,
    loss_over_own_time,
    loss_over_t,
    timestep_cdf,
)
from figures.report import (
    comparison_lines,
    deviation_table,
    gate_distance,
    logging_steps,
    remarks_on_loss,
    write_report,
)
from figures.runs import moving_mean, plot_training, plot_warmup
from figures.style import COLOURS, LINES, run_style
from ldlm_hf import warmup_gate
from ldlm_hf.hub.run_files import RunResults, Source, TextScores
from ldlm_hf.loading.settings_reader import load_settings, to_yaml
from ldlm_hf.training.settings import RunSettings


GRID = 16
TIMES = np.arange(1, GRID + 1) / GRID
FIGURES = ["figure_3_training", "figure_5_loss_over_time", "figure_6_warmup"]


def write_run(
    folder: Path,
    *overrides: str,
    loss: Callable[[np.ndarray], np.ndarray] = np.sqrt,
    cdf: Callable[[np.ndarray], np.ndarray] | None = None,
    quantile: Callable[[np.ndarray], np.ndarray] | None = None,
    steps: int = 40,
    evaluations: int = 2,
) -> Path:
    """A run whose held-out loss is `loss(t)`; with `cdf`, F was logged, and with `quantile` the loss over u too."""
    adaptive = cdf is not None or quantile is not None
    fixed = [f"loop.max_steps={steps}", "warmup.steps=20", f"evaluation.grid_size={GRID}"]
    fixed += [f"timestep_sampler.adaptive={adaptive}", f"loop.output_dir={folder}", "evaluation.num_sequences=40"]
    settings = load_settings(RunSettings, None, [*fixed, *overrides])
    warmup = (settings.warmup.steps, settings.warmup.midpoint, settings.warmup.steepness)
    noise = random.Random(0)
    log: list[dict[str, Any]] = []
    for step in range(2, steps + 1, 2):
        record = {"step": step, "gate": warmup_gate(step - 1, *warmup), "adaptive_timesteps": float(adaptive)}
        record |= {"diffusion_loss": math.exp(-step / steps) * noise.uniform(0.9, 1.1), "latent_std": 1 + 1 / step}
        log.append(record | {"token_accuracy": step / (steps + 10)})
        if step * evaluations % steps == 0:
            evaluation = {"step": step, "eval/reconstruction_accuracy": step / (steps + 5)}
            evaluation |= {f"eval/diffusion_loss/t={t:.2f}": float(loss(t)) for t in TIMES}
            evaluation |= {"eval/diffusion_loss": float(loss(TIMES).mean()), "eval/reconstruction_mse": 1 / step}
            if cdf is not None:
                evaluation |= {f"eval/timestep_cdf/t={t:.2f}": float(cdf(t)) for t in TIMES}
            if quantile is not None:
                evaluation |= {f"eval/warped_diffusion_loss/u={u:.2f}": float(loss(quantile(u))) for u in TIMES}
            log.append(evaluation)
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(to_yaml(settings), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log), encoding="utf-8")
    return folder


def edit_log(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(change(json.loads(line)))}\n" for line in lines))


@pytest.mark.parametrize("slope", [-3.0, 0.0, 0.7])
def test_straight_line_does_not_deviate(slope: float) -> None:
    line = line_deviation(TIMES, 0.2 + slope * TIMES)
    assert (line.slope, line.intercept) == (pytest.approx(slope, abs=1e-12), pytest.approx(0.2))
    assert max(line.rms, line.maximum, line.scatter) < 1e-12


@pytest.mark.parametrize("points", [5, 20, 1000])
def test_parabola_deviates_as_the_orthogonal_polynomial_of_degree_two(points: int) -> None:
    """With x = -(n-1)/2 .. (n-1)/2 the residual of x² is x² - (n² - 1)/12, of mean square (n² - 1)(n² - 4)/180."""
    times = np.arange(1, points + 1) / points
    line = line_deviation(times, times**2)
    spread = 1 - 1 / points**2
    residual = math.sqrt((points**2 - 1) * (points**2 - 4) / 180) / points**2
    assert line.rms == pytest.approx(residual / spread)
    assert line.maximum == pytest.approx(((points - 1) ** 2 / 4 - (points**2 - 1) / 12) / points**2 / spread)
    if points == 1000:
        # the integrals over [0, 1]: the line is u - 1/6
        assert line.rms == pytest.approx(1 / math.sqrt(180), rel=0.01)
        assert line.maximum == pytest.approx(1 / 6, rel=0.01)
        assert (line.slope, line.intercept) == (pytest.approx(1, rel=0.01), pytest.approx(-1 / 6, rel=0.01))


def test_deviation_does_not_depend_on_the_unit_of_the_loss() -> None:
    line, scaled = line_deviation(TIMES, np.sqrt(TIMES)), line_deviation(TIMES, 5 + 40 * np.sqrt(TIMES))
    assert [scaled.rms, scaled.maximum, scaled.scatter] == pytest.approx([line.rms, line.maximum, line.scatter])
    assert 0 < line.scatter < line.rms < line.maximum


def test_scatter_is_the_noise_and_not_a_gentle_bend() -> None:
    times = np.linspace(0, 1, 4001)
    noise = 0.01 * np.random.default_rng(0).standard_normal(len(times))
    losses = times + times**2 + noise
    line = line_deviation(times, losses)
    assert line.scatter * np.ptp(losses) == pytest.approx(0.01, rel=0.05)
    assert line.rms > 5 * line.scatter


def test_a_fall_is_measured_from_the_highest_loss_before_it() -> None:
    assert largest_fall(np.sqrt(TIMES)) == 0 and largest_fall(np.ones(4)) == 0
    assert largest_fall(np.array([0.0, 4.0, 3.0, 5.0, 2.0])) == pytest.approx(3 / 5)


def test_moving_mean_is_over_steps_not_lines_and_keeps_a_line_inside() -> None:
    steps, values = [0, 10, 20, 30, 100], [1.0, 2.0, 3.0, 4.0, 9.0]
    assert moving_mean(steps, values, 0) == values
    assert moving_mean(steps, values, 19) == values
    assert moving_mean(steps, values, 20) == [1.5, 2.0, 3.0, 3.5, 9.0]


def test_adaptive_run_is_read_over_warped_time(tmp_path: Path) -> None:
    """L = sqrt(t) with F = sqrt(t): over u a straight line, whose times are exact though the keys round them."""
    run = read_logged_run(write_run(tmp_path / "run", cdf=np.sqrt, quantile=np.square), "adaptive")
    curve = loss_over_own_time(run, 1)
    assert curve.variable == "u" and not curve.is_interpolated and curve.steps == (40,)
    assert curve.times.tolist() == TIMES.tolist()
    assert curve.deviation.rms < 1e-12
    times, cdf = timestep_cdf(run, 1)
    assert (times[0], cdf[0], times[-1], cdf[-1]) == (0, 0, 1, 1)
    assert cdf.tolist() == np.sqrt(times).tolist()
    assert loss_over_t(run, 1).losses.tolist() == np.sqrt(TIMES).tolist()


def test_uniform_run_is_read_over_t(tmp_path: Path) -> None:
    run = read_logged_run(write_run(tmp_path / "run"), "uniform")
    curve = loss_over_own_time(run, 1)
    assert curve.variable == "t" and curve.losses.tolist() == np.sqrt(TIMES).tolist()
    times, cdf = timestep_cdf(run, 1)
    assert times.tolist() == cdf.tolist()


def test_older_log_is_interpolated_or_said_to_lack_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", cdf=np.sqrt)
    curve = loss_over_own_time(read_logged_run(folder, "older"), 1)
    assert curve.variable == "u" and curve.is_interpolated
    # F(1/16) = 1/4: below that no loss was measured
    assert curve.times.tolist() == TIMES[3:].tolist()
    assert curve.losses == pytest.approx(curve.times)
    edit_log(folder, lambda line: {key: value for key, value in line.items() if "cdf" not in key})
    oldest = read_logged_run(folder, "oldest")
    with pytest.raises(NotLoggedError, match="oldest has neither the loss over u"):
        loss_over_own_time(oldest, 1)
    text = write_report([oldest], tmp_path / "report")
    assert "Not drawn." in text and "neither the loss over u" in text
    assert not (tmp_path / "report" / "figure_5_loss_over_time.png").exists()


def test_adaptive_sampler_that_had_not_taken_over_is_neither_kind(tmp_path: Path) -> None:
    write_run(tmp_path / "early", cdf=np.sqrt)
    edit_log(
        tmp_path / "early",
        lambda line: {key: value for key, value in line.items() if "cdf" not in key} | {"adaptive_timesteps": 0.0},
    )
    write_run(tmp_path / "uniform")
    runs = read_logged_runs([tmp_path / "early", tmp_path / "uniform"])
    curves = {run.name: loss_over_own_time(run, 1) for run in runs}
    assert [len(remarks_on_loss(run, curves[run.name], None)) for run in runs] == [1, 0]
    assert compare_sampling(runs, curves) == []


def test_mean_of_the_last_evaluations(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluations=4)
    edit_log(
        folder,
        lambda line: {
            key: value * line["step"] if "loss/t=" in key else value
            for key, value in line.items()
            if line["step"] > 10 or "t=1.00" not in key
        },
    )
    run = read_logged_run(folder, "run")
    curve = loss_over_own_time(run, 2)
    assert curve.steps == (30, 40)
    assert curve.losses == pytest.approx(35 * np.sqrt(TIMES))
    assert curve.deviation.rms == pytest.approx(line_deviation(TIMES, np.sqrt(TIMES)).rms)
    with pytest.raises(ValueError, match="run has 3 at its end that are over the same times.*ask for 3 at most"):
        loss_over_own_time(run, 4)
    with pytest.raises(ValueError, match="last_evaluations 0 must be at least 1"):
        write_report([run], tmp_path / "report", last_evaluations=0)


def test_loss_that_is_not_finite_is_said_and_not_fitted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    edit_log(
        folder, lambda line: line | ({"eval/diffusion_loss/t=0.50": math.nan} if "eval/diffusion_loss" in line else {})
    )
    text = write_report([read_logged_run(folder, "run")], tmp_path / "report")
    assert f"the diffusion loss of run over t has {GRID - 1} finite values at {GRID} times" in text
    assert text.count("finite values") == 1
    assert "nan" not in text


def test_adaptive_runs_are_compared_with_the_uniform_runs_most_like_them(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"adaptive-{seed}", f"loop.seed={seed}", cdf=np.cbrt, quantile=np.square)
        write_run(tmp_path / f"uniform-{seed}", f"loop.seed={seed}", "timestep_sampler.num_bins=7")
    write_run(tmp_path / "no-warmup", "warmup.steps=0")
    runs = read_logged_runs(
        [tmp_path / name for name in ("adaptive-0", "adaptive-1", "no-warmup", "uniform-0", "uniform-1")]
    )
    curves = {run.name: loss_over_own_time(run, 1) for run in runs}
    pairs = compare_sampling(runs, curves)
    assert [(pair.adaptive, pair.uniform, pair.other_settings) for pair in pairs] == [
        ("adaptive-0", "uniform-0", []),
        ("adaptive-1", "uniform-1", []),
    ]
    assert all(pair.rms < 1e-12 for pair in pairs)
    assert "0.000 ± 0.000" in comparison_lines(pairs)[-1]
    only = [run for run in runs if run.name in ("adaptive-1", "no-warmup", "uniform-0")]
    [pair] = compare_sampling(only, curves)
    assert (pair.uniform, pair.other_settings) == ("uniform-0", ["loop.seed"])
    assert differing_settings(only[:2]) == [
        "loop.seed",
        "timestep_sampler.adaptive",
        "warmup.steps",
    ]


def test_ratios_in_the_report_are_those_of_the_deviations(tmp_path: Path) -> None:
    """Uniform: sqrt(t). Adaptive with F = t^(1/4), so the loss over u is u^2: both deviations have closed forms."""
    write_run(tmp_path / "uniform")
    write_run(tmp_path / "other", "warmup.steps=0")
    write_run(tmp_path / "adaptive", cdf=lambda t: t**0.25, quantile=lambda u: u**4)
    for name, others in (("uniform", "none"), ("other", "`warmup.steps`")):
        runs = read_logged_runs([tmp_path / "adaptive", tmp_path / name])
        curves = {run.name: loss_over_own_time(run, 1) for run in runs}
        over_u, over_t = line_deviation(TIMES, TIMES**2), line_deviation(TIMES, np.sqrt(TIMES))
        ratios = f"{over_u.rms / over_t.rms:.3f} | {over_u.maximum / over_t.maximum:.3f}"
        lines = comparison_lines(compare_sampling(runs, curves))
        assert lines[2] == f"| adaptive | {name} | {ratios} | no | {others} |"
        table = deviation_table(runs, curves, {run.name: loss_over_t(run, 1) for run in runs})
        assert table[2].startswith(f"| adaptive | u | 40 | {GRID} | 3 at most | {over_u.rms:.2%} |")
        assert table[3].startswith(f"| {name} | t | 40 | {GRID} | 3 at most | {over_t.rms:.2%} |")


def test_the_window_is_counted_in_lines_of_training_text(tmp_path: Path) -> None:
    assert logging_steps(read_logged_run(write_run(tmp_path / "run"), "run")) == 2


def test_falling_loss_is_said(tmp_path: Path) -> None:
    for name, loss, count in (("falls", lambda t: 1 - np.sqrt(t), 1), ("grows", np.sqrt, 0)):
        run = read_logged_run(write_run(tmp_path / name, loss=loss), name)
        assert len(remarks_on_loss(run, None, loss_over_t(run, 1))) == count


def test_warmup_curve_and_logged_points_are_the_formula(tmp_path: Path) -> None:
    run = read_logged_run(write_run(tmp_path / "run", "warmup.midpoint=0.5"), "run")
    other = read_logged_run(write_run(tmp_path / "other", "warmup.steps=0"), "other")
    same = read_logged_run(write_run(tmp_path / "same", "warmup.midpoint=0.5", steps=60), "same")
    assert logged_gate(run)[0] == (1, warmup_gate(1, 20, 0.5, 10))
    assert gate_error(run) == gate_error(other) == 0
    axes = plot_warmup([run, other, same]).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata())]
    curves = [line for line in lines if line.get_linestyle() != "None"]
    points = [line for line in lines if line.get_linestyle() == "None"]
    # two runs have one warmup, and share its curve
    assert len(curves) == 2 and len(points) == 3
    assert min(len(line.get_xdata()) for line in points) > 3
    for line in lines:
        settings = (0, 0.8, 10.0) if line.get_color() == COLOURS[1] else (20, 0.5, 10.0)
        for step, gate in zip(line.get_xdata(), line.get_ydata(), strict=True):
            assert gate == warmup_gate(int(step), *settings)
    edit_log(tmp_path / "run", lambda line: line | ({"gate": 0.5} if "gate" in line else {}))
    changed = read_logged_run(tmp_path / "run", "changed")
    assert gate_error(changed) == pytest.approx(0.5)
    assert gate_distance(run) == "0.0e+00" and gate_distance(changed).startswith("5.0e-01: **")


def test_training_curves_hold_what_was_logged(tmp_path: Path) -> None:
    runs = read_logged_runs([write_run(tmp_path / "short"), write_run(tmp_path / "long", steps=80)])
    figure = plot_training(runs, window=0)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 6
    losses = figure.axes[0].lines
    for run, (raw, smooth) in zip(runs, (losses[:2], losses[2:4]), strict=True):
        logged = [line["diffusion_loss"] for line in run.log if "diffusion_loss" in line]
        assert list(raw.get_ydata()) == logged
        # the last point is there however many are left out
        assert list(smooth.get_ydata()) == pytest.approx([*logged, logged[-1]])
    held_out = figure.axes[3].lines
    assert [list(line.get_xdata()) for line in held_out[:2]] == [[20, 40], [40, 80]]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["short", "long"]


def test_runs_without_a_token_decoder_have_no_accuracy(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    edit_log(folder, lambda line: {key: value for key, value in line.items() if "accuracy" not in key})
    run = read_logged_run(folder, "run")
    assert len(plot_training([run], 0).axes) == 4
    assert "accuracy |" not in write_report([run], tmp_path / "report")


def test_styles_tell_runs_apart() -> None:
    count = len(COLOURS) * len(LINES)
    for mark in ("linestyle", "fillstyle"):
        assert len({(run_style(place)["color"], run_style(place)[mark]) for place in range(count)}) == count


def test_report_of_a_finished_run_has_its_machine_and_scores(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    RunResults(
        {},
        8,
        Source("org/corpus", True),
        hardware="a processor",
        seconds=90.0,
        num_held_out=40,
        judge={"name": "org/judge", "max_length": 8, "add_bos": False},
        sample_scores=TextScores(30, {"entropy": 1.5, "diversity": 0.75, "generative_perplexity": 321.06}),
    ).save(tmp_path / "run" / "results.json")
    text = write_report(read_logged_runs([tmp_path / "run"]), tmp_path / "report")
    assert "| run | 40 | 0 | a processor | 1.5 minutes | – |" in text
    assert "321.1 |" in text and "`org/judge`, over 30 samples" in text
    assert f"| {GRID} | 2 to 3 |" in text, "40 sequences are dealt out to 16 times"
    assert "MAUVE" not in text


def test_same_logs_give_the_same_files_whatever_the_user_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "uniform")
    write_run(tmp_path / "adaptive", cdf=np.sqrt, quantile=np.square)
    runs = [tmp_path / "uniform", tmp_path / "adaptive"]
    write_report(read_logged_runs(runs), tmp_path / "first")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    write_report(read_logged_runs(runs), tmp_path / "second")
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == sorted(["report.md", *(f"{name}.png" for name in FIGURES)])
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        if file.endswith("png"):
            with Image.open(tmp_path / "first" / file) as image:
                assert image.width > 600
    text = (tmp_path / "first" / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", text) == [f"{name}.png" for name in FIGURES]
    assert str(tmp_path) not in text


def test_names_are_the_parts_of_the_paths_that_differ() -> None:
    def names(*paths: str) -> list[str]:
        return distinguishing_names([Path("/", path) for path in paths])

    assert names("x/run") == ["run"]
    assert names("x/a", "x/b") == ["a", "b"]
    assert names("x/a/seed-0", "x/b/seed-0") == ["a", "b"]
    assert names("x/a/seed-0", "x/a/seed-1", "x/b/seed-0") == ["a/seed-0", "a/seed-1", "b/seed-0"]
    assert names("x/a", "x/a/a") == ["x", "a"]


def test_bad_input(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    with pytest.raises(OSError, match="holds no settings.yaml: it is not the folder of a run"):
        read_logged_runs([tmp_path])
    with pytest.raises(ValueError, match="one' is given twice"):
        read_logged_runs([one, tmp_path / "other" / ".." / "one"])
    with pytest.raises(ValueError, match="gives 1 names for 2 runs"):
        read_logged_runs([one, other], ["a"])
    with pytest.raises(ValueError, match="'a' must be a name of one run only"):
        read_logged_runs([one, other], ["a", "a"])
    with pytest.raises(ValueError, match="smoothing_steps -1 must not be negative"):
        write_report(read_logged_runs([one]), tmp_path / "report", smoothing_steps=-1)
    with pytest.raises(OSError, match="metrics.jsonl' is a file; name a folder"):
        write_report(read_logged_runs([one]), one / "metrics.jsonl")
    edit_log(other, lambda line: {key: value for key, value in line.items() if not key.startswith("eval/")})
    with pytest.raises(
        ValueError, match="holds no evaluation: wait for the run's first .its evaluation.every is 10000"
    ):
        read_logged_runs([other])
    (other / "metrics.jsonl").write_text("3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not a line of a run's log"):
        read_logged_runs([other])
    (other / "settings.yaml").write_text("{data: {}, loop: {}, optimizer: {}, evaluation: {}}", encoding="utf-8")
    (other / "metrics.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="no run of train_joint.py"):
        read_logged_runs([other])


@pytest.mark.slow
def test_from_a_real_run_to_the_page(
    run_script: Callable[..., None], tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # few bins, or four steps would leave one without an estimate, and the sampler uniform
    adaptive = [*tiny_overrides, "evaluation.every=2", "evaluation.grid_size=4", "timestep_sampler.num_bins=2"]
    run_script("train_joint", *adaptive)
    run_script("train_joint", *adaptive, "timestep_sampler.adaptive=false", f"loop.output_dir={tmp_path / 'uniform'}")
    capsys.readouterr()
    output = tmp_path / "report"
    run_script(
        "report", str(tmp_path / "run"), str(tmp_path / "uniform"), "--names", "A", "B", "--output_dir", str(output)
    )
    text = (output / "report.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "`timestep_sampler.adaptive=False`" in text and "loop.output_dir" not in text
    assert str(tmp_path) not in text
    for name in FIGURES:
        assert (output / f"{name}.png").stat().st_size > 5_000
    run = read_logged_run(tmp_path / "run", "A")
    curve = loss_over_own_time(run, 1)
    assert curve.variable == "u" and curve.times.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.losses.tolist() == [run.evaluations[-1][f"eval/warped_diffusion_loss/u={u:.2f}"] for u in curve.times]
    assert "| A | u | 4 | 4 | 4 |" in text and "| B | t | 4 | 4 | 4 |" in text
    assert re.search(r"\| A \| B \| \d+\.\d{3} \| \d+\.\d{3} \| (yes|no) \| none \|", text)
    assert text.count("| 0.0e+00 |") == 2, "the logged gate is the formula's"
