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

from figures.logged_runs import LoggedRun, differing_settings, read_logged_run, read_logged_runs
from figures.loss_over_time import LossOverTime, loss_over_time
from figures.report import compare_sampling, deviation_table, write_report
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


def read_curve(folder: Path, count: int = 1) -> LossOverTime:
    curve = loss_over_time(read_logged_run(folder, "run"), count)
    assert curve is not None
    return curve


def curves_of(runs: list[LoggedRun]) -> dict[str, LossOverTime]:
    curves = {run.name: loss_over_time(run, 1) for run in runs}
    return {name: curve for name, curve in curves.items() if curve is not None}


def edit_log(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(change(json.loads(line)))}\n" for line in lines))


def curve_of(times: np.ndarray, losses: np.ndarray) -> LossOverTime:
    return LossOverTime("t", times, losses, times, times, (1,))


@pytest.mark.parametrize("slope", [-3.0, 0.0, 0.7])
def test_straight_line_does_not_deviate(slope: float) -> None:
    curve = curve_of(TIMES, 0.2 + slope * TIMES)
    assert tuple(curve.line) == (pytest.approx(slope, abs=1e-12), pytest.approx(0.2))
    assert curve.deviation < 1e-12


@pytest.mark.parametrize("points", [5, 20, 1000])
def test_parabola_deviates_as_the_orthogonal_polynomial_of_degree_two(points: int) -> None:
    """With x = -(n-1)/2 .. (n-1)/2 the residual of x² is x² - (n² - 1)/12, of mean square (n² - 1)(n² - 4)/180."""
    times = np.arange(1, points + 1) / points
    curve = curve_of(times, times**2)
    spread = 1 - 1 / points**2
    residual = math.sqrt((points**2 - 1) * (points**2 - 4) / 180) / points**2
    assert curve.deviation == pytest.approx(residual / spread)
    if points == 1000:
        # the integrals over [0, 1]: the line is u - 1/6
        assert curve.deviation == pytest.approx(1 / math.sqrt(180), rel=0.01)
        assert tuple(curve.line) == (pytest.approx(1, rel=0.01), pytest.approx(-1 / 6, rel=0.01))


def test_deviation_does_not_depend_on_the_unit_of_the_loss() -> None:
    curve, scaled = curve_of(TIMES, np.sqrt(TIMES)), curve_of(TIMES, 5 + 40 * np.sqrt(TIMES))
    assert scaled.deviation == pytest.approx(curve.deviation)


def test_moving_mean_is_over_steps_not_lines_and_keeps_a_line_inside() -> None:
    steps, values = [0, 10, 20, 30, 100], [1.0, 2.0, 3.0, 4.0, 9.0]
    assert moving_mean(steps, values, 0) == values
    assert moving_mean(steps, values, 19) == values
    assert moving_mean(steps, values, 20) == [1.5, 2.0, 3.0, 3.5, 9.0]


def test_adaptive_run_is_read_over_warped_time(tmp_path: Path) -> None:
    """L = sqrt(t) with F = sqrt(t): over u a straight line, whose times are exact though the keys round them."""
    curve = read_curve(write_run(tmp_path / "run", cdf=np.sqrt, quantile=np.square))
    assert curve.variable == "u" and curve.steps == (40,)
    assert curve.times.tolist() == TIMES.tolist()
    assert curve.deviation < 1e-12
    assert curve.grid.tolist() == [0, *TIMES]
    assert curve.cdf.tolist() == np.sqrt(curve.grid).tolist()


def test_uniform_run_is_read_over_t(tmp_path: Path) -> None:
    curve = read_curve(write_run(tmp_path / "run"))
    assert curve.variable == "t" and curve.losses.tolist() == np.sqrt(TIMES).tolist()
    assert curve.grid.tolist() == curve.cdf.tolist() == [0, *TIMES]


def test_log_without_the_loss_over_warped_time_is_left_out(tmp_path: Path) -> None:
    older = read_logged_run(write_run(tmp_path / "run", cdf=np.sqrt), "older")
    assert loss_over_time(older, 1) is None
    text = write_report([older], tmp_path / "report")
    assert "Left out, since the log has no 3 losses over time, all of them finite: older." in text
    assert not (tmp_path / "report" / "figure_5_loss_over_time.png").exists()


def test_adaptive_sampler_that_had_not_taken_over_is_neither_kind(tmp_path: Path) -> None:
    write_run(tmp_path / "adaptive", cdf=np.sqrt, quantile=np.square)
    write_run(tmp_path / "early", "timestep_sampler.adaptive=true")
    write_run(tmp_path / "uniform")
    runs = read_logged_runs([tmp_path / name for name in ("adaptive", "early", "uniform")])
    assert curves_of(runs)["early"].variable == "t"
    assert [row[:2] for row in compare_sampling(runs, curves_of(runs))] == [["adaptive", "uniform"]]
    assert compare_sampling(runs[1:], curves_of(runs)) == []


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
    curve = read_curve(folder, 2)
    assert curve.steps == (30, 40)
    assert curve.losses == pytest.approx(35 * np.sqrt(TIMES))
    assert curve.deviation == pytest.approx(curve_of(TIMES, np.sqrt(TIMES)).deviation)
    assert read_curve(folder, 3).steps == (20, 30, 40)
    for count in (4, 5):
        with pytest.raises(ValueError, match=f"--last_evaluations {count}: run has not as many.*ask for fewer"):
            read_curve(folder, count)
    with pytest.raises(ValueError, match="last_evaluations 0 must be at least 1"):
        write_report([read_logged_run(folder, "run")], tmp_path / "report", last_evaluations=0)


