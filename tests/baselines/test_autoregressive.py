"""The autoregressive model: its sampler draws from the model's own distribution, and it trains and saves as others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from ldlm_hf import AutoregressivePipeline
from ldlm_hf.baselines.autoregressive import AutoregressiveObjective, draw_tokens


VOCAB_SIZE, LENGTH, START = 40, 8, 1


@pytest.fixture
def pipeline(tiny_tokenizer: Any, randomize: Callable[..., Any]) -> AutoregressivePipeline:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=LENGTH, n_embd=24, n_layer=2, n_head=2, bos_token_id=START)
    pipe = AutoregressivePipeline(randomize(GPT2LMHeadModel(config)).eval(), tiny_tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [(1.0, 1.0, [0.5, 0.25, 0.15, 0.1]), (0.5, 1.0, [0.25, 0.0625, 0.0225, 0.01]), (1.0, 0.7, [0.5, 0.25, 0, 0])],
)
def test_tokens_have_the_probabilities_of_the_model(temperature: float, top_p: float, expected: list[float]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(20_000, 4)
    drawn = draw_tokens(logits, temperature, top_p, generators(0) * len(logits))
    shares = drawn.bincount(minlength=4) / len(drawn)
    probabilities = torch.tensor(expected) / sum(expected)
    assert torch.allclose(shares, probabilities, atol=4 * (0.25 / len(drawn)) ** 0.5)
    assert (shares[probabilities == 0] == 0).all()


def test_the_likeliest_token_always_stays() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(50, 3)
    assert (draw_tokens(logits, 1.0, 1e-9, generators(0) * 50) == 0).all()
    assert (draw_tokens(logits, 0.0, 1.0, generators(0) * 50) == 0).all()


# ---------------------------------------------------------------------------------------------- writing


def test_a_text_is_written_from_what_stands_before(pipeline: AutoregressivePipeline) -> None:
    """With the cache, as the whole model reads it without one."""
    prompt = torch.tensor([[5, 6], [7, 8]])
    sequences = pipeline(prompt_ids=prompt, temperature=0.0, output_type="seq").sequences
    assert sequences.shape == (2, LENGTH) and torch.equal(sequences[:, :2], prompt)
    inputs = torch.cat([torch.full((2, 1), START), sequences[:, :-1]], dim=1)
    with torch.no_grad():
        best = pipeline.language_model(inputs).logits.argmax(-1)
    assert torch.equal(best[:, 2:], sequences[:, 2:])
    assert pipeline.num_function_evaluations == LENGTH - 2


def test_a_text_with_its_own_generator_is_the_same_in_any_batch(pipeline: AutoregressivePipeline) -> None:
    together = pipeline(batch_size=3, generator=generators(4, 5, 6), output_type="seq").sequences
    alone = pipeline(generator=generators(5), output_type="seq").sequences
    assert torch.equal(together[1:2], alone) and len(together.unique(dim=0)) == 3


def test_prompts(pipeline: AutoregressivePipeline) -> None:
    output = pipeline(["w5 w6", "w7 w8"], num_texts_per_prompt=2, max_new_tokens=3, generator=generators(0)[0])
    assert [text.split()[:2] for text in output.texts] == [["w5", "w6"]] * 2 + [["w7", "w8"]] * 2
    assert output.sequences.shape == (4, 5)
    sequences, texts = pipeline("w5", return_dict=False)
    assert texts[0].startswith("w5") and sequences.shape == (1, LENGTH)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"temperature": -1.0}, "`temperature` must be a finite number that is not negative, got -1.0"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"top_p": 0.0}, r"`top_p` must be a number in \(0, 1\], got 0.0"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer, got 0"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be a positive integer, got 2.5"),
        ({"prompt": "w5", "batch_size": 3}, "give one"),
        ({"prompt": "w5", "prompt_ids": torch.tensor([[5]])}, "give one"),
        ({"num_texts_per_prompt": 3}, "is for a `prompt`; use batch_size"),
        ({"generator": "x"}, "`generator` must be a torch.Generator"),
        ({"output_type": "latent"}, "`output_type` must be text or seq"),
        ({"prompt": " ".join(["w5"] * LENGTH)}, f"`prompt` has {LENGTH} tokens, which leaves room for 0"),
        ({"prompt": "w5", "max_new_tokens": LENGTH}, f"leaves room for {LENGTH - 1}"),
        ({"prompt": ["w5", "w5 w6"]}, "different numbers of tokens"),
        ({"batch_size": 3, "generator": generators(0, 1)}, "a list of 2 for 3 texts"),
    ],
)
def test_what_it_refuses(pipeline: AutoregressivePipeline, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pipeline(**arguments)


def test_an_empty_prompt_is_none(pipeline: AutoregressivePipeline) -> None:
    expected = pipeline(generator=generators(0)[0], output_type="seq").sequences
    assert torch.equal(pipeline("", generator=generators(0)[0], output_type="seq").sequences, expected)


def test_saving_and_loading(pipeline: AutoregressivePipeline, tmp_path: Path) -> None:
    expected = pipeline(batch_size=2, generator=generators(0, 1)).texts
    pipeline.save_pretrained(tmp_path)
    for pipeline_class in (AutoregressivePipeline, DiffusionPipeline):
        loaded = pipeline_class.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is AutoregressivePipeline and loaded.sequence_length == LENGTH
        assert loaded(batch_size=2, generator=generators(0, 1)).texts == expected


def test_no_other_model_is_loaded_in_its_place(pipeline: AutoregressivePipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for entry in (["transformers", "LlamaForCausalLM"], ["diffusers", "GPT2LMHeadModel"], ["os", "system"]):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"language_model": entry}))
        with pytest.raises(ValueError, match="is not what AutoregressivePipeline loads as its language_model"):
            AutoregressivePipeline.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------- training


def test_the_loss_is_that_of_every_token(pipeline: AutoregressivePipeline, random_tokens: Callable) -> None:
    objective = AutoregressiveObjective(pipeline.language_model, START)
    input_ids = random_tokens(4)
    with torch.no_grad():
        losses = objective(input_ids)
        logits = pipeline.language_model(torch.cat([torch.full((4, 1), START), input_ids[:, :-1]], dim=1)).logits
    expected = [F.cross_entropy(logits[:, place], input_ids[:, place]) for place in range(LENGTH)]
    assert float(losses.total) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@pytest.fixture
def command(tiny_overrides: list[str], tmp_path: Path) -> list[str]:
    """A run on a text of which each word says the next one."""
    (tmp_path / "corpus.txt").write_text("\n".join([" ".join(f"w{2 + i % 7}" for i in range(60))] * 40))
    sections = ("data", "optimizer", "loop", "evaluation")
    shared = [item for item in tiny_overrides if item.split(".")[0] in sections]
    backbone = next(item for item in tiny_overrides if item.startswith("model.backbone"))
    sizes = ["model.hidden_size=32", "model.num_layers=1", "model.num_attention_heads=2", "model.dropout=0.0"]
    return ["autoregressive", backbone, "model.sequence_length=8", *sizes, *shared, "optimizer.learning_rate=0.01"]


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_it_learns_and_a_resumed_run_is_the_same_run(
    run_script: Callable[..., None], command: list[str], tmp_path: Path
) -> None:
    """Its head is tied to the word embeddings, which a checkpoint holds once."""
    command = [*command, "model.embeddings_from_backbone=true", "loop.checkpointing_steps=30", "loop.max_steps=60"]
    run_script("train_baseline", *command)
    run = tmp_path / "run"
    whole = load_file(run / "pipeline" / "language_model" / "model.safetensors")
    losses = losses_of(run)
    assert losses[-1] < 0.5 < losses[0]
    pipe = AutoregressivePipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    words = pipe("w2 w3 w4", temperature=0.0).texts[0].split()
    assert words == [f"w{2 + i % 7}" for i in range(8)]
    card = (run / "pipeline" / "README.md").read_text()
    assert "token loss" in card and "prompt included" in card
    assert "encoder" not in card and "num_inference_steps=" not in card.split("## Results")[0]

    run_script("train_baseline", *command, "--resume_from_checkpoint", str(run / "checkpoint-30"))
    resumed = load_file(run / "pipeline" / "language_model" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_what_its_command_refuses(run_script: Callable[..., None], command: list[str]) -> None:
    with pytest.raises(SystemExit, match="name the method first, one of autoregressive"):
        run_script("train_baseline", *command[1:])
    with pytest.raises(ValueError, match=r"set model.hidden_size=32"):
        run_script("train_baseline", *command, "model.embeddings_from_backbone=true", "model.hidden_size=24")
    with pytest.raises(ValueError, match="hidden_size=32 is no multiple of num_attention_heads=3"):
        run_script("train_baseline", *command, "model.num_attention_heads=3")
