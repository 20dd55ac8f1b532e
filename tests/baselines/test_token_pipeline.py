"""The pipeline of token-level diffusion: each method's, called, given texts in part, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from ldlm_hf import (
    CANDIScheduler,
    DuoScheduler,
    FLMScheduler,
    FMLMScheduler,
    GivenTokens,
    MDLMScheduler,
    PsiScheduler,
    ReMDMScheduler,
    TokenDiffusionPipeline,
    TokenDiffusionTransformer,
)


K, L = 40, 8
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "MDLM": MDLMScheduler,
    "ReMDM": ReMDMScheduler,
    "Duo": DuoScheduler,
    "psi": PsiScheduler,
    "CANDI": lambda: CANDIScheduler(vocab_size=K),
    "FLM": lambda: FLMScheduler(vocab_size=K),
    "FMLM": lambda: FMLMScheduler(vocab_size=K),
}
TAKES_PROMPTS = ("MDLM", "ReMDM", "CANDI")


@pytest.fixture
def make(make_token_pipeline: Callable[[Any], TokenDiffusionPipeline]) -> Callable[..., TokenDiffusionPipeline]:
    return lambda method="MDLM": make_token_pipeline(SCHEDULERS[method]())


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("method", SCHEDULERS)
def test_each_method_writes_texts(method: str, make: Callable[..., TokenDiffusionPipeline]) -> None:
    pipe = make(method)
    output = pipe(batch_size=3, num_inference_steps=5, generator=generators(4, 5, 6))
    assert output.sequences.shape == (3, L) and len(output.texts) == 3
    assert ((output.sequences >= 0) & (output.sequences < K)).all()
    assert len(output.sequences.unique(dim=0)) == 3
    extra = method in ("MDLM", "ReMDM", "Duo", "psi")
    assert pipe.num_function_evaluations == pipe.num_timesteps == 5 + extra
    alone = pipe(num_inference_steps=5, generator=generators(5), output_type="seq")
    assert torch.equal(alone.sequences, output.sequences[1:2]) and alone.texts is None


@pytest.mark.parametrize("method", SCHEDULERS)
def test_saving_and_loading(method: str, make: Callable[..., TokenDiffusionPipeline], tmp_path: Path) -> None:
    pipe = make(method)
    expected = pipe(batch_size=2, num_inference_steps=4, generator=generators(0, 1)).texts
    pipe.save_pretrained(tmp_path)
    for pipeline_class in (TokenDiffusionPipeline, DiffusionPipeline):
        loaded = pipeline_class.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is TokenDiffusionPipeline and type(loaded.scheduler) is type(pipe.scheduler)
        assert loaded(batch_size=2, num_inference_steps=4, generator=generators(0, 1)).texts == expected


SAMPLE = """
import json, sys, torch
from diffusers import DiffusionPipeline

