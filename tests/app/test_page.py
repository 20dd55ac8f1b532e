"""The page: what it shows along the way and at the end, through its functions and through gradio's own client."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gradio
import gradio_client
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ldlm_hf import LDLMPipeline
from ldlm_hf.app import __main__ as command_line
from ldlm_hf.app.generation import Frame, describe, generate_frames
from ldlm_hf.app.interpolation import interpolate_texts
from ldlm_hf.app.marked_texts import CHANGED, mark_changes
from ldlm_hf.app.page import build_app


def plain_output(pipeline: LDLMPipeline, batch_size: int, num_inference_steps: int, seed: int):
    return pipeline(
        batch_size=batch_size,
        num_inference_steps=num_inference_steps,
        generator=torch.Generator().manual_seed(seed),
    )


def generate(pipeline: LDLMPipeline, *arguments: int) -> list[Frame]:
    """All frames of a generation: batch size, steps, seed, decode every."""
    return list(generate_frames(pipeline, *arguments, threading.Event()))


def joined(pieces: list[tuple[str, str | None]]) -> str:
    return "".join(text for text, _ in pieces)


@pytest.mark.parametrize(
    ("num_inference_steps", "decode_every", "steps"),
    [(9, 4, [4, 8, 9]), (8, 4, [4, 8]), (3, 1, [1, 2, 3]), (1, 1, [1]), (5, 100, [5])],
)
def test_frames_come_every_few_steps_and_at_the_end(
    make_pipeline: Callable[..., LDLMPipeline], num_inference_steps: int, decode_every: int, steps: list[int]
):
    frames = generate(make_pipeline(), 2, num_inference_steps, 0, decode_every)
    assert [frame.step for frame in frames] == steps
    assert all(frame.num_steps == num_inference_steps for frame in frames)
    assert [frame.seconds is None for frame in frames] == [True] * (len(steps) - 1) + [False]


@pytest.mark.parametrize("decode_every", [1, 3, 100])
def test_the_last_frame_is_what_the_pipeline_gives(make_pipeline: Callable[..., LDLMPipeline], decode_every: int):
    pipeline = make_pipeline()
    expected = plain_output(pipeline, 3, 12, seed=5)
    last = generate(pipeline, 3, 12, 5, decode_every)[-1]
    assert torch.equal(last.sequences, expected.sequences)
    assert [joined(mark_changes(pipeline, sequence, None)) for sequence in last.sequences] == expected.texts
    assert not torch.equal(last.sequences, plain_output(pipeline, 3, 12, seed=6).sequences)


def test_frames_decode_the_clean_prediction_of_their_step(make_pipeline: Callable[..., LDLMPipeline]):
    pipeline = make_pipeline()
    texts = {}

    def record(pipeline, index, timestep, tensors):
        texts[index + 1] = pipeline.decode(tensors["clean_latents"])
        return {}

    pipeline(
        batch_size=2,
        num_inference_steps=7,
        generator=torch.Generator().manual_seed(1),
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["clean_latents"],
    )
    frames = generate(pipeline, 2, 7, 1, 2)
    assert {frame.step for frame in frames} == {2, 4, 6, 7}
    for frame in frames:
        assert pipeline.tokenizer.batch_decode(frame.sequences, skip_special_tokens=True) == texts[frame.step]


def reader(tokenizer: PreTrainedTokenizerFast) -> LDLMPipeline:
    """A pipeline that knows words alone."""
    return LDLMPipeline(None, None, None, tokenizer, None)


def test_only_changed_tokens_are_highlighted(tiny_tokenizer: PreTrainedTokenizerFast):
    before = torch.tensor([2, 3, 4, 5, 1, 7])
    after = torch.tensor([2, 9, 8, 5, 6, 7])
    assert mark_changes(reader(tiny_tokenizer), after, before) == [
        ("w2 ", None),
        ("w9 w8", CHANGED),
        (" w5 ", None),
        ("w6", CHANGED),
        (" w7", None),
    ]
    assert mark_changes(reader(tiny_tokenizer), after, after) == [("w2 w9 w8 w5 w6 w7", None)]
    assert mark_changes(reader(tiny_tokenizer), after, None) == [("w2 w9 w8 w5 w6 w7", CHANGED)]


def test_special_tokens_show_nothing(tiny_tokenizer: PreTrainedTokenizerFast):
    before, after = torch.tensor([1, 1, 3, 1]), torch.tensor([1, 2, 3, 0])
    assert mark_changes(reader(tiny_tokenizer), after, before) == [("w2", CHANGED), (" w3", None)]
    assert mark_changes(reader(tiny_tokenizer), torch.ones(4, dtype=torch.long), before) == []


def test_pieces_of_characters_and_words_join_to_the_text(byte_tokenizer: PreTrainedTokenizerFast):
    """Tokens that are bytes: every split falls within characters for some of the texts."""
    generator = torch.Generator().manual_seed(0)
    for text in ("naïve – ☃ 日本語\n\n two  spaces ", "日本", "a"):
        token_ids = torch.tensor(byte_tokenizer(text)["input_ids"])
        for _ in range(20):
            changed = torch.rand(len(token_ids), generator=generator) < 0.4
            before = torch.where(changed, (token_ids + 1) % 256, token_ids)
            assert joined(mark_changes(reader(byte_tokenizer), token_ids, before)) == text


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_status_counts_changed_tokens_and_tokens_per_second():
    before, after = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([[1, 2, 3, 9], [9, 6, 7, 8]])
    assert describe(Frame(4, 16, after), before) == "**Step 4 of 16**: 2 of 8 tokens changed"
    assert describe(Frame(4, 16, after), None) == "**Step 4 of 16**: 8 of 8 tokens changed"
    assert describe(Frame(16, 16, after, seconds=0.5), before).startswith(
        "**16 tokens/s**: 2 texts of 4 tokens, 16 steps and the final decoding in 0.50 s"
    )
    assert describe(Frame(7, 16, after, seconds=0.5), before).startswith("**Stopped after 7 of 16 steps**")


def test_decoding_for_the_page_is_not_counted_as_generation(make_pipeline: Callable[..., LDLMPipeline], monkeypatch):
    pipeline = make_pipeline()
    decode = pipeline.decode_to_sequences

    def slow_decode(latents: torch.Tensor) -> torch.Tensor:
        threading.Event().wait(0.1)
        return decode(latents)

    monkeypatch.setattr(pipeline, "decode_to_sequences", slow_decode)
    start = time.perf_counter()
    *_, last = generate(pipeline, 1, 6, 0, 1)
    assert 0.1 < last.seconds < time.perf_counter() - start - 5 * 0.1  # of the six, only the final decoding counts


@pytest.mark.parametrize("stop_by_event", [True, False])
def test_stopping_interrupts_the_pipeline(make_pipeline: Callable[..., LDLMPipeline], stop_by_event: bool):
    pipeline = make_pipeline()
    steps = queue.SimpleQueue()
    pipeline.transformer.register_forward_hook(lambda *_: steps.put(None))
    stop = threading.Event()
    frames = generate_frames(pipeline, 1, 3000, 0, 2, stop)
    next(frames)
    if stop_by_event:
        stop.set()
        *_, last = frames
        assert last.step == steps.qsize() < last.num_steps == 3000
    else:
        frames.close()  # as when the browser is closed
    assert pipeline.interrupt
    assert steps.qsize() < 3000
    expected = plain_output(pipeline, 1, 5, seed=0)
    assert torch.equal(generate(pipeline, 1, 5, 0, 2)[-1].sequences, expected.sequences)


def test_two_generations_at_once_do_not_mix(make_pipeline: Callable[..., LDLMPipeline]):
    pipeline = make_pipeline()
    expected = [plain_output(pipeline, 2, 20, seed).sequences for seed in (0, 1)]
    generations = [generate_frames(pipeline, 2, 20, seed, 3, threading.Event()) for seed in (0, 1)]
    for pair in itertools.zip_longest(*generations):
        last = pair
    assert [frame.step for frame in last] == [20, 20]
    assert all(torch.equal(frame.sequences, sequences) for frame, sequences in zip(last, expected, strict=True))


def test_interpolation_runs_from_one_reconstruction_to_the_other(make_pipeline: Callable[..., LDLMPipeline]):
    pipeline = make_pipeline()
    texts = ["w2 w3 w4 w5", "w30 w31 w32 w33 w34 w35 w36 w37"]
    sequences = interpolate_texts(pipeline, *texts, num_points=5)
    assert sequences.shape[0] == 5
    decoded = pipeline.tokenizer.batch_decode(sequences, skip_special_tokens=True)
    assert [decoded[0], decoded[-1]] == [pipeline.decode(pipeline.encode(text))[0] for text in texts]
    middle = pipeline.encode(texts).mean(0, keepdim=True)
    assert decoded[2] == pipeline.decode(middle)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 1), "`batch_size` must be a positive integer"),
        ((1, 0, 0, 1), "`num_inference_steps` must be a positive integer"),
        ((1, 4, -1, 1), "`seed` must be an integer from 0"),
        ((1, 4, None, 1), "`seed` must be an integer from 0"),
        ((1, 4, 0, 0), "`decode_every` must be an integer from 1"),
        ((1, 4, 0, 2.5), "`decode_every` must be an integer from 1"),
    ],
)
def test_generation_refuses_bad_values(make_pipeline: Callable[..., LDLMPipeline], arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        generate(make_pipeline(), *arguments)


def test_forms_may_give_whole_numbers_as_floats(make_pipeline: Callable[..., LDLMPipeline]):
    pipeline = make_pipeline()
    expected = plain_output(pipeline, 2, 4, seed=3).sequences
    assert torch.equal(generate(pipeline, 2.0, 4.0, 3.0, 2.0)[-1].sequences, expected)
    assert len(interpolate_texts(pipeline, "w2", "w3", 3.0)) == 3


@pytest.mark.parametrize(
    ("first", "second", "num_points", "message"),
    [
        ("w2", "w3 " * 9, 3, "The second text cannot be encoded: .*9 tokens, more than .* 8"),
        (" ", "w3", 3, "The first text is empty"),
        ("w2", None, 3, "The second text is empty"),
        ("w2", "w3", 1, "`num_points` must be an integer of at least 2"),
    ],
)
def test_interpolation_refuses_bad_values(
    make_pipeline: Callable[..., LDLMPipeline], first: str, second: str, num_points: int, message: str
):
    with pytest.raises(ValueError, match=message):
        interpolate_texts(make_pipeline(), first, second, num_points)


def box_texts(boxes: tuple) -> list[str]:
    """The texts of the boxes that are visible."""
    return [
        "".join(piece["token"] for piece in box["value"]) for box in boxes if isinstance(box, dict) and box["visible"]
    ]


def test_page_streams_texts_and_says_what_is_wrong(make_pipeline: Callable[..., LDLMPipeline], launch: Callable):
    pipeline = make_pipeline()
    client = gradio_client.Client(launch(pipeline), verbose=False)
    assert client.config["analytics_enabled"] is False

    job = client.submit(20, 3, 7, 6, api_name="/generate")
    status, *boxes = job.result(timeout=60)
    assert box_texts(boxes) == plain_output(pipeline, 3, 20, seed=7).texts
    assert "3 texts of 8 tokens, 20 steps" in status
    assert [outputs[0].split("**")[1] for outputs in job.outputs()[:-1]] == [
        "Step 6 of 20",
        "Step 12 of 20",
        "Step 18 of 20",
    ]

    boxes = client.predict("w2 w3", "w4 w5", 3, api_name="/interpolate")
    assert box_texts(boxes)[0] == pipeline.decode(pipeline.encode("w2 w3"))[0]
    assert len(box_texts(boxes)) == 3

    for arguments, api_name, message in (
        (("w2 " * 9, "w3", 3), "/interpolate", "The first text cannot be encoded: .*9 tokens"),
        ((4, 1, None, 1), "/generate", "`seed` must be an integer"),
        ((4, 99, 0, 1), "/generate", "Value 99 is greater than maximum"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=message):
            client.predict(*arguments, api_name=api_name)


def test_visitors_wait_for_each_other_and_stop_only_their_own(
    make_pipeline: Callable[..., LDLMPipeline], launch: Callable
):
    pipeline = make_pipeline()
    url = launch(pipeline)
    first, second = (gradio_client.Client(url, verbose=False) for _ in range(2))
    endless = first.submit(1024, 1, 0, 1, api_name="/generate")
    finite = second.submit(10, 2, 3, 4, api_name="/generate")
    next(iter(endless))
    second.predict(api_name="/stop")  # waits still, and has nothing to stop
    first.predict(api_name="/stop")
    assert "Stopped after" in endless.result(timeout=60)[0]
    assert box_texts(finite.result(timeout=60)[1:]) == plain_output(pipeline, 2, 10, seed=3).texts


def tabs_that_are_off(app: gradio.Blocks) -> dict[str, str]:
    """The names of the tabs that the pipeline cannot serve, and what stands there."""
    texts = [block.value for block in app.blocks.values() if isinstance(block, gradio.Markdown) and block.value]
    return {text.split()[0].strip("*"): text for text in texts if " is off:**" in text}


def endpoints(app: gradio.Blocks) -> list[str]:
    return [function.api_name for function in app.fns.values() if function.api_visibility == "public"]


def test_a_pipeline_that_takes_prompts_serves_every_tab(make_conditional_pipeline: Callable[[], LDLMPipeline]):
    app = build_app(make_conditional_pipeline())
    assert tabs_that_are_off(app) == {}
    assert endpoints(app) == ["generate", "stop", "continue", "infill", "edit", "interpolate"]


def test_a_denoiser_of_whole_texts_edits_and_says_why_it_does_not_continue(make_pipeline: Callable[..., LDLMPipeline]):
    app = build_app(make_pipeline())
    assert endpoints(app) == ["generate", "stop", "edit", "interpolate"]
    off = tabs_that_are_off(app)
    assert off.keys() == {"Continue", "Infill"}
    assert all("role_embeds=False" in text and "conditioning.prefix_share=0.25" in text for text in off.values())


def test_a_page_without_a_denoiser_says_so(make_pipeline: Callable[..., LDLMPipeline]):
    off = tabs_that_are_off(build_app(make_pipeline(transformer=None)))
    assert off.keys() == {"Generate", "Continue", "Infill", "Edit"}
    assert all("lacks transformer" in text for text in off.values())


def test_tabs_are_off_without_encoders(make_conditional_pipeline: Callable[[], LDLMPipeline]):
    pipeline = make_conditional_pipeline()
    pipeline.register_modules(token_encoder=None, latent_encoder=None)
    app = build_app(pipeline)
    assert endpoints(app) == ["generate", "stop"]
    off = tabs_that_are_off(app)
    assert off.keys() == {"Continue", "Infill", "Edit", "Interpolate"}
    assert all("lacks token_encoder and latent_encoder. Pass what is missing" in text for text in off.values())


def test_command_line_serves_the_pipeline_of_a_folder(
    make_pipeline: Callable[..., LDLMPipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda app, **options: launched.update(options, app=app))
    monkeypatch.setattr(sys, "argv", ["app", "--pipeline", str(tmp_path), "--port", "7999", "--device", "cpu"])
    command_line.main()
    assert launched["server_port"] == 7999
    assert endpoints(launched["app"]) == ["generate", "stop", "edit", "interpolate"]
