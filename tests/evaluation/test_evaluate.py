"""Evaluations of tiny pipelines: the numbers are the metrics' own, a killed one goes on, and every layout agrees."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import evaluate
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from matplotlib.collections import PathCollection
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from figures import evaluation as figures
from ldlm_hf import GenerativePerplexity, LDLMPipeline, Mauve, NGramDiversity, TangentDDIMScheduler, TokenEntropy
from ldlm_hf.evaluation import plan as evaluation_plan
from ldlm_hf.evaluation import run as evaluation_run
from ldlm_hf.evaluation import scorer
from ldlm_hf.evaluation.folder_lock import lock_folder
from ldlm_hf.evaluation.part_cache import FinishedParts, module_digest, remove_half_written
from ldlm_hf.evaluation.real_text import repeated_words, shuffled_words
from ldlm_hf.evaluation.results import over_seeds
from ldlm_hf.evaluation.samples import SampleSet, pairs_of, sample_generator
from ldlm_hf.metrics import load_judge
from ldlm_hf.metrics.registry import SCORES


Run = Callable[..., None]
GUIDED = "own:self_condition_scale=1.5"
COUNTS = ("num_texts", "num_blank_texts", "num_unscored_texts", "num_nonfinite_texts")


@pytest.fixture
def judge_folder(backbone_folders: dict[str, Path], tiny_tokenizer: Any) -> Path:
    tiny_tokenizer.save_pretrained(backbone_folders["gpt2"])
    return backbone_folders["gpt2"]


@pytest.fixture
def pipeline_folder(make_pipeline: Callable[..., LDLMPipeline], tmp_path: Path) -> Path:
    make_pipeline().save_pretrained(tmp_path / "run" / "pipeline")
    return tmp_path / "run" / "pipeline"


@pytest.fixture
def command(pipeline_folder: Path, judge_folder: Path, tmp_path: Path) -> list[str]:
    """An evaluation of 20 texts, the fewest that MAUVE takes, without its output folder."""
    generator = random.Random(0)
    lines = [" ".join(f"w{generator.randint(2, 39)}" for _ in range(60)) for _ in range(12)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    return [
        *("--pipeline", str(pipeline_folder)),
        *("--num_samples", "20", "--seeds", "2", "--steps", "1", "3", "--batch_size", "8"),
        *("--judge", str(judge_folder), "--judge_batch_size", "16"),
        f"data.source={tmp_path / 'corpus.txt'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.holdout_documents=8",
    ]


class RandomTokensPipeline(DiffusionPipeline):
    """What evaluation asks of a pipeline, and nothing more: neither latents nor a scheduler."""

    sequence_length = 8

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.register_modules(tokenizer=tokenizer)

    def __call__(
        self, batch_size: int, num_inference_steps: int, output_type: str, generator: Any = None
    ) -> BaseOutput:
        self.num_function_evaluations = num_inference_steps
        generators = generator or [None] * batch_size
        return BaseOutput(sequences=torch.stack([torch.randint(2, 40, (8,), generator=one) for one in generators]))


@pytest.fixture
def run(run_script: Run, command: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Evaluates into a folder of `tmp_path`, with more or other options; gives the results."""

    def evaluate_into(folder: str, *more: str, arguments: list[str] = command) -> dict[str, Any]:
        run_script("evaluate", *arguments, "--output_dir", str(tmp_path / folder), *more)
        return read(tmp_path / folder)

    return evaluate_into


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def drawn_points(results: dict[str, Any]) -> list[tuple[float, float]]:
    """Entropy and perplexity of all points in the picture of the frontier."""
    collections = figures.plot_pareto([results]).axes[0].collections
    return [tuple(points.get_offsets()[0]) for points in collections if isinstance(points, PathCollection)]


