"""Texts around what is given of them: prompts, endings, gaps, long texts and edits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ldlm_hf import GivenTokens, LDLMPipeline, TangentDDIMScheduler
from ldlm_hf.models.conditions import Conditions
from ldlm_hf.models.guidance import guide
from ldlm_hf.pipelines.prompts import tokenize, tokenize_suffix, whole_characters
from ldlm_hf.pipelines.sampling import Sampling
from ldlm_hf.schedulers.tangent import alpha_sigma


LENGTH, STEPS = 8, 4


@pytest.fixture
def pipe(make_conditional_pipeline: Callable[[], LDLMPipeline]) -> LDLMPipeline:
    return make_conditional_pipeline()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(pipe: LDLMPipeline, text: str) -> list[int]:
    return pipe.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prompt", ["w5", "w5 w6 w7", "w2 w3 w4 w5 w6 w7 w8"])
def test_a_text_begins_with_its_prompt(pipe: LDLMPipeline, prompt: str) -> None:
    output = pipe(prompt, num_texts_per_prompt=3, num_inference_steps=STEPS, generator=seeded())
    assert output.sequences.shape == (3, LENGTH) and len(output.texts) == 3
    given = ids(pipe, prompt)
    assert output.sequences[:, : len(given)].tolist() == [given] * 3
    assert all(text.startswith(prompt) for text in output.texts)


def test_prompts_of_a_list_and_an_ending(pipe: LDLMPipeline) -> None:
    prompts = ["w5", "w6 w7", ""]
    output = pipe(prompts, suffix="w9 w10", num_inference_steps=STEPS)
    assert output.sequences.shape == (3, LENGTH)
    for row, prompt in zip(output.sequences.tolist(), prompts, strict=True):
        given = ids(pipe, prompt)
        assert row[: len(given)] == given and row[-2:] == ids(pipe, "w9 w10")
    assert pipe(suffix=["w9", "w10"], num_inference_steps=1).sequences[:, -1].tolist() == ids(pipe, "w9 w10")
    between = pipe("w5", suffix="w9", max_new_tokens=3, num_inference_steps=1).sequences
    assert between.shape == (1, 5) and between[0, [0, -1]].tolist() == ids(pipe, "w5 w9")


def test_the_denoiser_is_told_the_latents_of_the_prompt_alone(pipe: LDLMPipeline) -> None:
    told: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, __, keywords: told.append(keywords), with_kwargs=True)
    pipe("w5 w6", num_inference_steps=2)
    sequences = torch.tensor([[*ids(pipe, "w5 w6"), 7, 7, 7, 7, 7, 7]])  # whatever stands behind
    given = torch.arange(LENGTH)[None] < 2
    latents = pipe.encode_sequences(sequences, Conditions(given).attention_mask())
    for keywords in told:
        assert torch.equal(keywords["given"], given)
        assert torch.equal(keywords["given_latents"], latents * given[..., None])


def test_nothing_given_is_a_text_without_a_prompt(pipe: LDLMPipeline) -> None:
    told: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, __, keywords: told.append(keywords), with_kwargs=True)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    expected = pipe(num_inference_steps=STEPS, generator=seeded())
    for found in (pipe("", generator=seeded(), **arguments), pipe(suffix="", generator=seeded(), **arguments)):
        assert torch.equal(found.sequences, expected.sequences) and found.texts == expected.texts
    assert not any("given" in keywords for keywords in told)
    assert pipe.num_function_evaluations == STEPS


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("self_condition_scale", [0.0, 1.0, 3.0])
def test_guidance_by_the_prompt(pipe: LDLMPipeline, scale: float, self_condition_scale: float) -> None:
    """x_0 + w (x_sc - x_0) + (v - 1) (x_sc - x_null), rescaled, by three calls of the denoiser."""
    arguments = {"self_condition_scale": self_condition_scale, "guidance_rescale": 0.5}
    noise = torch.randn(2, LENGTH, 16)
    states: list[dict[str, torch.Tensor]] = []
    pipe(
        ["w5 w6", "w7"],
        num_inference_steps=STEPS,
        latents=noise,
        guidance_scale=scale,
        callback_on_step_end=lambda _, __, ___, tensors: states.append(dict(tensors)),
        callback_on_step_end_tensor_inputs=["latents", "clean_latents"],
        **arguments,
    )
    evaluations = (scale != 1) * STEPS + (self_condition_scale == 3) * (STEPS - 1)
    assert pipe.num_function_evaluations == STEPS + evaluations
    rows = GivenTokens.of_rows([[*ids(pipe, "w5 w6"), *[None] * 6], [*ids(pipe, "w7"), *[None] * 7]], LENGTH)
    given = pipe.encode_given(rows)
    solver = pipe.prepare_solver(STEPS, None, torch.device("cpu"))
    latents, estimate = states[0]["latents"], states[0]["clean_latents"]
    nothing = torch.zeros_like(estimate)
    with torch.no_grad():
        condition = nothing if self_condition_scale == 0 else estimate
        told = pipe.transformer(latents, solver.times[1], condition, **given).sample
        plain = pipe.transformer(latents, solver.times[1], nothing, **given).sample
        null = given | {"given_latents": nothing}
        without = pipe.transformer(latents, solver.times[1], condition, **null).sample
    start = plain if self_condition_scale == 3 else told
    contrast = (scale - 1) * (told - without) * ~given["given"][..., None]
    rescale = 0.0 if scale == 1 and self_condition_scale != 3 else 0.5
    weight = self_condition_scale if self_condition_scale == 3 else 1.0
    expected = guide(start, told, weight, rescale, contrast)
    expected = torch.where(given["given"][..., None], given["given_latents"], expected)
    torch.testing.assert_close(states[1]["clean_latents"], expected, rtol=1e-4, atol=1e-5)


def test_guidance_interval(pipe: LDLMPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 10, "output_type": "latent", "guidance_scale": 2.0}
    noise = torch.randn(1, LENGTH, 16)
    evaluations = {}
    for interval in ((0.0, 1.0), (0.3, 0.7), (0.0, 0.01)):
        latents = pipe("w5", latents=noise, guidance_interval=interval, generator=seeded(), **arguments).latents
        evaluations[interval] = pipe.num_function_evaluations
    assert evaluations == {(0.0, 1.0): 20, (0.3, 0.7): 14, (0.0, 0.01): 10}
    arguments["guidance_scale"] = 1.0
    assert torch.equal(latents, pipe("w5", latents=noise, generator=seeded(), **arguments).latents)


def test_a_row_does_not_depend_on_its_batch(pipe: LDLMPipeline) -> None:
    prompts = ["w5 w6", "", "w7", "w2 w3 w4 w5"]
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 2.0}
    together = pipe(prompts, generator=[seeded(i) for i in range(4)], **arguments).latents
    for i, prompt in enumerate(prompts):
        if prompt:
            alone = pipe(prompt, generator=[seeded(i)], **arguments).latents
            torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


def test_infill(pipe: LDLMPipeline) -> None:
    texts = ["w5 ___ w6", "___ w7", "w2___w3 w4 ___"]
    output = pipe.infill(texts, gap_tokens=2, num_texts_per_prompt=2, num_inference_steps=STEPS)
    lengths = [4, 4, 3, 3, 7, 7]
    rows = output.sequences.tolist()
    for row, length in zip(rows, lengths, strict=True):
        assert len(row) == 7 and row[length:] == [pipe.fill_token_id] * (7 - length)
    assert [rows[0][0], rows[0][3], rows[2][2]] == ids(pipe, "w5 w6 w7")
    assert [rows[4][0], rows[4][3], rows[4][4]] == ids(pipe, "w2 w3 w4")
    assert output.texts[0].startswith("w5") and output.texts[0].endswith("w6")


def test_longer_than_the_model_block_by_block(pipe: LDLMPipeline) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 2}
    blocks = list(pipe.stream(["w5 w6", "w7"], max_new_tokens=13, generator=[seeded(0), seeded(1)], **arguments))
    # the rest of the first window, then half a window each
    assert [block.sequences.shape[1] for block in blocks] == [7, 4, 3]
    assert pipe.num_function_evaluations == 2 * len(blocks)
    whole = pipe(["w5 w6", "w7"], max_new_tokens=13, generator=[seeded(0), seeded(1)], **arguments)
    assert whole.sequences.shape == (2, 15) and whole.latents is None
    for row, text in enumerate(whole.texts):
        assert ["w5 w6", "w7"][row] + "".join(block.texts[row] for block in blocks) == text
    assert whole.sequences[0, :2].tolist() == ids(pipe, "w5 w6")
    assert whole.sequences[1, -1] == pipe.fill_token_id
    alone = pipe("w7", max_new_tokens=13, generator=[seeded(1)], **arguments)
    assert alone.sequences[0].tolist() == whole.sequences[1, :14].tolist()


def test_a_block_has_the_end_of_the_text_as_its_prompt(pipe: LDLMPipeline) -> None:
    seen: list[torch.Tensor] = []
    pipe.token_encoder.register_forward_pre_hook(lambda _, inputs, keywords: seen.append(inputs[0]), with_kwargs=True)
    blocks = list(pipe.stream("w5 w6", max_new_tokens=10, context_tokens=3, num_inference_steps=1))
    written = torch.cat([block.sequences[0] for block in blocks]).tolist()
    assert len(written) == 10 and len(blocks) == 2
    assert seen[1][0, :3].tolist() == written[3:6]


def test_long_texts_without_a_prompt_and_short_ones(pipe: LDLMPipeline) -> None:
    assert pipe(batch_size=2, max_new_tokens=20, num_inference_steps=1).sequences.shape == (2, 20)
    short = pipe(batch_size=2, max_new_tokens=3, num_inference_steps=1, generator=seeded()).sequences
    whole = pipe(batch_size=2, num_inference_steps=1, generator=seeded()).sequences
    assert torch.equal(short, whole[:, :3])


def test_an_interrupted_stream_ends(pipe: LDLMPipeline) -> None:
    def stop(pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        pipeline._interrupt = True

    blocks = list(pipe.stream("w5", max_new_tokens=50, num_inference_steps=3, callback_on_step_end=stop))
    assert len(blocks) == 1 and pipe.num_function_evaluations == 1


def test_edit_starts_from_the_noised_text_and_is_told_it(make_pipeline: Callable) -> None:
    """With any denoiser, one step of DDIM's here, which predicts from the noised latents and the clean ones."""
    pipe = make_pipeline()
    pipe.scheduler = TangentDDIMScheduler(eta=0.0)
    text, calls = "w2 w3 w4 w5 w6 w7 w8 w9", []
    pipe.transformer.register_forward_pre_hook(lambda _, inputs, __: calls.append(inputs), with_kwargs=True)
    output = pipe.edit([text] * 2, strength=0.5, num_inference_steps=10, generator=seeded())
    latents = pipe.encode([text] * 2)
    noisy, time, condition = calls[0]
    assert 0.4 < float(time) <= 0.5 and len(calls) == pipe.num_function_evaluations == 4
    alpha, sigma = alpha_sigma(time.double(), pipe.scheduler.config.tangent_d)
    noise = pipe.prepare_latents(2, torch.device("cpu"), seeded())
    torch.testing.assert_close(noisy, float(alpha) * latents + float(sigma) * noise)
    torch.testing.assert_close(condition, latents)
    assert len(output.texts) == 2 and output.sequences.shape == (2, 8)
    assert isinstance(pipe.edit(text, strength=1, num_inference_steps=2, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "w2 w3 w4 w5 w6 w7 w8 w9"}, "`prompt` has 8 tokens, which leaves no room.*texts have 8"),
        ({"prompt": "w2 " * 100_000}, "`prompt` has 100000 tokens"),
        ({"prompt": "w2 w3 w4", "suffix": "w5 w6 w7 w8 w9"}, "`suffix` 5, which leaves no room"),
        ({"prompt": "w2", "suffix": "w3", "max_new_tokens": 7}, "room for 6 of the 7"),
        ({"prompt": "hello"}, "does not know.*'hello'"),
        ({"prompt": "w2 \U0001f600"}, "does not know"),
        ({"prompt": 3}, "`prompt` must be a text.*batch_size"),
        ({"prompt": ["w2", 3]}, "`prompt` must be a text"),
        ({"prompt": []}, "`prompt` must be a text"),
        ({"prompt": ["w2"], "suffix": ["w3", "w4"]}, "1 texts and `suffix` 2"),
        ({"num_texts_per_prompt": 2}, "is for prompts.*batch_size"),
        ({"prompt": "w2 " * 8, "max_new_tokens": 50}, "no room"),
        ({"prompt": "w2", "batch_size": 2}, "num_texts_per_prompt"),
        ({"prompt": "w2", "num_texts_per_prompt": 0}, "`num_texts_per_prompt`.*0"),
        ({"prompt": "w2", "max_new_tokens": 0}, "`max_new_tokens`.*0"),
        ({"prompt": "w2", "guidance_scale": -1}, "`guidance_scale`.*-1"),
        ({"prompt": "w2", "guidance_scale": float("nan")}, "`guidance_scale`.*nan"),
        ({"prompt": "w2", "guidance_interval": (0.5, 0.1)}, "`guidance_interval`"),
        ({"prompt": "w2", "max_new_tokens": 50, "output_type": "latent"}, "no latents of the whole"),
        ({"prompt": ["w2 w3 w4 w5 w6", "w7"], "suffix": ["", "w9"], "max_new_tokens": 5}, "with a `suffix`"),
        ({"prompt": "w2", "guidance_interval": None}, "`guidance_interval`"),
        ({"prompt": "w2", "given_tokens": GivenTokens.of_rows([[5, None]], LENGTH)}, "leave prompt"),
        ({"batch_size": "w2"}, "`batch_size`.*goes first"),
    ],
)
def test_bad_prompts_are_refused_before_any_step(pipe: LDLMPipeline, arguments: dict, message: str) -> None:
    calls: list = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(num_inference_steps=2, **arguments)
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "w2 w3"}, "`gap`='___' does not occur"),
        ({"texts": ["w2 ___", "w3"]}, "does not occur in 'w3'"),
        ({"texts": []}, "at least one text"),
        ({"texts": [5]}, "`texts` must be"),
        ({"texts": "w2 ___", "gap": ""}, "`gap` must be"),
        ({"texts": "w2 ___", "gap_tokens": 8}, "`gap_tokens`=9|9 tokens, more than this model's 8"),
        ({"texts": "w2 ___", "gap_tokens": 0}, "`gap_tokens`"),
        ({"texts": "hello ___"}, "does not know"),
    ],
)
def test_bad_gaps_are_refused(pipe: LDLMPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.infill(**arguments)


def test_edit_gives_no_estimate_to_a_denoiser_that_knows_none(make_pipeline: Callable) -> None:
    pipe = make_pipeline()
    calls: list[Any] = []
    pipe.transformer.register_forward_pre_hook(lambda _, inputs, __: calls.append(inputs[2]), with_kwargs=True)
    pipe.edit("w2 w3", num_inference_steps=4, self_condition_scale=0.0)
    assert calls and not any(condition.any() for condition in calls)


def test_an_edited_text_has_as_many_tokens_as_before(pipe: LDLMPipeline) -> None:
    texts = ["w2 w3", "w2 w3 w4 w5 w6"]
    output = pipe.edit(texts, num_texts_per_prompt=2, num_inference_steps=4, generator=seeded())
    assert output.sequences.shape == (4, 5) and output.latents.shape[:2] == (4, LENGTH)
    assert (output.sequences[:2, 2:] == pipe.fill_token_id).all()
    whole = pipe.decode(output.latents)
    assert all(one.startswith(text) for one, text in zip(whole, output.texts, strict=True))


def test_nothing_is_written_where_the_text_cannot_go_on(make_pipeline: Callable) -> None:
    pipe = make_pipeline()
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    for write in (lambda: next(pipe.stream(max_new_tokens=20)), lambda: pipe(max_new_tokens=20)):
        with pytest.raises(ValueError, match="writes no more than 8 tokens"):
            write()
    assert not calls


def test_a_character_of_two_blocks_comes_with_the_second() -> None:
    """A byte-level tokenizer decodes the first of its bytes to U+FFFD."""
    blocks = [b"abc\xd7", b"abc\xd7\x90"]
    first, second = (whole_characters(block.decode(errors="replace")) for block in blocks)
    assert [first, second[len(first) :]] == ["abc", "\u05d0"]


@pytest.mark.parametrize("arguments", [{}, {"output_type": "seq"}, {"max_new_tokens": 3}, {"max_new_tokens": 12}])
def test_an_output_has_its_fields_as_keys(pipe: LDLMPipeline, arguments: dict[str, Any]) -> None:
    output = pipe("w5 w6", num_inference_steps=2, **arguments)
    assert output[0] is output["sequences"] is output.sequences
    assert ("texts" in output) == (arguments.get("output_type") != "seq")
    assert ("latents" in output) == (arguments.get("max_new_tokens") != 12)


def test_rows_made_by_hand_are_looked_at(pipe: LDLMPipeline) -> None:
    sequences, given = torch.full((2, LENGTH), 5), torch.arange(LENGTH).expand(2, -1) < 3
    for rows, message in (
        (GivenTokens(sequences[:, :4], given[:, :4], [4, 4]), r"token ids of shape \(batch_size, 8\)"),
        (GivenTokens([[5] * LENGTH], given, [8]), "must be token ids"),
        (GivenTokens(sequences, given.int(), [8, 8]), "must be bool of the shape"),
        (GivenTokens(sequences, given, [8]), "one for each of 2 rows"),
        (GivenTokens(sequences, given, [8, 100]), "to 8"),
        (GivenTokens(sequences, given, [8, 2]), "from the end of what is given"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(given_tokens=rows, num_inference_steps=1)


def test_guidance_that_is_not_named_stays(pipe: LDLMPipeline) -> None:
    pipe.set_guidance(self_condition_scale=3.0, guidance_rescale=0.5)
    pipe.set_guidance(guidance_scale=2.0)
    config = pipe.config
    assert (config.self_condition_scale, config.guidance_rescale, config.guidance_scale) == (3.0, 0.5, 2.0)
    pipe("w5", num_inference_steps=2)
    assert pipe.num_function_evaluations == 2 + 2 + 1
    pipe("w5", num_inference_steps=2, guidance_scale=1.0)
    assert pipe.num_function_evaluations == 2 + 1


@pytest.mark.parametrize("method", ["stream", "edit", "steer"])
def test_arguments_that_a_method_does_not_take(pipe: LDLMPipeline, method: str) -> None:
    needed = {"stream": {}, "edit": {"texts": "w5"}, "steer": {"reward": len}}[method]
    with pytest.raises(TypeError, match=f"{method}\\(\\) got an unexpected argument 'latents'.*guidance_scale"):
        next(iter([getattr(pipe, method)(**needed, latents=None)][0]))


def bert_like() -> PreTrainedTokenizerFast:
    """A tokenizer that drops control characters, as BERT's."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "e": 2, "[SEP]": 3}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", sep_token="[SEP]")


@pytest.mark.parametrize("text", ["a \u0007a", "\u200b", "a\u0000", "a \ufffd", "a b"])
def test_characters_that_a_tokenizer_drops_are_no_prompt(text: str) -> None:
    with pytest.raises(ValueError, match="does not know, and would be lost"):
        tokenize(bert_like(), text, "prompt")


@pytest.mark.parametrize("text", ["a  A", "\u00e9 e", "e\u0301", " a "])
def test_spaces_case_and_accents_may_go(text: str) -> None:
    assert set(tokenize(bert_like(), text, "prompt")) <= {1, 2}


def test_half_of_a_surrogate_pair_is_no_text(pipe: LDLMPipeline) -> None:
    with pytest.raises(ValueError, match="no valid Unicode"):
        pipe("w5 \ud800", num_inference_steps=1)


def test_generators_of_a_list_are_generators(pipe: LDLMPipeline) -> None:
    with pytest.raises(ValueError, match="`generator` must be a torch.Generator or a list of them"):
        pipe(batch_size=2, num_inference_steps=1, generator=[None, None])


def test_edit_loses_no_characters_silently(pipe: LDLMPipeline) -> None:
    with pytest.raises(ValueError, match="`texts` has characters or words that the tokenizer does not know.*'hello'"):
        pipe.edit(["w2", "hello"], num_inference_steps=2)


def byte_level(add_prefix_space: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose words have the space before them in their tokens, as GPT-2's, or one before every text."""
    words = ["a", "b", "\u0120a", "\u0120b", "\u0120", ",", "."]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("text", "tokens"), [("b a", ["\u0120b", "\u0120a"]), (" b", ["\u0120b"]), (", b", [",", "\u0120b"]), ("", [])]
)
def test_a_suffix_has_the_space_before_its_word(text: str, tokens: list[str]) -> None:
    tokenizer = byte_level(add_prefix_space=False)
    assert tokenizer.convert_ids_to_tokens(tokenize_suffix(tokenizer, text)) == tokens


def test_a_suffix_has_no_second_space() -> None:
    tokenizer = byte_level(add_prefix_space=True)
    assert tokenizer.convert_ids_to_tokens(tokenize_suffix(tokenizer, "b a")) == ["\u0120b", "\u0120a"]


def test_a_space_behind_a_prompt_is_left_to_what_is_written(pipe: LDLMPipeline) -> None:
    expected, _ = pipe.tokenize_prompts("w2 w3", None, 1, 1)
    pipe.register_modules(tokenizer=byte_level(add_prefix_space=False))
    found, _ = pipe.tokenize_prompts("a b  ", None, 1, 1)
    assert pipe.tokenizer.convert_ids_to_tokens(found[0]) == ["a", "\u0120b"] and len(expected[0]) == 2


@pytest.mark.parametrize("strength", [-0.1, 0, 1.1, float("nan"), "all"])
def test_bad_strengths_are_refused(pipe: LDLMPipeline, strength: Any) -> None:
    with pytest.raises(ValueError, match=r"`strength` must be a number in \(0, 1\]"):
        pipe.edit("w2", strength=strength, num_inference_steps=2)


def test_counts_of_other_types(pipe: LDLMPipeline) -> None:
    expected = pipe("w5", num_texts_per_prompt=2, max_new_tokens=3, num_inference_steps=2, generator=seeded())
    number = np.int64
    found = pipe(
        "w5",
        num_texts_per_prompt=number(2),
        max_new_tokens=number(3),
        num_inference_steps=number(2),
        generator=seeded(),
    )
    assert torch.equal(found.sequences, expected.sequences)


def test_a_prompt_needs_the_encoders(pipe: LDLMPipeline) -> None:
    pipe.register_modules(token_encoder=None)
    with pytest.raises(ValueError, match=r"a prompt needs.*lacks token_encoder"):
        pipe("w5", num_inference_steps=1)
    assert len(pipe(num_inference_steps=1).texts) == 1


def test_callbacks_of_sampling() -> None:
    assert Sampling().callback_tensors == ["latents"]
    assert Sampling(callback_on_step_end_tensor_inputs=["clean_latents"]).callback_tensors == ["clean_latents"]
