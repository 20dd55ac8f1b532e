"""Cards of runs: from a run's own files to README.md and its pictures, valid for the Hub, and true."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, constants
from PIL import Image

from ldlm_hf.hub.model_card import NUM_SAMPLES, duration, fenced, main, write_card
from ldlm_hf.hub.run_files import Run, RunResults, Sample, Source, TextScores, read_run
from ldlm_hf.hub.training_curves import (
    MAX_POINTS,
    PANELS,
    group_means,
    panels_of,
    plot_training_curves,
    series,
)


def text_scores(num_texts: int, *values: float) -> TextScores:
    """Scores in the order of a card's columns; those that are left out were not measured."""
    names = ("entropy", "diversity", "repetition", "generative_perplexity", "mauve")
    return TextScores(num_texts, dict(zip(names, values, strict=False)))


SETTINGS = {
    "model": {"sequence_length": 8},
    "data": {"source": "org/corpus", "config_name": "plain", "revision": None},
    "optimizer": {"ema_decay": 0.99},
    "loop": {
        "max_steps": 400,
        "batch_size": 16,
        "seed": 7,
        "mixed_precision": "no",
        "output_dir": "/somewhere/runs/x",
    },
    "evaluation": {"num_inference_steps": 32},
}
RESULTS = RunResults(
    changed_settings={"loop.max_steps": 400, "model.transformer.num_layers": 2, "loop.mixed_precision": "no"},
    sequence_length=8,
    corpus=Source("org/corpus", is_hub_id=True),
    token_encoder=Source("org/backbone", is_hub_id=True),
    parameters={"transformer": 1234567, "token_decoder": 89},
    hardware="a processor (CPU; processes: 1, threads of each: 2)",
    versions={"Python": "3.x", "torch": "2.y"},
    seconds=90.0,
    held_out={"reconstruction_mse": 0.25, "diffusion_loss": 0.125},
    num_held_out=64,
    judge={"name": "org/judge", "max_length": 1024, "add_bos": False},
    mauve={"num_texts": 500, "num_buckets": 3, "max_length": 1024, "seed": 25},
    sample_scores=text_scores(500, 1.5, 0.75, 0.125, 321.0625, 0.5),
    real_scores=text_scores(500, 1.75, 0.875, 0.0, 123.5, 0.96875),
    samples=[Sample(f"text number {number}", 100.0 + number, 1.0 + number / 100) for number in range(30)],
)


def log_lines(steps: int, every: int = 1) -> list[dict[str, Any]]:
    """A log of a joint run: noisy curves at every step, and an evaluation at each quarter."""
    noise = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        decay = math.exp(-step / steps) * noise.uniform(0.8, 1.2)
        lines.append(
            {
                "step": step,
                "hidden_loss": decay,
                "token_loss": 10 * decay,
                "diffusion_loss": decay / 2,
                "token_accuracy": step / steps,
                "latent_std": 1 + decay,
                "gate": step / steps,
                "tokens": step * 128,
                "skipped_steps": 3,
            }
        )
        if step % (steps // 4) == 0:
            grid = {f"eval/diffusion_loss/t={t / 20:.2f}": decay * t / 20 for t in range(1, 21)}
            lines.append({"step": step, "eval/reconstruction_accuracy": step / steps, **grid})
    return lines


def make_run(folder: Path, results: RunResults = RESULTS, **settings: Any) -> Path:
    """A run's own files."""
    folder.mkdir()
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | settings), encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in log_lines(400, every=20))
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    results.save(folder / "results.json")
    return folder


def test_results_are_read_as_they_were_saved(tmp_path: Path) -> None:
    for results in (RESULTS, RunResults({}, 8, Source("x.txt", False)), replace(RESULTS, judge=None, samples=[])):
        results.save(tmp_path / "results.json")
        assert RunResults.load(tmp_path / "results.json") == results


