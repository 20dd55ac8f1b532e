"""Continuations and filled gaps of tiny pipelines: what is given is kept, and the numbers are the metrics' own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from figures.conditional import plot_guidance
from ldlm_hf import AutoregressivePipeline, GenerativePerplexity, GivenTokens, LDLMPipeline, Mauve
from ldlm_hf.evaluation.conditional import ConditionalScorer, Task, given_likelihood
from ldlm_hf.evaluation.options import EvaluationOptions
from ldlm_hf.evaluation.samples import SampleSet, sample_generator
from ldlm_hf.metrics import BertScore, RougeL, load_judge


LENGTH = 8
OPTIONS = {"pipeline": ["a"], "output_dir": Path("b")}


@pytest.fixture
def conditional(make_conditional_pipeline: Callable[[], LDLMPipeline], tmp_path: Path) -> Path:
    make_conditional_pipeline().save_pretrained(tmp_path / "ldlm" / "pipeline")
    return tmp_path / "ldlm" / "pipeline"


@pytest.fixture
def autoregressive(tiny_tokenizer: Any, randomize: Callable[..., Any], tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=40, n_positions=LENGTH, n_embd=24, n_layer=1, n_head=2, bos_token_id=1)
    pipeline = AutoregressivePipeline(randomize(GPT2LMHeadModel(config)).eval(), tiny_tokenizer)
    pipeline.save_pretrained(tmp_path / "ar" / "pipeline")
    return tmp_path / "ar" / "pipeline"


@pytest.fixture
def evaluate(
    run_script: Callable[..., None],
    conditional: Path,
    autoregressive: Path,
    backbone_folders: dict[str, Path],
    tiny_overrides: list[str],
    tmp_path: Path,
) -> Callable[..., dict[str, Any]]:
    """Evaluates both pipelines on 20 held-out texts into a folder of `tmp_path`; gives the results."""

    def run(*more: str, folder: str = "out", pipelines: tuple[Path, ...] = (conditional, autoregressive)) -> Any:
        command = ["--pipeline", *map(str, pipelines), "--output_dir", str(tmp_path / folder)]
        command += ["--num_samples", "20", "--seeds", "2", "--steps", "3", "--batch_size", "8"]
        command += ["--judge", str(backbone_folders["gpt2"]), "--bert_score", f"{backbone_folders['bert']}:2"]
        command += [item for item in tiny_overrides if item.startswith("data.")]
        run_script("evaluate", *command, *more)
        return json.loads((tmp_path / folder / "results.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture
def real(tiny_overrides: list[str], tiny_tokenizer: Any, tmp_path: Path) -> tuple[torch.Tensor, list[str]]:
    """The held-out sequences of the row of real text, and the texts of MAUVE's references."""
    lines = (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines()[-8:]
    tokens = torch.tensor([token for line in lines for token in [*tiny_tokenizer(line)["input_ids"], 1]])
    held_out = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    drawn = held_out[torch.linspace(0, len(held_out) - 1, 40).round().long()]
    return drawn[::2], tiny_tokenizer.batch_decode(drawn[1::2], skip_special_tokens=True)


def test_numbers_of_continuations_are_the_metrics_own(
    evaluate: Callable[..., Any],
    conditional: Path,
    backbone_folders: dict[str, Path],
    tiny_tokenizer: Any,
    real: tuple[torch.Tensor, list[str]],
    tmp_path: Path,
) -> None:
    results = evaluate("--task", "continuation", "--prompt_tokens", "3", "--guidance_scales", "1", "2")
    sequences, references = real
    ldlm, ar = results["pipelines"]
    assert [(one["guidance_scale"], one["nfe"], one["told"]) for one in ldlm["sets"]] == [(1, 3, "all"), (2, 6, "all")]
    assert [(one["guidance_scale"], one["nfe"], one["told"]) for one in ar["sets"]] == [(1, LENGTH - 3, "prefix")]
    assert results["settings"]["written"] == [3, LENGTH]

    # a set made by hand: each text alone, from its own generator
    pipeline = LDLMPipeline.from_pretrained(conditional)
    pipeline.set_progress_bar_config(disable=True)
    made = torch.cat(
        [
            pipeline(
                given_tokens=GivenTokens.of_rows([[*row[:3].tolist(), *[None] * 5]], LENGTH),
                num_inference_steps=3,
                guidance_scale=2.0,
                generator=sample_generator(1, index, pipeline.device),
            ).sequences
            for index, row in enumerate(sequences)
        ]
    )

    def texts(some: torch.Tensor) -> list[str]:
        return tiny_tokenizer.batch_decode(some, skip_special_tokens=True)

    judge = load_judge(str(backbone_folders["gpt2"]))
    scores = ldlm["sets"][1]["seeds"][1]
    for name, prompts in (("perplexity", sequences), ("perplexity_elsewhere", sequences.roll(-1, 0))):
        expected = GenerativePerplexity().compute(
            predictions=texts(made[:, 3:]), judge=judge, contexts=texts(prompts[:, :3])
        )
        assert scores[name] == pytest.approx(expected["perplexity"], rel=1e-4)
    mauve = Mauve().compute(predictions=texts(made), references=references, judge=judge)
    assert scores["mauve"] == pytest.approx(mauve["mauve"], abs=1e-6)
    pairs = {"predictions": texts(made[:, 3:]), "references": texts(sequences[:, 3:])}
    assert scores["rouge_l"] == RougeL().compute(**pairs)["rouge_l"]
    expected = BertScore().compute(**pairs, model=str(backbone_folders["bert"]), layer=2)
    assert scores["bert_score"] == pytest.approx(expected["bert_score"], abs=1e-5)
    assert scores["distinct_1"] == len(made[:, 3:].unique()) / made[:, 3:].numel()

    for one in [*ldlm["sets"], *ar["sets"]]:
        assert one["mean"]["given_kept"] == 1
    true = results["real_text"]
    assert (true["rouge_l"], true["given_kept"]) == (1, 1) and true["bert_score"] == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "out" / "guidance.png").is_file()
    samples = (tmp_path / "out" / "samples.md").read_text(encoding="utf-8")
    first = f"{texts(sequences[:1, :3])[0]} «{texts(sequences[:1, 3:])[0]}»"
    assert first in samples and "## ldlm, 3 steps, told all, v = 2" in samples
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "PPL where given" in table and "| ar | 8 | 5 | prefix | 1 |" in table