def test_loss_that_is_not_finite_is_said_and_not_fitted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    edit_log(
        folder, lambda line: line | ({"eval/diffusion_loss/t=0.50": math.nan} if "eval/diffusion_loss" in line else {})
    )
    text = write_report([read_logged_run(folder, "run")], tmp_path / "report")
    assert "all of them finite: run." in text
    assert "nan" not in text


def test_adaptive_runs_are_compared_with_the_uniform_runs_most_like_them(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"adaptive-{seed}", f"loop.seed={seed}", cdf=np.cbrt, quantile=np.square)
        write_run(tmp_path / f"uniform-{seed}", f"loop.seed={seed}", "timestep_sampler.num_bins=7")
    write_run(tmp_path / "no-warmup", "warmup.steps=0")
    runs = read_logged_runs(
        [tmp_path / name for name in ("adaptive-0", "adaptive-1", "no-warmup", "uniform-0", "uniform-1")]
    )
    curves = curves_of(runs)
    assert compare_sampling(runs, curves) == [
        ["adaptive-0", "uniform-0", "0.000", "none"],
        ["adaptive-1", "uniform-1", "0.000", "none"],
    ]
    only = [run for run in runs if run.name in ("adaptive-1", "no-warmup", "uniform-0")]
    assert compare_sampling(only, curves) == [["adaptive-1", "uniform-0", "0.000", "`loop.seed`"]]
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
    over_u, over_t = curve_of(TIMES, TIMES**2).deviation, curve_of(TIMES, np.sqrt(TIMES)).deviation
    for name, others in (("uniform", "none"), ("other", "`warmup.steps`")):
        runs = read_logged_runs([tmp_path / "adaptive", tmp_path / name])
        assert compare_sampling(runs, curves_of(runs)) == [["adaptive", name, f"{over_u / over_t:.3f}", others]]
        table = deviation_table(curves_of(runs))
        assert table[2] == f"| adaptive | u | 40 | {GRID} | {over_u:.2%} |"
        assert table[3] == f"| {name} | t | 40 | {GRID} | {over_t:.2%} |"


def test_warmup_curve_and_logged_points_are_the_formula(tmp_path: Path) -> None:
    run = read_logged_run(write_run(tmp_path / "run", "warmup.midpoint=0.5"), "run")
    other = read_logged_run(write_run(tmp_path / "other", "warmup.steps=0"), "other")
    same = read_logged_run(write_run(tmp_path / "same", "warmup.midpoint=0.5", steps=60), "same")
    axes = plot_warmup([run, other, same]).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata())]
    curves = [line for line in lines if line.get_linestyle() != "None"]
    points = [line for line in lines if line.get_linestyle() == "None"]
    # two runs have one warmup, and share its curve
    assert len(curves) == 2 and len(points) == 3
    assert [list(line.get_xdata())[:2] for line in points] == [[1, 3]] * 3
    for line in lines:
        settings = (0, 0.8, 10.0) if line.get_color() == COLOURS[1] else (20, 0.5, 10.0)
        for step, gate in zip(line.get_xdata(), line.get_ydata(), strict=True):
            assert gate == warmup_gate(int(step), *settings)


def test_training_curves_hold_what_was_logged(tmp_path: Path) -> None:
    runs = read_logged_runs([write_run(tmp_path / "short"), write_run(tmp_path / "long", steps=80)])
    figure = plot_training(runs, window=0)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 6
    losses = figure.axes[0].lines
    for run, (raw, smooth) in zip(runs, (losses[:2], losses[2:4]), strict=True):
        logged = [line["diffusion_loss"] for line in run.log if "diffusion_loss" in line]
        assert list(raw.get_ydata()) == logged
        assert list(smooth.get_ydata()) == pytest.approx(logged)
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


def test_names_are_the_paths_below_the_folder_of_all_runs(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "a/seed-0"), write_run(tmp_path / "a/seed-1")
    third = write_run(tmp_path / "b/seed-0")
    for folders, names in (
        ([one], ["seed-0"]),
        ([one, other], ["seed-0", "seed-1"]),
        ([one, other, third], ["a/seed-0", "a/seed-1", "b/seed-0"]),
    ):
        assert [run.name for run in read_logged_runs(folders)] == names


def test_bad_input(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    with pytest.raises(OSError, match="holds no settings.yaml: it is not the folder of a run"):
        read_logged_runs([tmp_path])
    with pytest.raises(ValueError, match="'one' is the name of two runs; leave one out"):
        read_logged_runs([one, tmp_path / "other" / ".." / "one"])
    with pytest.raises(ValueError, match="gives 1 names for 2 runs"):
        read_logged_runs([one, other], ["a"])
    with pytest.raises(ValueError, match="'a' is the name of two runs.*other --names"):
        read_logged_runs([one, other], ["a", "a"])
    with pytest.raises(OSError, match="File exists.*metrics.jsonl"):
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
    curve = read_curve(tmp_path / "run")
    assert curve.variable == "u" and curve.times.tolist() == [0.25, 0.5, 0.75, 1]
    assert curve.losses.tolist() == [run.evaluations[-1][f"eval/warped_diffusion_loss/u={u:.2f}"] for u in curve.times]
    assert "| A | u | 4 | 4 |" in text and "| B | t | 4 | 4 |" in text
    assert re.search(r"\| A \| B \| \d+\.\d{3} \| none \|", text)