def test_results_hold_the_scores_of_a_set_as_one_mapping(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    counts = {"num_blank_texts": 0, "num_unscored_texts": None, "num_nonfinite_texts": None}
    scores = {"entropy": 1.5, "diversity": 0.75, "generative_perplexity": None}
    replace(RESULTS, real_scores=TextScores(500, scores, num_blank_texts=0)).save(file)
    values = json.loads(file.read_text(encoding="utf-8"))
    assert list(values["real_scores"].items()) == [("num_texts", 500), *scores.items(), *counts.items()]
    # what was written before a score was there has no value for it, and one of a score that is gone is kept
    values["real_scores"] = {"num_texts": 3, "entropy": 1.0, "former": 2.0}
    file.write_text(json.dumps(values), encoding="utf-8")
    assert RunResults.load(file).real_scores == TextScores(3, {"entropy": 1.0, "former": 2.0})


def test_card_tells_what_the_run_has_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small")
    text = write_card(read_run(run), run / "pipeline").text
    assert "| samples | 500 | 1.500 | 0.750 | 0.125 | 321.1 | 0.500 |" in text
    assert "| held-out real texts | 500 | 1.750 | 0.875 | 0.000 | 123.5 | 0.969 |" in text
    assert f"highest value here is {math.log(8):.3f}" in text
    assert "judge `org/judge`" in text
    assert "Not measured" not in text
    assert "On 64 held-out sequences at the end of training: reconstruction mse 0.2500; diffusion loss 0.1250." in text
    # from the log: 400 steps of 128 tokens, three of them skipped
    assert "400 steps of 16 sequences of 8 tokens (51,200 tokens), seed 7" in text
    assert "3 of these steps were skipped" in text
    assert "1.5 minutes on a processor" in text
    assert "| transformer | 1,234,567 |" in text
    assert "torch 2.y" in text
    block = re.search("```yaml\n(.*?)\n```", text, re.DOTALL)
    assert block is not None and yaml.safe_load(block[1]) == RESULTS.changed_settings
    assert text.count("Gen. PPL 10") == NUM_SAMPLES
    assert "**1.** Gen. PPL 100.0, entropy 1.00 nats" in text
    assert text.rstrip().endswith("```")
    assert "{{" not in text and "{%" not in text and "None" not in text
    assert "\n\n\n" not in text


def test_the_mauve_of_few_texts_is_left_out_with_the_reason(tmp_path: Path) -> None:
    few = {
        "sample_scores": text_scores(499, 1.5, 0.75, 0.125, 321.0, 0.5),
        "real_scores": text_scores(499, 1.75, 0.875, 0.0, 99.0, 0.9),
    }
    run = make_run(tmp_path / "few", replace(RESULTS, **few))
    card = write_card(read_run(run), run / "pipeline")
    assert "mauve" not in {result.metric_type for result in card.data.eval_results}
    assert "| MAUVE |" not in card.text and "| samples | 499 | 1.500 | 0.750 | 0.125 | 321.0 |" in card.text
    assert "MAUVE is left out: it was measured on 499 texts of one seed" in card.text
    assert "Not measured" not in card.text
    # the run keeps what it has measured
    assert read_run(run).results.sample_scores.values["mauve"] == 0.5
    card = write_card(read_run(make_run(tmp_path / "many")), tmp_path / "card")
    assert "of the samples 500 texts of one seed, 7" in card.text


def test_the_card_shows_what_lies_between_real_text_and_samples(tmp_path: Path) -> None:
    scores = text_scores(500, 1.625, 0.75, 0.0, 150.25, 0.75).to_json()
    ladder = [{"title": "decoded", "token_accuracy": 0.875, "scores": scores}]
    run = make_run(tmp_path / "small", replace(RESULTS, ladder=ladder))
    text = write_card(read_run(run), run / "pipeline").text
    header = "| texts | tokens kept | entropy (nats) | n-gram diversity | seq-rep-4 | generative perplexity | MAUVE |"
    assert (
        f"{header}\n|---|---|---|---|---|---|---|\n| decoded | 0.875 | 1.625 | 0.750 | 0.000 | 150.2 | 0.750 |" in text
    )
    assert "\n\n\n" not in text


def test_metadata_survives_the_round_trip_through_the_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small", replace(RESULTS, license="mit", language="en", model_id="org/small"))
    write_card(read_run(run), run / "pipeline")
    card = ModelCard.load(run / "pipeline" / "README.md")
    data = card.data
    assert (data.license, data.language, data.library_name) == ("mit", "en", "diffusers")
    assert (data.pipeline_tag, data.base_model, data.datasets) == ("text-generation", ["org/backbone"], ["org/corpus"])
    assert data.model_name == "small"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"entropy": 1.5, "diversity": 0.75, "repetition": 0.125, "perplexity": 321.06, "mauve": 0.5}
    for result in data.eval_results:
        assert (result.task_type, result.dataset_type, result.dataset_config) == (
            "text-generation",
            "org/corpus",
            "plain",
        )
        assert "500 texts of 8 tokens, 32 steps, seed 7" in result.metric_name
        assert ("judge org/judge" in result.metric_name) == (result.metric_type in ("perplexity", "mauve"))
    assert ModelCardData(**yaml.safe_load(data.to_yaml())).to_dict() == data.to_dict()
    assert str(ModelCard(str(card))) == str(card)
    assert 'from_pretrained("org/small")' in card.text
    assert "No licence has been stated" not in card.text


def test_the_hub_accepts_the_card(tmp_path: Path, loopback_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", loopback_hub.endpoint)
    run = make_run(tmp_path / "small")
    write_card(read_run(run), run / "pipeline").validate()
    broken = ModelCard.load(run / "pipeline" / "README.md")
    broken.data.to_yaml = lambda **_: "license: [unclosed"  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="license"):
        broken.validate()


