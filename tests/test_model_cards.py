"""The cards that the repository holds, and the results that training writes for a card."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from ldlm_hf import (
    GenerativePerplexity,
    LDLMPipeline,
    LDLMTransformer1DModel,
    NGramDiversity,
    TangentDDIMScheduler,
    TangentFlowMapScheduler,
    TokenEntropy,
)
from ldlm_hf.evaluation.provenance import source, without_path
from ldlm_hf.evaluation.samples import sample_generator
from ldlm_hf.hub.model_card import MIN_MAUVE_TEXTS
from ldlm_hf.hub.run_files import read_run
from ldlm_hf.loading.settings_reader import to_yaml
from ldlm_hf.metrics import load_judge
from ldlm_hf.training.finish import finish_run
from ldlm_hf.training.settings import DataSettings, EvaluationSettings, LoopSettings, ModelSettings, RunSettings
from write_code import write_code


REPOSITORY = Path(__file__).parents[1]
CARDS = REPOSITORY / "model_cards"
CONFIGS = REPOSITORY / "training" / "configs"
NAMES = sorted(file.parent.name for file in CARDS.glob("*/README.md"))


def load_card(name: str) -> ModelCard:
    return ModelCard.load(CARDS / name / "README.md")


@pytest.mark.parametrize("name", NAMES)
def test_card_is_valid_and_belongs_to_a_configuration(name: str) -> None:
    assert (CONFIGS / f"{name}.yaml").is_file()
    card = load_card(name)
    assert card.data.pipeline_tag == "text-generation"
    assert str(ModelCard(str(card))) == str(card)
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text)
    assert sorted(pictures) == sorted(file.name for file in (CARDS / name).glob("*.png"))
    # a model was either trained, and there are results, or the card says that it was not
    assert (card.data.eval_results is None) == ("has been trained.**" in card.text) == (not pictures)
    assert not re.search(r"[\s\"'`(](/|~/|[A-Z]:\\)\w", card.text), "a path of the machine"
    scored = re.search(r"^\| samples \| ([\d,]+) \|", card.text, re.MULTILINE)
    if scored is not None and int(scored[1].replace(",", "")) < MIN_MAUVE_TEXTS:
        assert "mauve" not in {result.metric_type for result in card.data.eval_results}
        assert "| MAUVE |" not in card.text and "MAUVE is left out: " in card.text


def test_cards_of_untrained_models_are_those_of_their_configurations(
    tmp_path: Path, run_script: Callable[..., None]
) -> None:
    untrained = [name for name in NAMES if load_card(name).data.eval_results is None]
    assert untrained
    run_script("model_card", *(str(CONFIGS / f"{name}.yaml") for name in untrained), "--output_dir", str(tmp_path))
    command = "python training/model_card.py " + " ".join(f"training/configs/{name}.yaml" for name in untrained)
    for name in untrained:
        written = (CARDS / name / "README.md").read_text(encoding="utf-8")
        assert (tmp_path / name / "README.md").read_text(encoding="utf-8") == written, f"run: {command}"


@pytest.mark.parametrize("name", ["ldlm-demo", "ldlm-demo-flow-map"])
def test_saved_models_carry_the_code_that_the_package_generates(name: str, tmp_path: Path) -> None:
    def files(folder: Path, kind: str) -> dict[Path, str]:
        return {file.relative_to(folder): file.read_text(encoding="utf-8") for file in folder.rglob(f"*.{kind}")}

    ignored = shutil.ignore_patterns("*.py", "*.safetensors", "few-steps")
    shutil.copytree(CARDS / name, tmp_path / name, ignore=ignored)
    write_code(tmp_path / name)
    found = files(CARDS / name, "py")
    assert found == files(tmp_path / name, "py"), f"run: python training/write_code.py model_cards/{name}"
    assert {file.parent.name for file in found} >= {"transformer", "scheduler"}
    for file, text in files(tmp_path / name, "json").items():
        assert (CARDS / name / file).read_text(encoding="utf-8") == text


WITHOUT_IMPORT = """
import sys
from diffusers import DiffusionPipeline