texts = {}
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    texts[folder] = pipe(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).texts
print(json.dumps(texts))
"""


@pytest.mark.slow
def test_a_repository_runs_without_the_package(
    make: Callable[..., TokenDiffusionPipeline], run_python: Callable[..., Any], tmp_path: Path
) -> None:
    expected = {}
    for method in SCHEDULERS:
        pipe, folder = make(method), tmp_path / method
        pipe.save_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        expected[str(folder)] = pipe(batch_size=2, num_inference_steps=4, generator=generator).texts
    assert run_python(SAMPLE, *expected, installed=False) == expected


# ---------------------------------------------------------------------------------------------- given in part


@pytest.mark.parametrize("method", TAKES_PROMPTS)
def test_prompts_and_gaps(method: str, make: Callable[..., TokenDiffusionPipeline]) -> None:
    pipe = make(method)
    assert pipe.takes_prompts
    output = pipe(["w5 w6", "w7 w8 w9"], num_texts_per_prompt=2, num_inference_steps=4, generator=generators(0)[0])
    assert [text.split()[:2] for text in output.texts] == [["w5", "w6"]] * 2 + [["w7", "w8"]] * 2
    assert output.sequences.shape == (4, L)
    shorter = pipe("w5", suffix="w6 w7", max_new_tokens=2, num_inference_steps=4).sequences
    assert shorter.shape == (1, 5) and shorter[0, 0] == 5 and shorter[0, 3:].tolist() == [6, 7]
    filled = pipe.infill("w4 ___ w9", gap_tokens=2, num_inference_steps=4).sequences
    assert filled.shape == (1, 4) and filled[0, 0] == 4 and filled[0, 3] == 9
    rows = GivenTokens(torch.full((1, L), 9), torch.arange(L)[None] % 2 == 0, [L])
    given = pipe(given_tokens=rows, num_inference_steps=4, output_type="seq").sequences
    assert (given[:, ::2] == 9).all()


def test_what_is_written_depends_on_what_is_given(make: Callable[..., TokenDiffusionPipeline]) -> None:
    """A given word is read as it is, from the first step on."""
    pipe = make()
    first, second = (pipe(word, num_inference_steps=1, generator=generators(0)).sequences for word in ("w5", "w30"))
    assert not torch.equal(first[:, 1:], second[:, 1:])


def test_others_take_no_prompts(make: Callable[..., TokenDiffusionPipeline]) -> None:
    for method in SCHEDULERS.keys() - set(TAKES_PROMPTS):
        pipe = make(method)
        assert not pipe.takes_prompts
        with pytest.raises(ValueError, match="writes whole texts, and neither continues prompts nor fills gaps"):
            pipe("w5", num_inference_steps=2)


# ---------------------------------------------------------------------------------------------- steps


def test_predictions_are_used_again_where_no_word_has_changed(make: Callable[..., TokenDiffusionPipeline]) -> None:
    pipe = make()
    plain = pipe(num_inference_steps=64, generator=generators(0)).sequences
    assert pipe.num_function_evaluations == 65
    assert torch.equal(pipe(num_inference_steps=64, generator=generators(0), reuse_predictions=True).sequences, plain)
    assert pipe.num_function_evaluations <= L + 1


def test_callbacks(make: Callable[..., TokenDiffusionPipeline]) -> None:
    pipe, seen = make(), []

    def watch(pipe: TokenDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict:
        seen.append((step, float(timestep), sorted(tensors)))
        pipe._interrupt = step == 2
        return {"sample": torch.full_like(tensors["sample"], 7)} if step == 2 else {}

    output = pipe(
        num_inference_steps=9,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["sample", "logits"],
    )
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1:] == (1.0, ["logits", "sample"])
    assert (output.sequences == 7).all() and pipe.interrupt and pipe.num_function_evaluations == 3

    def stop(pipe: TokenDiffusionPipeline, *step: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    # masks that are left are no words
    assert len(pipe(num_inference_steps=9, callback_on_step_end=stop).texts[0].split()) < L


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive integer, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"output_type": "latent"}, "`output_type` must be text, seq or pt"),
        ({"prompt": " ".join(["w5"] * L)}, f"`prompt` has {L} tokens, which leaves no room"),
        ({"prompt": ["w5"] * 3, "suffix": ["w6"] * 2}, "`prompt` has 3 texts and `suffix` 2"),
        ({"batch_size": 3, "generator": generators(0, 1)}, "a list of 2 for 3 texts"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, r"found \['latents'\]"),
    ],
)
def test_what_it_refuses(make: Callable[..., TokenDiffusionPipeline], arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()(**arguments)


def test_components_that_do_not_fit(make: Callable[..., TokenDiffusionPipeline]) -> None:
    pipe = make("Duo")
    pipe.scheduler = MDLMScheduler()
    with pytest.raises(ValueError, match="MDLMScheduler is for other models: .* the process 'uniform'"):
        pipe()
    with pytest.raises(ValueError, match="`reuse_predictions` is for masked models"):
        make("Duo")(reuse_predictions=True)
    pipe = make("FLM")
    pipe.scheduler = FMLMScheduler(vocab_size=K)
    with pytest.raises(ValueError, match="which this transformer is not"):
        pipe()
    pipe.scheduler = FLMScheduler(vocab_size=K + 1)
    with pytest.raises(ValueError, match=f"vocab_size={K + 1} and the transformer {K}"):
        pipe()
    small = TokenDiffusionTransformer(30, num_layers=1, num_attention_heads=1, attention_head_dim=2, sample_size=4)
    with pytest.raises(ValueError, match=f"The tokenizer has {K} tokens, and the transformer vocab_size=30"):
        TokenDiffusionPipeline(small, MDLMScheduler(), pipe.tokenizer)


def test_no_other_class_is_loaded(make: Callable[..., TokenDiffusionPipeline], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for entry in (["diffusers", "DDIMScheduler"], ["ldlm_hf", "TangentDDIMScheduler"]):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": entry}))
        with pytest.raises(ValueError, match="is not what TokenDiffusionPipeline loads as its scheduler"):
            TokenDiffusionPipeline.from_pretrained(tmp_path)