def test_what_is_no_hub_id_is_named_in_the_text_only(tmp_path: Path) -> None:
    results = replace(
        RESULTS,
        corpus=Source("speeches.txt.gz", is_hub_id=False),
        token_encoder=Source("package:encoder/model", is_hub_id=False),
    )
    run = make_run(tmp_path / "small", results)
    card = write_card(read_run(run), run / "pipeline")
    assert card.data.base_model is None and card.data.datasets is None and card.data.license is None
    assert {result.dataset_type for result in card.data.eval_results} == {"local"}
    assert "Training text: `speeches.txt.gz` (not on the Hub)" in card.text
    assert "Frozen token encoder: `package:encoder/model` (not on the Hub)" in card.text
    assert "No licence has been stated" in card.text
    # settings.yaml names folders of the machine
    assert "somewhere" not in str(card) and str(tmp_path) not in str(card)


def test_what_was_not_measured_is_left_out_and_named(tmp_path: Path) -> None:
    results = replace(
        RESULTS,
        judge=None,
        mauve=None,
        sample_scores=text_scores(500, 1.5, 0.75, 0.125),
        real_scores=text_scores(10, 1.75, 0.875, 0.0),
        samples=[Sample("w", None, 0.5)],
    )
    run = make_run(tmp_path / "small", results)
    card = write_card(read_run(run), run / "pipeline")
    assert {result.metric_type for result in card.data.eval_results} == {"entropy", "diversity", "repetition"}
    assert "| texts | number | entropy (nats) | n-gram diversity | seq-rep-4 |\n" in card.text
    assert "Not measured: generative perplexity, MAUVE." in card.text
    assert "differ in size" in card.text
    assert "Gen. PPL not measured, entropy 0.50 nats" in card.text

    nothing = write_card(
        Run("x", SETTINGS, replace(results, sample_scores=None, real_scores=None, samples=[])), tmp_path
    )
    assert nothing.data.eval_results is None
    assert "No texts were scored" in nothing.text and "None were drawn" in nothing.text


def test_card_of_what_was_not_trained_says_so_and_has_no_number(tmp_path: Path) -> None:
    results = RunResults({"loop.max_steps": 400}, 8, RESULTS.corpus, token_encoder=RESULTS.token_encoder)
    card = write_card(Run("planned", SETTINGS, results), tmp_path / "planned")
    assert "**No model of this configuration has been trained.**" in card.text
    assert "Planned: 400 steps" in card.text
    assert card.data.eval_results is None
    assert "![" not in card.text
    assert [file.name for file in (tmp_path / "planned").iterdir()] == ["README.md"]


def test_card_of_a_token_decoder_names_what_it_was_trained_for(tmp_path: Path) -> None:
    results = replace(RESULTS, token_encoder=None, components=Source("org/ldlm", is_hub_id=True))
    card = write_card(Run("decoder", SETTINGS, results), tmp_path)
    assert card.data.base_model == ["org/ldlm"]
    assert "Components that the token decoder was trained for, all of them frozen: `org/ldlm` on the Hub." in card.text


def test_card_says_whether_the_model_takes_prompts(tmp_path: Path) -> None:
    card = write_card(Run("plain", SETTINGS, RESULTS), tmp_path / "plain").text
    assert "\n\n* Texts are generated without a prompt and at one length, 8 tokens.\n" in card
    settings = SETTINGS | {"conditioning": {"prefix_share": 0.25, "gaps_share": 0.0}}
    card = write_card(Run("prompted", settings, RESULTS), tmp_path / "prompted").text
    assert "\n\n* Texts have 8 tokens; longer ones are written block by block." in card
    assert "without a prompt" not in card


def test_card_of_a_student_names_its_teacher_and_draws_its_distillation(tmp_path: Path) -> None:
    settings = SETTINGS | {"method": "flow_map"}
    results = replace(RESULTS, token_encoder=None, components=Source("org/ldlm", is_hub_id=True))
    # 16 steps are of a progressive student's
    keys = ["semigroup_loss", "eval/distillation_loss", "eval/distance_to_teacher/steps=16"]
    log = [{"step": step, **dict.fromkeys(keys, 1 / step)} for step in range(1, 5)]
    text = write_card(Run("student", settings, results, log), tmp_path).text
    assert "Teacher of the denoiser (flow map), whose other parts are kept as they are: `org/ldlm` on the Hub." in text
    assert [list(panel.curves) for panel in panels_of(log)] == [list(PANELS[2].curves), keys[2:]]
    assert "It was distilled for few sampling steps" in text and "was not distilled" not in text
    assert "was not distilled" in write_card(Run("teacher", SETTINGS, RESULTS), tmp_path / "teacher").text