def without_times(results: dict[str, Any]) -> list[Any]:
    """All that two evaluations of the same things share."""
    entries = json.loads(json.dumps(results["pipelines"]))
    for entry in entries:
        for one in entry["sets"]:
            for part in (*one["seeds"], one["mean"], one["std"]):
                part.pop("seconds")
                part.pop("batch_sizes", None)
    return [results["real_text"], results["controls"], entries]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(steps, seed, index) of every sample that is made from now on."""
    samples: list[tuple[int, int, int]] = []
    make = SampleSet.make

    def watched(self: SampleSet, pipeline: LDLMPipeline, indices: list[int], batch_size: int) -> None:
        make(self, pipeline, indices, batch_size)
        samples.extend((self.steps, self.seed, index) for index in indices)

    monkeypatch.setattr(SampleSet, "make", watched)
    return samples


ALL_SAMPLES = Counter((steps, seed, index) for steps in (1, 3) for seed in (0, 1) for index in range(20))


def test_the_script_does_not_hide_the_package_of_its_name(repository: Path) -> None:
    assert (repository / "training" / "evaluate.py").is_file() and str(repository / "training") in sys.path
    assert issubclass(TokenEntropy, evaluate.Metric)
    assert "site-packages" in evaluate.__file__


def test_numbers_are_the_metrics_own(
    run: Callable, judge_folder: Path, pipeline_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    results = run("out", "--controls", "--interpolation", "--num_positions", "3")
    entry = results["pipelines"][0]
    assert (entry["name"], entry["sequence_length"]) == ("run", 8)
    assert [one["steps"] for one in entry["sets"]] == [1, 3]
    assert [one["seed"] for one in entry["sets"][0]["seeds"]] == [0, 1]

    # a set made by hand: each sample alone, from its own generator
    pipeline = LDLMPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    alone = [
        pipeline(num_inference_steps=3, generator=sample_generator(1, index, pipeline.device)).sequences
        for index in range(20)
    ]
    sequences = torch.cat(alone)
    assert len(sequences.unique(dim=0)) > 10
    texts = tiny_tokenizer.batch_decode(sequences, skip_special_tokens=True)
    judge = load_judge(str(judge_folder))
    scores = entry["sets"][1]["seeds"][1]
    perplexity = GenerativePerplexity().compute(predictions=texts, judge=judge)
    assert scores["generative_perplexity"] == pytest.approx(perplexity["perplexity"], rel=1e-4)
    assert scores["trimmed_mean_perplexity"] == pytest.approx(perplexity["trimmed_mean_perplexity"], rel=1e-4)
    assert scores["entropy"] == TokenEntropy().compute(predictions=sequences)["entropy"]
    assert scores["diversity"] == NGramDiversity().compute(predictions=sequences)["diversity"]
    assert scores["num_blank_texts"] == sum(not text for text in texts)
    assert (scores["num_texts"], scores["num_nonfinite_texts"], scores["num_unscored_texts"]) == (20, 0, 0)
    assert scores["seconds"] > 0 and scores["batch_sizes"] == [8]

    # real text: the held-out tokens in order, dealt out in turn to the table's row and to MAUVE's references
    lines = (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines()[-8:]
    tokens = torch.tensor([token for line in lines for token in [*tiny_tokenizer(line)["input_ids"], 1]])
    held_out = tokens[: len(tokens) // 8 * 8].view(-1, 8)
    drawn = held_out[torch.linspace(0, len(held_out) - 1, 40).round().long()]
    real, references = (
        tiny_tokenizer.batch_decode(part, skip_special_tokens=True) for part in (drawn[::2], drawn[1::2])
    )
    assert results["reference"] == {"source": "corpus.txt", "num_texts": 20, "num_held_out": len(held_out)}
    assert results["real_text"]["entropy"] == TokenEntropy().compute(predictions=drawn[::2])["entropy"]
    for texts_of_set, found in ((texts, scores), (real, results["real_text"])):
        mauve = Mauve().compute(predictions=texts_of_set, references=references, judge=judge)
        assert found["mauve"] == pytest.approx(mauve["mauve"], abs=1e-6)

    # over seeds
    for name in SCORES:
        values = [one[name] for one in entry["sets"][0]["seeds"]]
        assert entry["sets"][0]["mean"][name] == pytest.approx(statistics.mean(values))
        assert entry["sets"][0]["std"][name] == pytest.approx(statistics.stdev(values))
        assert math.isfinite(results["real_text"][name])
    assert set(SCORES) | set(COUNTS) <= results["controls"]["shuffled_words"].keys()
    assert results["controls"]["repeated_words"]["entropy"] <= math.log(4)
    assert results["controls"]["repeated_words"]["diversity"] < results["real_text"]["diversity"]
    expected = {"num_samples": 20, "seeds": [0, 1], "steps": [1, 3], "judge": judge_folder.name, "mauve": True}
    assert expected.items() <= results["settings"].items()
    assert results["judge"] == {"name": judge_folder.name, "max_length": 16, "add_bos": False}
    assert {"torch", "ldlm_hf", "mauve-text"} <= results["versions"].keys()

    # the line from one real text to another: its ends are reconstructions
    curve = entry["interpolation"]
    assert (curve["positions"], curve["num_pairs"]) == ([0.0, 0.5, 1.0], 10)
    ends = pairs_of(drawn[::2], 10)
    latents = [pipeline.encode_sequences(ends[:, end]) for end in (0, 1)]
    for place, latent in ((0, latents[0]), (1, latents[0].lerp(latents[1], 0.5)), (2, latents[1])):
        decoded = pipeline.decode_to_sequences(latent)
        assert curve["entropy"][place] == pytest.approx(TokenEntropy().compute(predictions=decoded)["entropy"])
        texts_there = tiny_tokenizer.batch_decode(decoded, skip_special_tokens=True)
        perplexity_there = GenerativePerplexity().compute(predictions=texts_there, judge=judge)["perplexity"]
        assert curve["generative_perplexity"][place] == pytest.approx(perplexity_there, rel=1e-4)


def test_what_people_read(run: Callable, judge_folder: Path, tmp_path: Path) -> None:
    run("out", "--controls", "--interpolation", "--num_positions", "3")
    folder = tmp_path / "out"
    table = (folder / "results.md").read_text(encoding="utf-8")
    for row in ("real text |", "real text, shuffled words |", "real text, repeated words |", "run | 1 |", "run | 3 |"):
        assert table.count(f"| {row}") == 1
    for condition in (
        "20 texts of 8 tokens",
        "seeds 0, 1",
        f"`{judge_folder.name}`",
        "corpus.txt",
        "batches of 8",
        "CPU",
    ):
        assert condition in table
    samples = (folder / "samples.md").read_text(encoding="utf-8")
    assert samples.count("Gen. PPL ") == 4 * (3 + 2) and samples.count("entropy ") == 4 * (3 + 2)
    for name in ("pareto", "interpolation"):
        with Image.open(folder / f"{name}.png") as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 3
    for file in ("results.json", "results.md", "samples.md"):
        text = (folder / file).read_text(encoding="utf-8")
        assert str(tmp_path) not in text and str(judge_folder.parent) not in text


def test_a_killed_evaluation_goes_on_where_it_stopped(
    run: Callable, made: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run("whole", "--controls")
    assert Counter(made) == ALL_SAMPLES
    made.clear()

    class Killed(BaseException):
        pass

    make = SampleSet.make

    def killed_in_its_fourth_batch(self: SampleSet, *arguments: Any) -> None:
        if len(made) >= 24:
            raise Killed
        make(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SampleSet, "make", killed_in_its_fourth_batch)
        with pytest.raises(Killed):
            run("killed", "--controls")
    assert len(made) == 24 and not (tmp_path / "killed" / "results.json").exists()

    # and again while it scores
    scored = []
    score_set = scorer.score_set

    def watched(*arguments: Any) -> Any:
        if len(scored) == 3:
            raise Killed
        scored.append(arguments[1])
        return score_set(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scorer, "score_set", watched)
        with pytest.raises(Killed):
            run("killed", "--controls")
    assert Counter(made) == ALL_SAMPLES
    monkeypatch.setattr(scorer, "score_set", lambda *a: (scored.append(a[1]), score_set(*a))[1])
    resumed = run("killed", "--controls")
    assert Counter(made) == ALL_SAMPLES
    # real text, two controls, four sets: each once
    assert len(scored) == 7 and len({tuple(texts) for texts in scored}) == 7
    assert without_times(resumed) == without_times(whole)

    # what a killed process has left half-written goes; another evaluation in the same folder is refused
    parts = tmp_path / "killed" / "parts"
    half = [parts.parent / "results.json.17", parts / "scores-0.json.17", next(parts.glob("samples-*")) / "8.pt.17"]
    half = [file.with_name(f"{file.name}.unfinished") for file in half]
    for file in half:
        file.write_text("{", encoding="utf-8")
    with (
        lock_folder(parts, "wait"),
        pytest.raises(OSError, match="parts is in use .* wait for that evaluation, or name another --output_dir"),
    ):
        run("killed", "--controls")
    run("killed", "--controls")
    assert not any(file.exists() for file in half) and Counter(made) == ALL_SAMPLES

    # a part that is lost is the only one that is made again
    next(iter(sorted((tmp_path / "killed" / "parts").glob("samples-*/00000008.pt")))).unlink()
    made.clear()
    assert without_times(run("killed", "--controls")) == without_times(whole)
    assert len(made) == 8 and len(scored) == 7


def test_samples_do_not_depend_on_their_batch(run: Callable, made: list) -> None:
    no_judge = ("--judge", "none", "--steps", "3")
    expected = run("eights", *no_judge)
    assert without_times(run("threes", *no_judge, "--batch_size", "3")) == without_times(expected)
    assert without_times(run("ones", *no_judge, "--batch_size", "1")) == without_times(expected)
    # more samples are the same ones and more of them; the batches that a set was made in are told
    made.clear()
    more = run("eights", *no_judge, "--num_samples", "24", "--batch_size", "5")
    assert Counter(made) == Counter((3, seed, index) for seed in (0, 1) for index in range(20, 24))
    assert more["pipelines"][0]["sets"][0]["seeds"][0]["batch_sizes"] == [5, 8]
    assert without_times(run("eights", *no_judge)) == without_times(expected)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(
    run: Callable, command: list[str], repository: Path, tmp_path: Path
) -> None:
    expected = run("one", "--interpolation", "--num_positions", "3")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [*command, "--interpolation", "--num_positions", "3", "--output_dir", str(tmp_path / "two")]
    finished = subprocess.run(
        [*launch, str(repository / "training/evaluate.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.count("# Evaluation") == 1
    results = read(tmp_path / "two")
    assert "processes: 2" in results["hardware"]
    assert without_times(results) == without_times(expected)


def test_processes_on_devices_of_several_kinds_are_refused(
    run: Callable, made: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The times of a set would be of neither; here another process has told of its device."""
    monkeypatch.setattr(evaluation_plan, "gather_object", lambda mine: [*mine, "another processor"])
    with pytest.raises(ValueError, match=r"several kinds \(.*another processor.*launch them on one kind"):
        run("out", "--judge", "none", "--steps", "1")
    assert not made