try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("loaded by nobody's code")
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "ldlm_hf" not in sys.modules
print(len(pipe(batch_size=2, num_inference_steps=2, output_type="seq").sequences))
"""


@pytest.mark.slow
def test_the_trained_model_loads_where_the_package_is_not_imported(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_IMPORT, str(CARDS / "ldlm-demo")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2"


@pytest.mark.slow
def test_the_readme_samples_without_a_warning(tmp_path: Path) -> None:
    """Its own lines, as they stand there; what is warned of by a log counts too."""
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Sample")[1].split("### From the Hub")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(snippets) == 2
    command = [sys.executable, "-W", "error", "-c", "\n".join(snippets)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert not re.search("deprecat|warning|ignored", done.stderr, re.IGNORECASE), done.stderr


def test_the_trained_model_and_its_student_sample_from_a_checkout() -> None:
    files = list((CARDS / "ldlm-demo").rglob("*.safetensors"))
    assert 0 < sum(file.stat().st_size for file in files) < 40e6
    pipe = LDLMPipeline.from_pretrained(CARDS / "ldlm-demo", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def entropy(num_steps: int) -> float:
        output = pipe(batch_size=8, num_inference_steps=num_steps, generator=torch.Generator().manual_seed(0))
        assert all(text.strip() for text in output.texts)
        return TokenEntropy(keep_in_memory=True).compute(predictions=output.sequences.tolist())["entropy"]

    # real text has 3.2 nats
    assert type(pipe.scheduler) is TangentDDIMScheduler
    assert 2.8 < entropy(16) < 3.3
    student = CARDS / "ldlm-demo-flow-map"
    pipe = LDLMPipeline.from_pretrained(
        CARDS / "ldlm-demo",
        transformer=LDLMTransformer1DModel.from_pretrained(student, subfolder="transformer"),
        scheduler=TangentFlowMapScheduler.from_pretrained(student, subfolder="scheduler"),
        dtype=torch.float32,
    )
    for steps in (1, 4):
        assert 2.8 < entropy(steps) < 3.3
        assert pipe.num_function_evaluations == steps


@pytest.fixture
def judge_folder(backbone_folders: dict[str, Path], tiny_tokenizer: Any) -> Path:
    tiny_tokenizer.save_pretrained(backbone_folders["gpt2"])
    return backbone_folders["gpt2"]


@pytest.fixture
def settings(judge_folder: Path, tmp_path: Path) -> RunSettings:
    """Settings of a run with a judge, all of its files at places of this machine."""
    (tmp_path / "corpus.txt").write_text("w2 w3", encoding="utf-8")
    run = RunSettings(
        model=ModelSettings(backbone=str(judge_folder), sequence_length=8),
        data=DataSettings(source=str(tmp_path / "corpus.txt"), cache_dir=str(tmp_path / "cache")),
        loop=LoopSettings(output_dir=str(tmp_path / "run"), max_steps=4, batch_size=2, mixed_precision="no", seed=3),
        evaluation=EvaluationSettings(judge=str(judge_folder), num_samples=20, num_inference_steps=2, batch_size=16),
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.yaml").write_text(to_yaml(run), encoding="utf-8")
    record = {"step": 4, "diffusion_loss": 0.5, "tokens": 64, "skipped_steps": 0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return run


def test_results_hold_every_text_with_scores_of_its_own(
    make_pipeline: Callable[..., LDLMPipeline],
    random_tokens: Callable[..., torch.Tensor],
    settings: RunSettings,
    judge_folder: Path,
    tmp_path: Path,
) -> None:
    pipeline = make_pipeline()
    held_out = random_tokens(40, seed=1)
    finish_run(
        pipeline,
        [{"input_ids": row} for row in held_out],
        settings,
        {"diffusion_loss": 0.5, "diffusion_loss/t=0.50": 0.4},
        seconds=2.0,
    )
    run = read_run(tmp_path / "run")
    results = run.results

    # the metrics' own answers, text by text
    torch.manual_seed(0)
    output = [
        pipeline(num_inference_steps=2, generator=sample_generator(3, index, torch.device("cpu")))
        for index in range(20)
    ]
    texts = [text for one in output for text in one.texts]
    sequences = torch.cat([one.sequences for one in output])
    judge = load_judge(str(judge_folder))
    assert [sample.text for sample in results.samples] == texts
    for sample, ids in zip(results.samples, sequences.tolist(), strict=True):
        assert sample.entropy == TokenEntropy().compute(predictions=[ids])["entropy"]
        if sample.perplexity is not None:
            alone = GenerativePerplexity().compute(predictions=[sample.text], judge=judge)["perplexity"]
            assert sample.perplexity == pytest.approx(alone, rel=1e-4)

    assert results.sample_scores.num_texts == results.real_scores.num_texts == 20
    assert results.sample_scores.values["diversity"] == NGramDiversity().compute(predictions=sequences)["diversity"]
    assert results.real_scores.values["diversity"] == NGramDiversity().compute(predictions=held_out[::2])["diversity"]
    real_texts = pipeline.tokenizer.batch_decode(held_out[::2])
    real_perplexity = GenerativePerplexity().compute(predictions=real_texts, judge=judge)["perplexity"]
    assert results.real_scores.values["generative_perplexity"] == pytest.approx(real_perplexity, rel=1e-4)
    # 40 held-out texts: 20 in the table, 20 others as the references of MAUVE
    for scores in (results.sample_scores, results.real_scores):
        assert 0 <= scores.values["mauve"] <= 1 + 1e-9
    assert results.mauve["num_texts"] == 20
    assert results.held_out == {"diffusion_loss": 0.5}
    assert results.parameters["transformer"] == sum(weight.numel() for weight in pipeline.transformer.parameters())

    card = ModelCard.load(tmp_path / "run" / "pipeline" / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {
        "entropy",
        "diversity",
        "repetition",
        "perplexity",
    }
    assert "MAUVE is left out: it was measured on 20 texts" in card.text
    assert "4 steps of 2 sequences of 8 tokens (64 tokens), seed 3" in card.text
    assert (tmp_path / "run" / "pipeline" / "training_curves.png").is_file()


def test_no_path_of_the_machine_gets_into_results_or_card(
    make_pipeline: Callable[..., LDLMPipeline],
    random_tokens: Callable[..., torch.Tensor],
    settings: RunSettings,
    judge_folder: Path,
    tmp_path: Path,
) -> None:
    finish_run(make_pipeline(), [{"input_ids": row} for row in random_tokens(25, seed=1)], settings, {}, seconds=2.0)
    for file in (tmp_path / "run" / "results.json", tmp_path / "run" / "pipeline" / "README.md"):
        text = file.read_text(encoding="utf-8")
        assert str(tmp_path) not in text and str(judge_folder.parent) not in text
        assert judge_folder.name in text and "corpus.txt" in text
        assert "output_dir" not in text and "cache_dir" not in text
    card = ModelCard.load(tmp_path / "run" / "pipeline" / "README.md")
    assert card.data.base_model is None and card.data.datasets is None
    # 25 held-out texts are too few for two sets of 20
    assert "Not measured: MAUVE." in card.text


def test_where_models_and_texts_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "local").mkdir(parents=True)
    assert source("owner/name").is_hub_id and source("gpt2").is_hub_id
    assert source("owner/name").name == "owner/name"
    for name in ("owner/local", str(tmp_path / "owner" / "local"), "./owner/local"):
        assert not source(name).is_hub_id and source(name).name == "local"
    assert not source("package:some_package/model").is_hub_id
    assert source("package:some_package/model").name == "package:some_package/model"
    assert (
        without_path(str(tmp_path / "x")) == "x"
        and without_path("~/x") == "x"
        and without_path("owner/local") == "local"
    )
    assert without_path("refs/convert/parquet") == "refs/convert/parquet" and without_path(3) == 3