@pytest.mark.parametrize(
    "text",
    ["---\nlicense: mit\n---", "```\n# heading\n```", "<script>x</script> | a |", "a\x85b\r\nc" + " d" * 200, ""],
)
def test_sample_cannot_break_out_of_the_card(tmp_path: Path, text: str) -> None:
    run = Run("x", SETTINGS, replace(RESULTS, samples=[Sample(text, 1.0, 1.0), Sample("after", 1.0, 1.0)]))
    written = write_card(run, tmp_path)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == written.data.to_dict()
    block = fenced(text)
    assert block in loaded.text
    fence = block.splitlines()[0].removesuffix("text")
    assert not any(line.startswith(fence) for line in block.splitlines()[1:-1])
    assert max(len(line) for line in block.splitlines()) < 120
    assert block.split()[1:-1] == text.split()


def test_pictures_lie_beside_the_card_and_are_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small")
    card = write_card(read_run(run), run / "pipeline")
    named = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text)
    assert named == ["training_curves.png", "diffusion_loss.png"]
    for name in named:
        with Image.open(run / "pipeline" / name) as image:
            assert image.format == "PNG" and image.width >= 600
            assert not image.info.get("Software")
        assert (run / "pipeline" / name).stat().st_size < 100_000


def test_pictures_of_a_long_noisy_run_stay_small(tmp_path: Path) -> None:
    pictures = plot_training_curves(log_lines(20_000), tmp_path)
    assert all((tmp_path / name).stat().st_size < 100_000 for name in pictures)


def test_same_log_gives_the_same_pictures_whatever_the_user_has_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    names = list(plot_training_curves(log_lines(40), tmp_path / "first"))
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "black")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    plot_training_curves(log_lines(40), tmp_path / "second")
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_only_what_the_log_holds_is_drawn(tmp_path: Path) -> None:
    log = [{"step": step, "token_loss": 1 / step, "token_accuracy": 0.5} for step in range(1, 5)]
    assert [panel.label for panel in panels_of(log)] == ["training loss", "token accuracy (share)"]
    assert list(plot_training_curves(log, tmp_path)) == ["training_curves.png"]
    assert plot_training_curves([], tmp_path) == {}


def test_skipped_steps_are_no_points_and_means_keep_the_mean() -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "skipped": True, "loss": "nan"}, {"step": 3, "loss": 4.0}]
    assert series(log, "loss") == ([1, 3], [2.0, 4.0])
    values = [float(value) for value in range(4 * MAX_POINTS)]
    means = group_means(values)
    assert len(means) == MAX_POINTS
    assert means[0] == 1.5 and sum(means) / len(means) == sum(values) / len(values)
    assert group_means([1.0, 2.0]) == [1.0, 2.0]
    assert len({key for panel in PANELS for key in panel.curves}) == sum(len(panel.curves) for panel in PANELS)


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(make_run(tmp_path / "small"))
    monkeypatch.delitem(sys.modules, "ldlm_hf.hub.training_curves")
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=r"pip install 'ldlm_hf\[training\]'"):
        write_card(run, tmp_path)


def test_command_writes_the_card_again_from_the_files_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "small")
    first = str(write_card(read_run(run), run / "pipeline"))
    (run / "pipeline" / "README.md").unlink()
    main([str(run)])
    assert (run / "pipeline" / "README.md").read_text(encoding="utf-8") == first
    assert str(run / "pipeline" / "README.md") in capsys.readouterr().out

    options = ["--license", "cc0-1.0", "--language", "en", "--model_id", "org/other", "--name", "other"]
    main([str(run), "--output", str(tmp_path / "elsewhere"), *options])
    card = ModelCard.load(tmp_path / "elsewhere" / "README.md")
    assert (card.data.license, card.data.language, card.data.model_name) == ("cc0-1.0", "en", "other")
    assert "# other\n" in card.text and 'from_pretrained("org/other")' in card.text
    assert (tmp_path / "elsewhere" / "diffusion_loss.png").is_file()


def test_folders_that_hold_no_finished_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="holds no settings.yaml"):
        read_run(tmp_path)
    run = make_run(tmp_path / "small")
    (run / "results.json").write_text('{"changed_settings": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="results of a run"):
        read_run(run)
    (run / "results.json").unlink()
    with pytest.raises(OSError, match="results.json is not there"):
        read_run(run)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 4')
    with pytest.raises(ValueError, match="line 25"):
        read_run(run)
    (run / "settings.yaml").write_text("loop: {}", encoding="utf-8")
    with pytest.raises(ValueError, match="sections data, loop, optimizer and evaluation"):
        read_run(run)


def test_model_id_that_the_hub_would_refuse_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a b"):
        write_card(Run("x", SETTINGS, replace(RESULTS, model_id='a b")')), tmp_path)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (5, 90, 5400, 432_000)] == [
        "5.0 seconds",
        "1.5 minutes",
        "1.5 hours",
        "5.0 days",
    ]