def test_gaps(evaluate: Callable[..., Any], real: tuple[torch.Tensor, list[str]], tmp_path: Path) -> None:
    """A gap is filled by a model that is told both sides, or the prefix alone, which is another text."""
    results = evaluate("--task", "infilling", "--gap_tokens", "2", "--seeds", "1", "--no_mauve")
    assert results["settings"]["written"] == [3, 5]
    ldlm, ar = results["pipelines"]
    assert [one["told"] for one in ldlm["sets"]] == ["all", "prefix"]
    assert [one["told"] for one in ar["sets"]] == ["prefix"]
    both, prefix = (one["mean"] for one in ldlm["sets"])
    assert both["perplexity"] != prefix["perplexity"]
    assert both["given_kept"] == prefix["given_kept"] == ar["sets"][0]["mean"]["given_kept"] == 1
    assert both["mauve"] is None and results["real_text"]["mauve"] is None


def test_what_is_there_is_not_made_again(evaluate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("--task", "continuation", "--no_mauve")
    first = evaluate(*command)
    made: list[int] = []
    make = SampleSet.make

    def watched(self: SampleSet, pipeline: Any, indices: list[int], batch_size: int) -> None:
        made.extend(indices)
        make(self, pipeline, indices, batch_size)

    monkeypatch.setattr(SampleSet, "make", watched)
    assert evaluate(*command) == first and made == []
    # other guidance is another set, and the sets of before are still there
    evaluate(*command, "--guidance_scales", "1", "1.5")
    assert len(made) == 2 * 20


def test_texts_are_scored_where_they_stand(tiny_tokenizer: Any, backbone_folders: dict[str, Path]) -> None:
    """What follows a gap is scored with it, and what stands before it is not."""
    judge = load_judge(str(backbone_folders["gpt2"]))
    task = Task("infilling", 2, 4, 6)
    sequences = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
    scorer = ConditionalScorer(task, sequences, tiny_tokenizer, judge, 2, None, None)
    with torch.no_grad():
        losses = judge.model(sequences).logits.log_softmax(-1)[:, :-1].gather(2, sequences[:, 1:, None])[..., 0]
    expected = float((-losses[:, 1:].mean()).exp())
    assert scorer.perplexity(sequences) == pytest.approx(expected, rel=1e-5)
    elsewhere = task.put_in(sequences.roll(-1, 0), sequences)
    assert elsewhere.tolist() == [[11, 12, 7, 8, 15, 16], [5, 6, 13, 14, 9, 10]]
    assert scorer.score(sequences)["perplexity_elsewhere"] == pytest.approx(scorer.perplexity(elsewhere), rel=1e-6)
    # a model that changes what is given is found out
    changed = sequences.clone()
    changed[0, 0] = 20
    assert scorer.score(changed)["given_kept"] == 7 / 8


def test_blank_continuations_have_no_perplexity(tiny_tokenizer: Any, backbone_folders: dict[str, Path]) -> None:
    judge = load_judge(str(backbone_folders["gpt2"]))
    sequences = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    scorer = ConditionalScorer(Task.continuation(4), sequences, tiny_tokenizer, judge, 2, None, None)
    sequences = sequences.index_fill(1, torch.tensor([2, 3]), tiny_tokenizer.eos_token_id)
    scores = scorer.score(sequences)
    assert (scores["perplexity"], scores["perplexity_elsewhere"], scores["rouge_l"]) == (None, None, 0)


def test_a_pipeline_that_takes_no_prompts_is_steered(
    evaluate: Callable[..., Any],
    make_pipeline: Callable[..., LDLMPipeline],
    random_tokens: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> None:
    """By the likelihood of what is given, which rises."""
    pipeline, real = make_pipeline(), random_tokens(4)
    given = torch.arange(LENGTH) < 3
    reward = given_likelihood(pipeline, real, given)
    latents = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_likelihood = pipeline.token_decoder(pipeline.latent_decoder(latents).hidden_states).logits.log_softmax(-1)
        expected = log_likelihood.gather(2, real[..., None])[:, :3, 0].sum(1)
        torch.testing.assert_close(reward(latents), expected)
    free, steered = (
        pipeline.steer(
            latent_reward=reward,
            scale=scale,
            batch_size=4,
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(0),
        ).rewards
        for scale in (0, 30)
    )
    assert (steered > free).all()

    pipeline.save_pretrained(tmp_path / "whole" / "pipeline")
    scales = ["--steering_scales", "0", "30"]
    results = evaluate("--task", "continuation", *scales, "--no_mauve", pipelines=(tmp_path / "whole" / "pipeline",))
    first, second = results["pipelines"][0]["sets"]
    assert [(one["told"], one["guidance_scale"], one["nfe"]) for one in (first, second)] == [
        ("steering", 0, 3),
        ("steering", 30, 3),
    ]
    # what is scored stands around the real prompts in any case
    assert first["mean"]["given_kept"] < 0.5 and first["mean"]["perplexity"] != second["mean"]["perplexity"]


@pytest.fixture
def pairs(tiny_tokenizer: Any, tmp_path: Path) -> list[str]:
    """Settings of a corpus of questions of three words and answers of up to four."""
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randint(2, 39)}" for _ in range(count))

    rows = [{"question": words(3), "answer": words(generator.randint(1, 4))} for _ in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    columns = ["data.source_column=question", "data.target_column=answer"]
    return [*columns, "data.source_length=3", "data.target_length=5", f"data.source={tmp_path / 'pairs.jsonl'}"]


def test_targets_of_pairs_are_written_and_end(
    evaluate: Callable[..., Any], conditional: Path, pairs: list[str], tmp_path: Path
) -> None:
    components = LDLMPipeline.from_pretrained(conditional).components
    pipeline = LDLMPipeline(**components, ends_texts=True, source_length=3)
    pipeline.set_progress_bar_config(disable=True)
    # it ends texts often enough
    pipeline.token_decoder.head.weight.data[1] *= 3
    folder = tmp_path / "translator" / "pipeline"
    pipeline.save_pretrained(folder)
    command = ["--task", "continuation", "--seeds", "1", "--no_mauve", *pairs, "data.holdout_documents=30"]
    results = evaluate(*command, pipelines=(folder,))
    assert results["settings"]["written"] == [3, LENGTH]
    files = sorted((tmp_path / "out" / "parts").glob("conditional-*/*.pt"))
    sequences = torch.cat([torch.load(file, weights_only=True)["sequences"] for file in files]).long()
    ends = sequences[:, 3:] == pipeline.fill_token_id
    assert ends.any(1).float().mean() > 0 and not (ends[:, :-1] & ~ends[:, 1:]).any()
    # as its users see them
    sources = pipeline.tokenizer.batch_decode(sequences[:, :3])
    texts = [
        pipeline(text, num_inference_steps=3, generator=sample_generator(0, index, pipeline.device)).texts[0]
        for index, text in enumerate(sources)
    ]
    assert pipeline.tokenizer.batch_decode(sequences[:, 3:], skip_special_tokens=True) == texts

    with pytest.raises(ValueError, match="data.source_length=None, but the pipeline 'translator' has source_length=3"):
        evaluate("--task", "continuation", pipelines=(folder,), folder="other")
    with pytest.raises(ValueError, match="of pairs, whose sources are 3 tokens here"):
        evaluate(*command, "--prompt_tokens", "2", pipelines=(folder,), folder="other")


def test_the_picture_has_a_line_a_way(evaluate: Callable[..., Any]) -> None:
    results = evaluate("--task", "continuation", "--guidance_scales", "1", "2", "3", "--seeds", "2")
    axes = plot_guidance(results).axes[0]
    drawn = [line for container in axes.containers for line in [container.lines[0]]]
    assert [list(line.get_xdata()) for line in drawn] == [[1, 2, 3]]
    sets = results["pipelines"][0]["sets"]
    assert list(drawn[0].get_ydata()) == [one["mean"]["perplexity"] for one in sets]
    level = [line for line in axes.lines if list(line.get_ydata()) == [results["real_text"]["perplexity"]] * 2]
    assert len(level) == 1
    # blank texts, in one of the sets or in the only one
    sets[1]["mean"]["perplexity"] = None
    results["pipelines"][1]["sets"][0]["mean"]["perplexity"] = None
    assert math.isnan(plot_guidance(results).axes[0].containers[0].lines[0].get_ydata()[1])


def test_a_run_ends_with_texts_that_were_given_in_part(
    run_script: Callable[..., None], tiny_overrides: list[str], backbone_folders: dict[str, Path], tmp_path: Path
) -> None:
    shares = ["conditioning.prefix_share=0.25", "conditioning.gaps_share=0.25"]
    judge = ["evaluation.sampler=own:guidance_scale=2", f"evaluation.judge={backbone_folders['gpt2']}"]
    run_script("train_joint", *tiny_overrides, *shares, *judge)
    pipeline = LDLMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.config.guidance_scale == 2
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    continued, filled = results["given_in_part"]
    assert (continued["task"], continued["written"], filled["task"], filled["written"]) == (
        "continuation",
        [4, 8],
        "infilling",
        [3, 5],
    )
    before, written, after = filled["samples"][0]
    assert (len(before.split()), len(after.split())) == (3, 3)
    # by the guidance that is the pipeline's own
    pipeline.set_progress_bar_config(disable=True)
    generator = sample_generator(0, 0, pipeline.device)
    infilled = pipeline.infill(f"{before} ___ {after}", gap_tokens=2, num_inference_steps=3, generator=generator)
    assert infilled.texts == [" ".join(filter(None, (before, written, after)))]
    assert pipeline.num_function_evaluations == 6
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "Gaps filled in held-out texts" in card and f"{before} «{written}» {after}" in card
    perplexity = continued["perplexities"]["perplexity_elsewhere"]
    assert f"| continued | 4 | 4 | {continued['perplexities']['perplexity']:,.1f} | {perplexity:,.1f} |" in card

    with pytest.raises(ValueError, match="guidance_scale is the weight of prompts, which this run does not train"):
        run_script("train_joint", *tiny_overrides, *judge)


def test_documents_that_end_before_the_prompt_are_left_out(evaluate: Callable[..., Any], tmp_path: Path) -> None:
    corpus = tmp_path / "documents.txt"
    words = random.Random(0)
    lengths = [2 + index % 6 for index in range(120)]
    corpus.write_text("".join(" ".join(f"w{words.randint(5, 30)}" for _ in range(n)) + "\n" for n in lengths))
    own = [f"data.source={corpus}", "data.documents=separate", "data.holdout_documents=60", "--no_mauve"]
    results = evaluate("--task", "continuation", *own)
    # of 20 spread evenly over the last 60
    expected = sum(lengths[60:][round(place)] > 4 for place in torch.linspace(0, 59, 20).tolist())
    assert 0 < expected < 20 and results["settings"]["num_texts"] == expected
    assert f"{expected} held-out texts" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="all of the 20 held-out documents end before token 7"):
        evaluate("--task", "continuation", "--prompt_tokens", "7", *own, folder="other")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "translation"}, "--task 'translation' is unknown"),
        ({"prompt_tokens": 3}, "--prompt_tokens goes with --task continuation, not unconditional"),
        ({"task": "infilling", "prompt_tokens": 3}, "not infilling"),
        ({"task": "continuation", "gap_tokens": 3}, "--gap_tokens goes with --task infilling, not continuation"),
        ({"guidance_scales": (2.0,)}, "--guidance_scales goes with --task continuation or infilling"),
        ({"task": "continuation", "guidance_scales": (-1.0,)}, "weights are at least 0"),
        ({"task": "continuation", "guidance_scales": (1.0, 1.0)}, "each once"),
        ({"task": "infilling", "steering_scales": (3.0, 3.0)}, "each once"),
        ({"task": "continuation", "controls": True}, "--controls goes with --task unconditional"),
    ],
)
def test_options_of_another_task(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        EvaluationOptions(**OPTIONS, **options)


def test_what_does_not_fit_is_refused(
    evaluate: Callable[..., Any], make_pipeline: Callable[..., LDLMPipeline], conditional: Path, tmp_path: Path
) -> None:
    options = EvaluationOptions(**OPTIONS, task="continuation", prompt_tokens=8)
    with pytest.raises(ValueError, match="--prompt_tokens 8 leaves nothing to write of the models' 8 tokens"):
        Task.of(options, 8)
    with pytest.raises(ValueError, match="--gap_tokens 7: a gap has tokens on both sides"):
        Task.of(EvaluationOptions(**OPTIONS, task="infilling", gap_tokens=7), 8)
    make_pipeline().save_pretrained(tmp_path / "whole" / "pipeline")
    with pytest.raises(ValueError, match="the pipeline 'whole' takes no prompts. Train it further"):
        evaluate("--task", "continuation", pipelines=(tmp_path / "whole" / "pipeline",))
    LDLMPipeline.from_pretrained(conditional, token_encoder=None).save_pretrained(tmp_path / "small" / "pipeline")
    with pytest.raises(ValueError, match="'small' takes prompts, but lacks token_encoder"):
        evaluate("--task", "continuation", pipelines=(tmp_path / "small" / "pipeline",))
    with pytest.raises(ValueError, match="is no MODEL:LAYER"):
        evaluate("--task", "continuation", "--bert_score", "roberta-large")