def test_other_weights_and_steps_are_never_served_from_what_is_there(
    run: Callable, made: list, pipeline_folder: Path, tmp_path: Path
) -> None:
    no_judge = ("--judge", "none", "--seeds", "1")
    first = run("out", *no_judge)
    made.clear()
    run("out", *no_judge, "--steps", "3", "4")
    assert {steps for steps, _, _ in made} == {4}
    pipeline = LDLMPipeline.from_pretrained(pipeline_folder)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).mul_(1.5)
    pipeline.save_pretrained(pipeline_folder)
    made.clear()
    second = run("out", *no_judge)
    assert len(made) == 2 * 20
    assert second["pipelines"][0]["digest"] != first["pipelines"][0]["digest"]
    pipeline.set_guidance(1.5)
    pipeline.save_pretrained(pipeline_folder)
    made.clear()
    guided = run("out", *no_judge)
    assert len(made) == 2 * 20
    assert [one["nfe"] for one in guided["pipelines"][0]["sets"]] == [1, 5]
    made.clear()
    run("out", *no_judge, "--dtype", "bfloat16")
    assert len(made) == 2 * 20


def test_a_pipeline_that_changes_during_its_evaluation_is_refused(
    run: Callable, make_pipeline: Callable[..., LDLMPipeline], pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples would be kept under the name of what was there before."""
    make_plan = evaluation_run.make_plan

    def plan_and_train(*arguments: Any) -> Any:
        pipeline = make_pipeline()
        with torch.no_grad():
            next(pipeline.transformer.parameters()).mul_(1.5)
        pipeline.save_pretrained(pipeline_folder)
        return make_plan(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_run, "make_plan", plan_and_train)
        with pytest.raises(OSError, match="has changed since this evaluation has begun"):
            run("out", "--judge", "none", "--steps", "1")
    assert run("out", "--judge", "none", "--steps", "1")["pipelines"]


def test_reference_features_are_made_once_for_all_evaluations(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = ("--cache_dir", str(tmp_path / "features"), "--seeds", "1", "--steps", "1")
    first = run("first", *shared)

    def never(*_: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(scorer, "text_features", never)
    assert without_times(run("second", *shared)) == without_times(first)
    with pytest.raises(AssertionError, match="made again"):
        run("third", "data.holdout_documents=7", *shared)


def test_a_set_is_scored_again_only_where_it_lacks_a_score(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("out", "--judge", "none", "--steps", "1")
    scored = []
    score_set = scorer.score_set
    monkeypatch.setattr(scorer, "score_set", lambda *a: (scored.append(a[1]), score_set(*a))[1])
    with monkeypatch.context() as patch:
        patch.delitem(SCORES, "diversity")
        before = run(*arguments)
    assert len(scored) == 3 and "diversity" not in before["real_text"]
    first = run(*arguments)
    assert len(scored) == 6 and first["real_text"]["diversity"] is not None
    with monkeypatch.context() as patch:
        patch.delitem(SCORES, "diversity")
        assert without_times(run(*arguments)) == without_times(before)
    assert without_times(run(*arguments)) == without_times(first)
    assert len(scored) == 6


@pytest.mark.parametrize("batch_size", ["8", "3"])
def test_latents_that_are_not_finite_are_counted_and_reported(
    run: Callable, pipeline_folder: Path, tmp_path: Path, batch_size: str
) -> None:
    pipeline = LDLMPipeline.from_pretrained(pipeline_folder)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).fill_(float("nan"))
    pipeline.save_pretrained(pipeline_folder)
    results = run("out", "--batch_size", batch_size)
    one = results["pipelines"][0]["sets"][0]
    assert [scores["num_nonfinite_texts"] for scores in one["seeds"]] == [20, 20]
    assert results["real_text"]["num_nonfinite_texts"] == 0
    row = next(
        line for line in (tmp_path / "out" / "results.md").read_text().splitlines() if line.startswith("| run |")
    )
    assert row.endswith("| 40 |")


def test_blank_texts_are_counted_and_leave_no_number(
    run: Callable, make_pipeline: Callable[..., LDLMPipeline], pipeline_folder: Path, tmp_path: Path
) -> None:
    pipeline = make_pipeline()
    with torch.no_grad():
        # the end-of-text token, always
        pipeline.token_decoder.head.weight.zero_()
    pipeline.save_pretrained(pipeline_folder)
    results = run("out", "--interpolation")
    one = results["pipelines"][0]["sets"][0]
    for scores in one["seeds"]:
        assert scores["num_blank_texts"] == scores["num_unscored_texts"] == 20
        assert scores["generative_perplexity"] is scores["trimmed_mean_perplexity"] is scores["mauve"] is None
        assert scores["entropy"] == 0
    assert one["mean"]["mauve"] is one["std"]["mauve"] is None
    assert one["mean"]["num_blank_texts"] == 20
    curve = results["pipelines"][0]["interpolation"]
    assert set(curve["generative_perplexity"]) == {None} and curve["roughness"] is None
    assert curve["num_unscored_texts"] == 11 * 10
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| run | 1 | 1 | – | – | – | 0." in table and "| 40 | 40 | 0 |" in table
    assert (tmp_path / "out" / "pareto.png").is_file()
    real = results["real_text"]
    assert drawn_points(results) == [(real["entropy"], real["generative_perplexity"])]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--judge", "./no-such-judge"], "no-such-judge.*cannot be loaded"),
        (["--judge", "package:no_such_package/judge.gguf"], "not installed"),
        (["--num_samples", "19"], r"--num_samples 19: MAUVE needs at least 20.*--no_mauve"),
        (["--num_samples", "40"], r"holds 61 sequences of 8 tokens out, but --num_samples 40 needs 80.*--no_mauve"),
        (["--num_samples", "62", "--no_mauve"], r"needs 62 of them"),
        (["data.holdout_documents=0"], "no text is held out. Set validation_split"),
        (["data.source=nowhere.txt"], "nowhere.txt"),
        (["data.holdout_document=3"], "did you mean 'data.holdout_documents'"),
        (["--config", "nowhere.yaml"], "no such file"),
        (["--names", "a", "b"], "gives 2 names to 1 pipelines"),
        (["--steps", "3", "3"], "has a number twice"),
        (["--interpolation", "--num_pairs", "11"], "at most 10 pairs"),
        (["--interpolation", "--num_positions", "2"], "a point between"),
        (["--num_pairs", "3"], "--num_pairs 3 is of the lines that --interpolation decodes"),
    ],
)
def test_bad_evaluations_stop_before_any_sampling(
    run: Callable, made: list, more: list[str], expected: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=expected):
        run("out", *more)
    assert not made and not (tmp_path / "out").exists()


def test_a_blank_reference_is_refused(run: Callable, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    # a document of nothing but the unknown token, which no text shows
    corpus.write_text("\n".join([*corpus.read_text().splitlines(), " ".join(["unknown"] * 60)]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"of the 20 held-out texts of .* that MAUVE would compare with are blank"):
        run("out", "data.holdout_documents=9")
    assert run("out", "data.holdout_documents=9", "--no_mauve", "--steps", "1")["real_text"]["num_blank_texts"] > 0


@pytest.mark.parametrize(
    "bad", [["--steps", "0"], ["--num_samples", "-1"], ["--seeds", "two"], ["--dtype", "int8"], []]
)
def test_bad_command_lines(run_script: Run, command: list[str], bad: list[str], tmp_path: Path) -> None:
    output = ["--output_dir", str(tmp_path / "out")] if bad else []
    with pytest.raises(SystemExit):
        run_script("evaluate", *command, *bad, *output)


def test_pipelines_that_do_not_go_together(
    run: Callable,
    make_pipeline: Callable[..., LDLMPipeline],
    tiny_tokenizer: Any,
    pipeline_folder: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(OSError, match="--pipeline .*nowhere.* cannot be loaded.*RUN/pipeline"):
        run("out", "--pipeline", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"\['run', 'run'\] are not all different.*--names"):
        run("out", "--pipeline", str(pipeline_folder), str(pipeline_folder))
    make_pipeline(latent_encoder=None).save_pretrained(tmp_path / "bare" / "pipeline")
    with pytest.raises(ValueError, match="--interpolation encodes.*'bare' lacks latent_encoder: save it with"):
        run("out", "--pipeline", str(pipeline_folder), str(tmp_path / "bare" / "pipeline"), "--interpolation")
    tokenizer = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    tokenizer["model"]["vocab"]["another"] = tokenizer["model"]["vocab"].pop("w39")
    other = type(tiny_tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer)), unk_token="<unk>", eos_token="<eos>"
    )
    make_pipeline(tokenizer=other).save_pretrained(tmp_path / "other" / "pipeline")
    with pytest.raises(ValueError, match="differ in tokenizer, sequence or source length.*one by one"):
        run("out", "--pipeline", str(pipeline_folder), str(tmp_path / "other" / "pipeline"))
    assert not (tmp_path / "out").exists()


def test_two_pipelines_in_one_table(
    run: Callable,
    make_components: Callable,
    make_pipeline: Callable[..., LDLMPipeline],
    pipeline_folder: Path,
    tmp_path: Path,
) -> None:
    """One whole, and another without encoders."""
    without_encoders = make_components(seed=1) | {"token_encoder": None, "latent_encoder": None}
    make_pipeline(**without_encoders).save_pretrained(tmp_path / "bare" / "pipeline")
    results = run(
        "out",
        *("--pipeline", str(pipeline_folder), str(tmp_path / "bare" / "pipeline"), "--names", "whole", "bare"),
        *("--judge", "none", "--steps", "2"),
    )
    assert [entry["name"] for entry in results["pipelines"]] == ["whole", "bare"]
    assert [entry["pipeline"] for entry in results["pipelines"]] == ["run/pipeline", "bare/pipeline"]
    whole, bare = (entry["sets"][0]["mean"] for entry in results["pipelines"])
    assert whole["entropy"] != bare["entropy"]
    assert (
        results["judge"] is results["mauve"] is whole["generative_perplexity"] is whole["num_unscored_texts"] is None
    )
    assert not (tmp_path / "out" / "pareto.png").exists()


def test_samplers_in_one_table(run: Callable, pipeline_folder: Path, tmp_path: Path) -> None:
    """Each is what the pipeline makes with that scheduler and that call, counts its evaluations, and is drawn."""
    second_order = "TangentDPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++"
    samplers = [
        "own",
        "TangentDDIMScheduler:eta=0.5,time_grid=log_snr",
        second_order,
        "UniPCMultistepScheduler",
        GUIDED,
    ]
    results = run("out", "--samplers", *samplers, "--steps", "2", "3", "--interpolation", "--num_positions", "3")
    entries = results["pipelines"]
    assert [entry["sampler"] for entry in entries] == samplers
    assert [entry["name"] for entry in entries] == [f"run, {sampler}" for sampler in samplers]
    assert [[one["nfe"] for one in entry["sets"]] for entry in entries] == [[2, 3]] * 4 + [[3, 5]]
    entropies = [[[seed["entropy"] for seed in one["seeds"]] for one in entry["sets"]] for entry in entries]
    assert len({json.dumps(some) for some in entropies}) == len(samplers)
    # lines between real texts are decoded, not sampled
    assert [("interpolation" in entry) for entry in entries] == [True, False, False, False, False]

    pipeline = LDLMPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = TangentDDIMScheduler.from_config(pipeline.scheduler.config, eta=0.5, time_grid="log_snr")
    generators = [sample_generator(1, index, pipeline.device) for index in range(20)]
    sequences = pipeline(batch_size=20, num_inference_steps=3, generator=generators).sequences
    expected = TokenEntropy().compute(predictions=sequences.tolist())["entropy"]
    assert entries[1]["sets"][1]["seeds"][1]["entropy"] == pytest.approx(expected, abs=1e-6)

    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert f"| run, {GUIDED} | 3 | 5 |" in table
    figure = figures.plot_over_evaluations([results])
    shown = {axes.get_ylabel(): axes for axes in figure.axes if axes.get_visible()}
    assert len(shown) == 5
    curves = shown[SCORES["entropy"].heading].containers
    assert [list(curve.lines[0].get_xdata()) for curve in curves] == [[2, 3]] * 4 + [[3, 5]]
    assert list(curves[1].lines[0].get_ydata()) == [one["mean"]["entropy"] for one in entries[1]["sets"]]
    assert (tmp_path / "out" / "evaluations.png").is_file()


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("DDIM", "unknown scheduler 'DDIM'; known: own, TangentEulerMaruyamaScheduler, TangentDDIMScheduler"),
        ("TangentDDIMScheduler:steps=3", "unknown setting 'steps'; known: self_condition_scale.*eta"),
        ("own:eta=1.0", "unknown setting 'eta'; known: self_condition_scale, self_condition_decay"),
        ("TangentDDIMScheduler:eta", "'eta' is no key=value"),
        ("TangentDDIMScheduler:eta=2.0", r"eta=2\.0 must lie in \[0, 1\]"),
        ("TangentDDIMScheduler:time_grid=learned", "needs timestep_cdf"),
        ("TangentDPMSolverMultistepScheduler", "num_inference_steps=1 is below solver_order=2"),
        ("MDLMScheduler", "takes off masked noise, and the pipeline, .* a Tangent.*, was trained with latent noise"),
        ("own:temperature=0.5", "the call of a LDLMPipeline has no temperature"),
    ],
)
def test_bad_samplers(run: Callable, tmp_path: Path, sampler: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("out", "--samplers", sampler)
    assert not (tmp_path / "out").exists()


def test_text_of_a_training_configuration(
    run: Callable, tiny_overrides: list[str], command: list[str], tmp_path: Path
) -> None:
    """The sections that are not the text's are left alone."""
    text = next(item for item in tiny_overrides if item.startswith("data.source=")).removeprefix("data.source=")
    config = f"data: {{source: {text}, holdout_documents: 8}}\nloop: {{max_steps: 3}}\nno_such_section: {{a: 1}}\n"
    (tmp_path / "run.yaml").write_text(config, encoding="utf-8")
    arguments = [item for item in command if not item.startswith("data.")]
    results = run(
        "out", "--config", str(tmp_path / "run.yaml"), "--judge", "none", "--steps", "1", arguments=arguments
    )
    assert results["settings"]["data"]["holdout_documents"] == 8


def test_figures_from_any_number_of_results(run: Callable, run_script: Run, tmp_path: Path) -> None:
    results = run("a", "--seeds", "1", "--steps", "1", "--interpolation", "--num_positions", "3")
    others = {
        "b": results,
        "another_judge": results | {"judge": results["judge"] | {"name": "another"}},
        "longer_texts": results | {"pipelines": [results["pipelines"][0] | {"sequence_length": 9}]},
        "no_judge": results | {"judge": None},
        "no_results": {"judge": None},
    }
    for name, values in others.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    # what they show is what was measured
    entry = results["pipelines"][0]
    shown = [entry["sets"][0]["mean"], results["real_text"]]
    assert drawn_points(results) == [(one["entropy"], one["generative_perplexity"]) for one in shown]
    assert [text.get_text() for text in figures.plot_pareto([results]).axes[0].texts] == ["1"]
    (line,) = figures.plot_smoothness([results]).axes[0].lines
    assert list(line.get_xdata()) == entry["interpolation"]["positions"]
    assert list(line.get_ydata()) == entry["interpolation"]["generative_perplexity"]
    assert f"roughness {entry['interpolation']['roughness']:+.3f}" in line.get_label()

    first = str(tmp_path / "a" / "results.json")
    for script in ("pareto", "smoothness", "over_evaluations"):
        run_script(script, first, str(tmp_path / "b.json"), "--output", str(tmp_path / "figures" / f"{script}.png"))
        assert (tmp_path / "figures" / f"{script}.png").is_file()
    for name, expected in (
        ("another_judge", "different judges"),
        ("longer_texts", "different lengths"),
        ("no_judge", "--judge none"),
        ("no_results", "does not hold the results"),
        ("nowhere", "is not there"),
    ):
        with pytest.raises((ValueError, OSError), match=expected):
            run_script("pareto", first, str(tmp_path / f"{name}.json"), "--output", str(tmp_path / "x"))
    del results["pipelines"][0]["interpolation"]
    with pytest.raises(ValueError, match="evaluate with --interpolation"):
        figures.plot_smoothness([results])


def test_pareto_frontier() -> None:
    # (perplexity, entropy): the second is beaten by the first, the fourth by the third
    points = [(10.0, 3.0), (12.0, 3.0), (20.0, 4.0), (21.0, 3.5), (50.0, 4.2)]
    assert figures.pareto_frontier(points) == [0, 2, 4]
    assert figures.pareto_frontier(points[::-1]) == [4, 2, 0]
    assert figures.pareto_frontier([]) == []
    assert figures.pareto_frontier([(1.0, 2.0), (1.0, 2.0)]) == [0, 1]
    drawn = np.random.default_rng(0).random((40, 2)).round(1)
    beaten = {
        index
        for index, (perplexity, entropy) in enumerate(drawn)
        if any(p <= perplexity and e >= entropy and (p < perplexity or e > entropy) for p, e in drawn)
    }
    assert set(figures.pareto_frontier([tuple(point) for point in drawn])) == set(range(40)) - beaten


def test_results_are_there_when_everything_else_is(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever finds them takes the evaluation for finished."""

    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "plot_pareto", fails)
        with pytest.raises(OSError, match="disk is full"):
            run("out", "--seeds", "1", "--steps", "1")
    assert not (tmp_path / "out" / "results.json").exists()
    assert run("out", "--seeds", "1", "--steps", "1")["pipelines"]


def test_controls() -> None:
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran"]
    shuffled = shuffled_words(words, np.random.default_rng(0))
    assert sorted(shuffled) == sorted(words) and shuffled != words
    repeated = repeated_words(words, np.random.default_rng(0))
    assert len(repeated) == len(words) and repeated[:4] == repeated[4:8]
    assert " ".join(repeated[:4]) in " ".join(words)
    assert repeated_words(["one", "two"], np.random.default_rng(0)) == ["one", "two"]
    for make in (shuffled_words, repeated_words):
        assert make(words, np.random.default_rng(3)) == make(words, np.random.default_rng(3))
        assert make([], np.random.default_rng(0)) == []


def test_every_sample_has_randomness_of_its_own() -> None:
    def first(seed: int, index: int) -> float:
        return float(torch.randn(1, generator=sample_generator(seed, index, torch.device("cpu"))))

    drawn = [first(seed, index) for seed in range(5) for index in range(50)]
    assert len(set(drawn)) == 250
    assert first(3, 7) == drawn[3 * 50 + 7]


def test_pairs_use_no_text_twice() -> None:
    sequences = torch.arange(20)[:, None].expand(20, 3)
    pairs = pairs_of(sequences, 9)
    assert pairs.shape == (9, 2, 3)
    assert len(pairs[..., 0].unique()) == 18
    assert torch.equal(pairs, pairs_of(sequences, 9))


def test_mean_and_deviation_over_seeds() -> None:
    sets = [
        {"seed": seed, "num_texts": 5, "entropy": value, "mauve": None} for seed, value in enumerate((1.0, 2.0, 6.0))
    ]
    assert over_seeds(sets) == {
        "mean": {"entropy": 3.0, "mauve": None},
        "std": {"entropy": pytest.approx(math.sqrt((4 + 1 + 9) / 2)), "mauve": None},
    }
    assert over_seeds(sets[:1])["std"] == {"entropy": None, "mauve": None}


def test_finished_parts(tmp_path: Path) -> None:
    parts = FinishedParts(tmp_path, {"torch": "1"})
    calls = []

    def make() -> dict[str, int]:
        calls.append(1)
        return {"a": len(calls)}

    assert parts.value("x", make, seed=0) == parts.value("x", make, seed=0) == {"a": 1}
    assert parts.value("x", make, seed=1) == {"a": 2}
    assert FinishedParts(tmp_path, {"torch": "2"}).value("x", make, seed=0) == {"a": 3}
    rows = parts.rows("y", seed=0)
    rows.save([4, 1], {"values": torch.tensor([[4.0], [1.0]])})
    rows.save([0, 2], {"values": torch.tensor([[0.0], [2.0]])})
    (rows.folder / "00000003.pt.17.unfinished").write_bytes(b"half")
    assert rows.missing(6) == [3, 5] and parts.rows("y", seed=1).missing(2) == [0, 1]
    assert rows.load(3)["values"].tolist() == [[0.0], [1.0], [2.0]]
    # two that made the same rows in other batches
    rows.save([1, 2, 3], {"values": torch.tensor([[1.0], [2.0], [3.0]])})
    assert rows.load(5)["values"].tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    with pytest.raises(KeyError, match="5"):
        rows.load(6)
    remove_half_written(tmp_path, *tmp_path.iterdir())
    assert not list(tmp_path.rglob("*.unfinished")) and len(list(rows.folder.iterdir())) == 3


@pytest.mark.slow
def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "new", "wait"), pytest.raises(OSError, match=r"new is in use .*\.lock: wait"):
        lock_folder(tmp_path / "new", "wait")
    # one that was started with the lock keeps it
    with lock_folder(tmp_path / "new", "wait") as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    with pytest.raises(OSError, match="in use"):
        lock_folder(tmp_path / "new", "wait")
    child.kill()
    child.wait()
    lock_folder(tmp_path / "new", "wait").close()


def test_a_digest_sees_weights_and_configuration(make_components: Callable) -> None:
    one, other = (make_components()["transformer"] for _ in range(2))
    assert module_digest(one) == module_digest(other)
    with torch.no_grad():
        list(other.parameters())[-1].view(-1)[-1] += 1e-6
    assert module_digest(one) != module_digest(other)


def test_a_pipeline_of_another_method_is_scored_beside_ours(
    run: Callable[..., dict[str, Any]],
    pipeline_folder: Path,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    monkeypatch.setattr(diffusers, "RandomTokensPipeline", RandomTokensPipeline, raising=False)
    other = tmp_path / "other"
    RandomTokensPipeline(tiny_tokenizer).save_pretrained(other)
    found = run("beside", "--judge", "none", "--pipeline", str(pipeline_folder), str(other))["pipelines"]
    assert [entry["name"] for entry in found] == ["run", "other"]
    assert [one["nfe"] for one in found[1]["sets"]] == [1, 3]
    assert all(one["mean"]["num_nonfinite_texts"] == 0 for one in found[1]["sets"])
    with pytest.raises(ValueError, match="RandomTokensPipeline has no scheduler"):
        run("solver", "--judge", "none", "--pipeline", str(other), "--samplers", "TangentDDIMScheduler")
    with pytest.raises(ValueError, match="'other' lacks encoders"):
        run("lines", "--judge", "none", "--pipeline", str(other), "--interpolation")


def test_a_pipeline_that_generates_no_texts_is_refused(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler()
    unet = diffusers.UNet2DModel(
        8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "images")
    with pytest.raises(OSError, match="DDPMPipeline, which generates no texts"):
        run("images", "--judge", "none", "--pipeline", str(tmp_path / "images"))
