"""Training of the token-level diffusion models: each learns a text, beyond how often its words occur."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldlm_hf import FMLMScheduler, TokenDiffusionPipeline, TokenDiffusionTransformer
from ldlm_hf.baselines.candi import CANDINoiseSettings, CANDIObjective
from ldlm_hf.baselines.flow_language_model import FLMObjective
from ldlm_hf.baselines.masked import MDLMObjective
from ldlm_hf.baselines.recipes import RECIPES
from ldlm_hf.baselines.token_training import TokenDiffusionObjective
from ldlm_hf.baselines.uniform import CurriculumSettings, DuoObjective
from ldlm_hf.loading.settings_reader import load_settings
from ldlm_hf.training.flops import count_flops
from ldlm_hf.training.settings import RunSettings


K, L, WORDS = 40, 8, 7
CURRICULUM = CurriculumSettings(steps=3, gamma_min=-3.0, gamma_max=-0.5)
OBJECTIVES: dict[str, Callable[[TokenDiffusionTransformer], TokenDiffusionObjective]] = {
    "masked": MDLMObjective,
    "uniform": lambda transformer: DuoObjective(transformer, CURRICULUM),
    "candi": lambda transformer: CANDIObjective(transformer, CANDINoiseSettings()),
    "flow": FLMObjective,
}
METHODS = ("mdlm", "duo", "candi", "flm")


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


@pytest.fixture
def make(randomize: Callable[..., Any]) -> Callable[..., TokenDiffusionObjective]:
    def build(process: str, dropout: float = 0.0) -> TokenDiffusionObjective:
        torch.manual_seed(0)
        sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "condition_size": 8}
        transformer = TokenDiffusionTransformer(K, process, sample_size=L, dropout=dropout, **sizes)
        return OBJECTIVES[process](randomize(transformer))

    return build


@pytest.mark.parametrize("process", OBJECTIVES)
def test_every_parameter_is_trained(
    process: str, make: Callable[..., TokenDiffusionObjective], random_tokens: Callable[..., torch.Tensor]
) -> None:
    objective, phases = make(process), [{}, {"curriculum": True}] if process == "uniform" else [{}]
    for phase in phases:
        objective.zero_grad()
        loss = objective(random_tokens(4), [0.1, 0.4, 0.6, 0.9], generators(4), **phase).total
        assert loss.isfinite() and loss > 0
        loss.backward()
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("process", OBJECTIVES)
def test_a_row_has_its_loss_in_any_batch(
    process: str, make: Callable[..., TokenDiffusionObjective], random_tokens: Callable[..., torch.Tensor]
) -> None:
    objective, x, times = make(process), random_tokens(3), [0.2, 0.5, 0.8]
    with torch.no_grad():
        whole = objective(x, times, generators(3)).total
        rows = [objective(x[i : i + 1], times[i : i + 1], generators(1, seed=i)).total for i in range(3)]
    assert float(whole) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-4)


@pytest.mark.parametrize("process", OBJECTIVES)
def test_flops_are_those_of_its_products(process: str, make: Callable[..., TokenDiffusionObjective]) -> None:
    """6 FLOPs for each weight that a token meets, beside attention, embedding products and times."""
    objective = make(process)
    transformer = objective.transformer
    weights = (
        sum(
            layer.weight.numel()
            for block in transformer.blocks
            for layer in (
                block.attention.to_qkv,
                block.attention.to_out,
                block.feed_forward.linear_in,
                block.feed_forward.linear_out,
            )
        )
        + transformer.head.weight.numel()
    )
    found = count_flops(objective, L).per_token
    assert 6 * weights < found < 8.5 * weights + 12 * L * 16


def test_hidden_words_leak_into_no_loss(random_tokens: Callable[..., torch.Tensor], make: Callable) -> None:
    """At t = 1 all but a few words are noise, and no network could do better than the words' frequencies."""
    objective, seen = make("masked"), []
    objective.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective(random_tokens(4), [0.9999] * 4, generators(4))
    assert (seen[0] == K).double().mean() > 0.9


@pytest.fixture
def command(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """A run on a text of which each word says the next one."""
    (tmp_path / "corpus.txt").write_text("\n".join([" ".join(f"w{2 + i % WORDS}" for i in range(60))] * 40))
    sections = ("data", "optimizer", "loop", "evaluation")
    shared = [item for item in tiny_overrides if item.split(".")[0] in sections]
    backbone = next(item for item in tiny_overrides if item.startswith("model.backbone"))
    sizes = ["model.hidden_size=32", "model.num_layers=2", "model.num_attention_heads=2", "model.dropout=0.0"]
    more = ["optimizer.learning_rate=0.01", "optimizer.ema_decay=0.9", "evaluation.grid_size=20"]
    return [backbone, "model.sequence_length=8", *sizes, *shared, *more]


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_more_than_how_often_words_occur(
    method: str, run_script: Callable[..., None], command: list[str], tmp_path: Path
) -> None:
    own = {
        "duo": [
            "optimizer.learning_rate=0.005",
            "loop.max_steps=1000",
            "curriculum.steps=100",
            "curriculum.gamma_min=-3.0",
            "curriculum.gamma_max=0.5",
        ],
        # among few words, noise of the paper's range says too much of each, and the sampler begins with none of it
        "candi": ["noise.rank_min=0.3", "noise.rank_max=0.45"],
    }
    run_script("train_baseline", method, *command, "loop.max_steps=500", *own.get(method, []))
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    # the text's words are as frequent, each log 7 nats; the first word of a text alone is as hard
    assert results["held_out"]["token_loss"] < 0.75 * math.log(WORDS)
    pipe = TokenDiffusionPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    words = pipe(batch_size=64, num_inference_steps=32, generator=torch.Generator().manual_seed(0)).sequences
    follows = (words[:, 1:] - 2) == (words[:, :-1] - 2 + 1) % WORDS
    assert float(follows.double().mean()) > 0.25  # by chance 1 in 7
    card = (run / "pipeline" / "README.md").read_text()
    assert "TokenDiffusionPipeline" in card and "num_inference_steps=" in card
    assert ("prompt included" in card) == (method in ("mdlm", "candi"))


@pytest.mark.slow
def test_a_flow_is_distilled_into_a_flow_map(
    run_script: Callable[..., None], command: list[str], tmp_path: Path
) -> None:
    """A flow map comes with one step nearer to where it comes with many than the flow does."""
    run_script("train_baseline", "flm", *command, "loop.max_steps=1000")
    teacher = TokenDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    shared = [item for item in command if not item.startswith("model.")]
    student_run = [*shared, f"components={tmp_path / 'run' / 'pipeline'}", f"loop.output_dir={tmp_path / 'student'}"]
    run_script(
        "train_baseline",
        "fmlm",
        *student_run,
        "optimizer.learning_rate=0.003",
        "loop.max_steps=1500",
        "loop.batch_size=32",
    )
    student = TokenDiffusionPipeline.from_pretrained(tmp_path / "student" / "pipeline")

    def agreement(pipe: TokenDiffusionPipeline) -> float:
        """How many words of one step are those of 16 steps, from the same noise."""
        pipe.set_progress_bar_config(disable=True)
        few, many = (
            pipe(batch_size=64, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).sequences
            for steps in (1, 16)
        )
        return float((few == many).double().mean())

    student.scheduler = FMLMScheduler(vocab_size=K, gamma=0.0)
    assert agreement(student) > agreement(teacher) + 0.05


def test_what_distillation_refuses(run_script: Callable[..., None], command: list[str], tmp_path: Path) -> None:
    shared = [item for item in command if not item.startswith("model.")]
    pipeline = f"components={tmp_path / 'run' / 'pipeline'}"
    with pytest.raises(ValueError, match="name the pipeline that is distilled"):
        run_script("train_baseline", "fmlm", *shared)
    run_script("train_baseline", "mdlm", *command)
    with pytest.raises(ValueError, match="must be a pipeline of the process 'flow' that was not distilled yet"):
        run_script("train_baseline", "fmlm", *shared, pipeline, f"loop.output_dir={tmp_path / 'student'}")
    run_script("train_baseline", "flm", *command, "--overwrite_output_dir")
    run_script("train_baseline", "fmlm", *shared, pipeline, f"loop.output_dir={tmp_path / 'student'}")
    student = TokenDiffusionPipeline.from_pretrained(tmp_path / "student" / "pipeline")
    assert student.transformer.config.next_timestep_conditioning
    assert type(student.scheduler) is FMLMScheduler


def test_duo_is_distilled_in_rounds(run_script: Callable[..., None], command: list[str], tmp_path: Path) -> None:
    """The student becomes the teacher, whose state a resumed run goes on with; what is taught is learned."""
    run_script("train_baseline", "duo", *command, "curriculum.steps=2", "loop.max_steps=200")
    shared = [item for item in command if not item.startswith("model.")]
    pipeline, student = tmp_path / "run" / "pipeline", tmp_path / "student"
    more = [f"components={pipeline}", f"loop.output_dir={student}", "noise.round_steps=20", "loop.max_steps=60"]
    more += ["noise.first_length=0.2", "optimizer.learning_rate=0.003", "loop.checkpointing_steps=30"]
    run_script("train_baseline", "duo_dcd", *shared, *more)
    weights = student / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    taught = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    losses = [line["distillation_loss"] for line in taught if "distillation_loss" in line]
    assert sum(losses[15:20]) < 0.9 * sum(losses[:5])
    run_script("train_baseline", "duo_dcd", *shared, *more, "--resume_from_checkpoint", str(student / "checkpoint-30"))
    assert all(torch.equal(load_file(weights)[name], weight) for name, weight in whole.items())
    pipe = TokenDiffusionPipeline.from_pretrained(student / "pipeline")
    assert pipe.scheduler.config.final == "argmax"


def test_a_resumed_run_is_the_same_run(run_script: Callable[..., None], command: list[str], tmp_path: Path) -> None:
    command = [
        "mdlm",
        *command,
        "model.embeddings_from_backbone=true",
        "loop.checkpointing_steps=4",
        "loop.max_steps=8",
    ]
    run_script("train_baseline", *command)
    run = tmp_path / "run"
    whole = load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    run_script("train_baseline", *command, "--resume_from_checkpoint", str(run / "checkpoint-4"))
    resumed = load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("model.num_attention_heads=3", "hidden_size=32 is no even multiple of num_attention_heads=3"),
        ("evaluation.sampler=TangentDDIMScheduler", "samplers named there are of latent diffusion"),
        ("data.source_column=x", "data"),
        ("model.embeddings_from_backbone=true model.hidden_size=24", "set model.hidden_size=32"),
    ],
)
def test_what_its_command_refuses(
    run_script: Callable[..., None], command: list[str], override: str, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        run_script("train_baseline", "mdlm", *command, *override.split())


def test_settings_of_methods_are_checked(run_script: Callable[..., None], command: list[str]) -> None:
    with pytest.raises(ValueError, match=r"gamma_max=-9.0 must lie in \(-3.55, inf\)"):
        run_script("train_baseline", "duo", *command, "curriculum.gamma_max=-9.0")
    with pytest.raises(ValueError, match=r"rank_max=0.6 must lie in \[0.05, 0.5\)"):
        run_script("train_baseline", "candi", *command, "noise.rank_max=0.6")
    with pytest.raises(ValueError, match="rank_max < 0.4875"):
        run_script("train_baseline", "candi", *command, "noise.rank_max=0.49")
    with pytest.raises(ValueError, match=r"logits=-1.0 must lie in \(0, inf\)"):
        run_script("train_baseline", "flm", *command, "caps.logits=-1.0")


@pytest.mark.parametrize("method", ["autoregressive", *METHODS, "fmlm", "duo_dcd"])
def test_demos_are_of_one_text(method: str, repository: Path) -> None:
    settings = load_settings(
        RECIPES[method].settings_class, str(repository / f"training/configs/{method}_demo.yaml"), []
    )
    ldlm = load_settings(RunSettings, str(repository / "training/configs/demo.yaml"), [])
    assert settings.data == ldlm.data and settings.loop.batch_size == 32


@pytest.mark.parametrize("name", ["openwebtext_1024", "lm1b_128"])
@pytest.mark.parametrize("method", METHODS)
def test_the_papers_runs(method: str, name: str, repository: Path) -> None:
    path = str(repository / f"training/configs/token_diffusion_{name}.yaml")
    settings = load_settings(RECIPES[method].settings_class, path, [])
    ldlm = load_settings(RunSettings, str(repository / f"training/configs/{name}.yaml"), [])
    assert settings.data == ldlm.data and settings.model.sequence_length == ldlm.model.sequence_length
    assert (settings.loop.max_steps, settings.loop.batch_size) == (1_000_000, 512)
    optimizer = settings.optimizer
    assert (optimizer.learning_rate, optimizer.beta2, optimizer.weight_decay) == (3e-4, 0.999, 0)
    assert (optimizer.lr_warmup_steps, optimizer.ema_decay, optimizer.eps) == (2500, 0.9999, 1e-8)
