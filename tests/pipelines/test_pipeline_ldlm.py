from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import PipelineCallback
from diffusers.models.modeling_outputs import BaseOutput
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ldlm_hf import (
    LDLMLatentDecoder,
    LDLMLatentDecoderConfig,
    LDLMPipeline,
    LDLMPipelineOutput,
    LDLMTokenDecoder,
    LDLMTokenDecoderConfig,
    LDLMTransformer1DModel,
    TangentDDIMScheduler,
    TangentEulerMaruyamaScheduler,
    TangentFlowMapScheduler,
    diffusers_config,
)
from ldlm_hf.schedulers import DIFFUSERS_SCHEDULERS, SCHEDULERS
from ldlm_hf.schedulers.discrete import model_times


STEPS = 5
# all but that of a flow map, which a plain denoiser is not
ALL_SCHEDULERS = [
    getattr(diffusers, name) for name in (*SCHEDULERS, *DIFFUSERS_SCHEDULERS) if name != "TangentFlowMapScheduler"
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe(make_pipeline: Callable[..., LDLMPipeline]) -> LDLMPipeline:
    return make_pipeline()


def test_text_output(pipe: LDLMPipeline):
    output = pipe(batch_size=3, num_inference_steps=STEPS, generator=seeded())
    assert isinstance(output, LDLMPipelineOutput)
    assert isinstance(output, BaseOutput)
    assert output.sequences.shape == (3, 8)
    assert output.sequences.dtype == torch.long
    assert output.texts == pipe.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    assert output.latents.shape == (3, 6, 16)


@pytest.mark.parametrize("output_type", ["seq", "pt"])
def test_sequence_outputs(pipe: LDLMPipeline, output_type: str):
    expected = pipe(batch_size=3, num_inference_steps=STEPS, generator=seeded()).sequences
    output = pipe(batch_size=3, num_inference_steps=STEPS, generator=seeded(), output_type=output_type)
    assert torch.equal(output.sequences, expected)
    assert output.texts is None


def test_latent_output_decodes_to_the_same_texts(pipe: LDLMPipeline):
    expected = pipe(batch_size=3, num_inference_steps=STEPS, generator=seeded()).texts
    output = pipe(batch_size=3, num_inference_steps=STEPS, generator=seeded(), output_type="latent")
    assert output.latents.shape == (3, 6, 16)
    assert output.sequences is None
    assert pipe.decode(output.latents) == expected


def test_tuples(pipe: LDLMPipeline):
    arguments: dict[str, Any] = {"batch_size": 2, "num_inference_steps": STEPS, "return_dict": False}
    output = pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded())
    sequences, texts = pipe(**arguments, generator=seeded())
    assert torch.equal(sequences, output.sequences)
    assert texts == output.texts
    (latents,) = pipe(**arguments, generator=seeded(), output_type="latent")
    assert latents.shape == (2, 6, 16)


def test_one_text_by_default(pipe: LDLMPipeline):
    assert len(pipe(num_inference_steps=1).texts) == 1


def test_sampling_is_the_loop_of_the_paper(pipe: LDLMPipeline):
    """The sampling loop: noise, then x0 and a step for each time, the last x0 being the next self-condition."""
    generator = seeded()
    latents = torch.randn(2, 6, 16, generator=generator)
    scheduler = TangentEulerMaruyamaScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    clean = torch.zeros_like(latents)
    with torch.no_grad():
        for t in scheduler.timesteps:
            clean = pipe.transformer(latents, t.expand(2), clean).sample
            latents = scheduler.step(clean, t, latents, generator=generator).prev_sample
        sequences = pipe.token_decoder(pipe.latent_decoder(clean).hidden_states).logits.argmax(-1)
    output = pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded(), output_type="latent")
    torch.testing.assert_close(output.latents, clean, rtol=1e-4, atol=1e-4)
    assert torch.equal(pipe(batch_size=2, num_inference_steps=STEPS, generator=seeded()).sequences, sequences)


def test_given_latents_are_the_start(pipe: LDLMPipeline):
    noise = torch.randn(2, 6, 16)
    arguments: dict[str, Any] = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "latent"}
    one = pipe(**arguments, latents=noise, generator=seeded()).latents
    assert torch.equal(one, pipe(**arguments, latents=noise.clone(), generator=seeded()).latents)
    assert not torch.allclose(one, pipe(**arguments, latents=-noise, generator=seeded()).latents, atol=1e-3)
    double = pipe(**arguments, latents=noise.double(), generator=seeded()).latents
    assert torch.equal(one, double)


def test_a_list_of_generators_gives_each_sample_its_own_stream(pipe: LDLMPipeline):
    together = pipe(
        batch_size=3,
        num_inference_steps=STEPS,
        generator=[seeded(seed) for seed in range(3)],
        output_type="latent",
    ).latents
    for i in range(3):
        for generator in (seeded(i), [seeded(i)]):
            alone = pipe(num_inference_steps=STEPS, generator=generator, output_type="latent").latents
            torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_explicit_timesteps(pipe: LDLMPipeline):
    seen: list[float] = []
    pipe(timesteps=[1.0, 0.6, 0.3], callback_on_step_end=lambda _, __, t, ___: seen.append(float(t)))
    assert seen == pytest.approx([1.0, 0.6, 0.3])
    assert pipe.num_timesteps == 3


def test_callback_sees_and_replaces_tensors(pipe: LDLMPipeline):
    seen: list[tuple] = []

    def callback(pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        assert pipeline is pipe
        seen.append((step, float(t), tensors))
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    output = pipe(
        batch_size=2,
        num_inference_steps=STEPS,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "clean_latents"],
        output_type="latent",
    )
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [t for _, t, _ in seen] == pytest.approx(np.linspace(1, 0.05, STEPS + 1)[:-1])
    assert all(tensor.shape == (2, 6, 16) for _, _, tensors in seen for tensor in tensors.values())
    assert not output.latents.any()
    # what was replaced is what the next step started from: with zeros everywhere both samples predict the same
    assert torch.equal(seen[1][2]["clean_latents"][0], seen[1][2]["clean_latents"][1])
    assert not torch.equal(seen[0][2]["clean_latents"][0], seen[0][2]["clean_latents"][1])


def test_callback_is_given_the_latents_by_default_and_may_return_nothing(pipe: LDLMPipeline):
    names: list[list[str]] = []
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    found = pipe(
        **arguments, generator=seeded(), callback_on_step_end=lambda _, __, ___, tensors: names.append(list(tensors))
    )
    assert names == [["latents"], ["latents"]]
    assert torch.equal(found.latents, pipe(**arguments, generator=seeded()).latents)


def test_callback_objects_of_diffusers_name_their_own_tensors(pipe: LDLMPipeline):
    class Recorder(PipelineCallback):
        tensor_inputs = ["clean_latents"]

        def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict) -> dict:
            self.names = list(callback_kwargs)
            return callback_kwargs

    callback = Recorder(cutoff_step_ratio=1.0)
    pipe(num_inference_steps=2, callback_on_step_end=callback)
    assert callback.names == ["clean_latents"]


def test_interrupt_skips_the_remaining_steps(pipe: LDLMPipeline):
    steps: list[int] = []

    def stop_after_two(pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict) -> None:
        steps.append(step)
        if step == 1:
            pipeline._interrupt = True

    output = pipe(num_inference_steps=STEPS, callback_on_step_end=stop_after_two)
    assert steps == [0, 1]
    assert pipe.interrupt
    assert output.sequences.shape == (1, 8)
    pipe(num_inference_steps=2)
    assert not pipe.interrupt


def test_num_timesteps(pipe: LDLMPipeline):
    pipe(num_inference_steps=STEPS)
    assert pipe.num_timesteps == STEPS


def test_a_progress_bar_counts_the_steps(pipe: LDLMPipeline, capsys: pytest.CaptureFixture[str]):
    pipe.set_progress_bar_config(disable=False)
    pipe(num_inference_steps=STEPS)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size`.*0"),
        ({"batch_size": -2}, "`batch_size`.*-2"),
        ({"batch_size": 1.5}, "`batch_size`.*1.5"),
        ({"batch_size": True}, "`batch_size`.*True"),
        ({"num_inference_steps": 0}, "`num_inference_steps`.*0"),
        ({"num_inference_steps": -1}, "`num_inference_steps`.*-1"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps`.*2.5"),
        ({"timesteps": [0.2, 0.4]}, "strictly decrease"),
        ({"output_type": "pil"}, "`output_type`.*text, seq, latent, pt.*'pil'"),
        ({"output_type": ["text"]}, r"`output_type`.*text, seq, latent, pt.*\['text'\]"),
        ({"generator": [torch.Generator()]}, "`generator`.*list of 1.*`batch_size` is 2"),
        ({"generator": 3 * [torch.Generator()]}, "`generator`.*list of 3.*`batch_size` is 2"),
        ({"generator": 7}, "`generator`.*7"),
        ({"latents": torch.zeros(2, 7, 16)}, r"`latents`.*\(2, 7, 16\).*\(2, 6, 16\)"),
        ({"latents": torch.zeros(2, 6, 15)}, r"`latents`.*\(2, 6, 15\).*\(2, 6, 16\)"),
        ({"latents": torch.zeros(3, 6, 16)}, r"`latents`.*\(3, 6, 16\).*\(2, 6, 16\)"),
        ({"latents": torch.zeros(6, 16)}, r"`latents`.*\(6, 16\)"),
        ({"latents": torch.zeros(2, 6, 16, dtype=torch.long)}, "`latents`.*torch.int64"),
        ({"latents": [1.0]}, r"`latents` must be a tensor.*\[1.0\]"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt"]}, "clean_latents.*prompt"),
    ],
)
def test_bad_arguments_are_refused_before_any_step(pipe: LDLMPipeline, arguments: dict, message: str):
    calls: list = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipe(**({"batch_size": 2, "num_inference_steps": 2} | arguments))
    assert not calls


WHOLE = [np.int64, np.float32, float, torch.tensor]


@pytest.mark.parametrize("number", WHOLE)
def test_whole_numbers_of_other_types(pipe: LDLMPipeline, number: Callable[[int], Any]):
    expected = pipe(batch_size=2, num_inference_steps=3, generator=seeded(), output_type="latent").latents
    noise = torch.randn(2, 6, 16, generator=seeded())
    assert torch.equal(
        pipe(batch_size=number(2), num_inference_steps=number(3), generator=seeded(), output_type="latent").latents,
        expected,
    )
    assert pipe(
        batch_size=number(2), num_inference_steps=number(3), latents=noise, generator=[seeded(), seeded()]
    ).sequences.shape == (2, 8)
    pipe.scheduler = DDIMScheduler.from_config(diffusers_config(pipe.scheduler))
    assert pipe(batch_size=number(2), num_inference_steps=number(3)).sequences.shape == (2, 8)


def test_weights_of_the_self_condition_of_other_types(pipe: LDLMPipeline):
    expected = pipe(
        batch_size=2, num_inference_steps=3, generator=seeded(), self_condition_scale=1.5, self_condition_decay=1.0
    ).sequences
    for scale, decay in ((np.float32(1.5), np.int64(1)), (Fraction(3, 2), np.float64(1))):
        found = pipe(
            batch_size=2,
            num_inference_steps=3,
            generator=seeded(),
            self_condition_scale=scale,
            self_condition_decay=decay,
        )
        assert torch.equal(found.sequences, expected)


@pytest.mark.parametrize("prompt", ["w2 w3", ["w2 w3", "w4"]])
def test_a_denoiser_that_was_given_no_texts_says_what_else_there_is(make_pipeline, prompt: str | list[str]):
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=r"role_embeds=False.*`edit`.*conditioning\.prefix_share"):
        pipe(prompt)


def test_encode_and_decode(pipe: LDLMPipeline):
    latents = pipe.encode(["w2 w3 w4 w5 w6 w7 w8 w9", "w5 w6"])
    assert latents.shape == (2, 6, 16)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    texts = pipe.decode(latents)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)
    torch.testing.assert_close(pipe.encode("w5 w6"), latents[1:], rtol=1e-4, atol=1e-4)


def test_encode_fills_short_texts_up_with_end_of_text(pipe: LDLMPipeline):
    input_ids = torch.tensor([[5, 6, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = pipe.latent_encoder(pipe.token_encoder(input_ids).hidden_states).latents
    assert torch.equal(pipe.encode("w5 w6"), expected)
    assert torch.equal(pipe.encode_sequences(input_ids), expected)


def test_encode_refuses_what_it_cannot_hold(pipe: LDLMPipeline):
    with pytest.raises(ValueError, match=r"`texts\[1\]` has 9 tokens.*sequence_length of 8"):
        pipe.encode(["w2", "w2 w3 w4 w5 w6 w7 w8 w9 w10"])
    with pytest.raises(ValueError, match="at least one"):
        pipe.encode([])
    with pytest.raises(ValueError, match=r"\(2, 7\) must have the shape .* = \(batch_size, 8\)"):
        pipe.encode_sequences(torch.ones(2, 7, dtype=torch.long))


@pytest.mark.parametrize("shape", [(6, 16), (1, 7, 16), (1, 6, 15)])
def test_decode_refuses_other_shapes(pipe: LDLMPipeline, shape: tuple):
    with pytest.raises(ValueError, match=r"\(batch_size, 6, 16\)"):
        pipe.decode(torch.zeros(shape))


def test_decode_refuses_what_is_no_tensor(pipe: LDLMPipeline):
    with pytest.raises(ValueError, match=r"`latents` must be a tensor.*\[1\]"):
        pipe.decode([1])


@pytest.mark.parametrize("missing", [["token_encoder"], ["latent_encoder"], ["token_encoder", "latent_encoder"]])
def test_encoders_are_optional(make_pipeline, missing: list[str]):
    pipe = make_pipeline(**dict.fromkeys(missing))
    expected = make_pipeline()(num_inference_steps=STEPS, generator=seeded()).sequences
    assert torch.equal(pipe(num_inference_steps=STEPS, generator=seeded()).sequences, expected)
    with pytest.raises(ValueError, match=" and ".join(missing)):
        pipe.encode("w2")


@pytest.fixture
def latent_reading_pipe(make_pipeline) -> LDLMPipeline:
    torch.manual_seed(0)
    return make_pipeline(latent_decoder=None, token_decoder=token_decoder_of(token_hidden_size=16))


def test_a_token_decoder_may_read_latents(latent_reading_pipe: LDLMPipeline):
    output = latent_reading_pipe(batch_size=2, num_inference_steps=STEPS)
    assert output.sequences.shape == (2, 6)
    assert latent_reading_pipe.decode(torch.zeros(1, 6, 16)) != []


def other_tokenizer(num_tokens: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(num_tokens)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def decoder_of(**changes: int) -> LDLMLatentDecoder:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"sequence_length": 8, "num_latents": 6, "latent_size": 16, "token_hidden_size": 32}
    return LDLMLatentDecoder(LDLMLatentDecoderConfig(**(sizes | changes)))


def token_decoder_of(**changes: int) -> LDLMTokenDecoder:
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LDLMTokenDecoder(LDLMTokenDecoderConfig(**(sizes | {"token_hidden_size": 32} | changes)))


@pytest.mark.parametrize(
    ("make_component", "message"),
    [
        (lambda: {"tokenizer": other_tokenizer(41)}, "tokenizer has 41 tokens.*vocab_size is 40"),
        (lambda: {"token_decoder": token_decoder_of(vocab_size=1065)}, "tokenizer has 40 tokens.*vocab_size is 1065"),
        (lambda: {"latent_decoder": decoder_of(num_latents=7)}, "num_latents=7.*sample_size=6"),
        (lambda: {"latent_decoder": decoder_of(latent_size=12)}, "in_channels=16.*12"),
        (lambda: {"latent_decoder": decoder_of(token_hidden_size=20)}, "token_hidden_size=20.*32"),
        (lambda: {"latent_decoder": None}, "in_channels=16.*32.*token_hidden_size"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_construction(make_pipeline, make_component, message: str):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**make_component())


def test_a_vocabulary_that_is_padded_beyond_the_tokenizer_is_fine(make_pipeline):
    for vocab_size in (64, 1064):
        pipe = make_pipeline(token_decoder=token_decoder_of(vocab_size=vocab_size))
        assert pipe(num_inference_steps=1).sequences.shape == (1, 8)


def test_parts_may_have_different_types(make_pipeline):
    expected = make_pipeline()(batch_size=4, num_inference_steps=STEPS, generator=seeded(), output_type="latent")
    pipe = make_pipeline()
    pipe.transformer.to(torch.bfloat16)
    output = pipe(batch_size=4, num_inference_steps=STEPS, generator=seeded(), output_type="latent")
    assert output.latents.dtype == torch.float32
    error = (output.latents - expected.latents).square().mean().sqrt() / expected.latents.std()
    assert 0 < error < 0.1
    assert pipe(num_inference_steps=1).sequences.shape == (1, 8)
    assert pipe.decode(pipe.encode("w5")) == pipe.decode(pipe.encode(["w5"]))

    for name in ("latent_decoder", "token_decoder", "latent_encoder", "token_encoder"):
        getattr(pipe, name).to(torch.bfloat16)
        assert pipe(num_inference_steps=1).sequences.shape == (1, 8)
        assert pipe.encode("w5").dtype == torch.float32
        assert len(pipe.decode(pipe.encode("w5"))) == 1


def test_scheduler_swap(pipe: LDLMPipeline):
    before = pipe(num_inference_steps=STEPS, generator=seeded(), output_type="latent").latents
    pipe.scheduler = TangentEulerMaruyamaScheduler.from_config(pipe.scheduler.config, tangent_d=9.0)
    assert pipe.scheduler.config.t_min == 0.05
    after = pipe(num_inference_steps=STEPS, generator=seeded(), output_type="latent").latents
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("solver", ALL_SCHEDULERS)
def test_every_scheduler_samples(pipe: LDLMPipeline, solver: type):
    """The transformer is called once a step, at times of the tangent schedule that fall from 1 or nearly so."""
    before = pipe.scheduler
    pipe.scheduler = solver.from_config(
        diffusers_config(before) if solver.__module__.startswith("diffusers.") else before.config
    )
    times = []
    pipe.transformer.register_forward_pre_hook(lambda module, arguments: times.append(float(arguments[1])))
    output = pipe(batch_size=2, num_inference_steps=4, generator=seeded(), output_type="latent")
    assert torch.isfinite(output.latents).all()
    assert len(times) == pipe.num_timesteps == 4
    assert times[0] >= 0.99
    assert times == sorted(times, reverse=True)
    assert times[-1] < 0.5
    again = pipe(batch_size=2, num_inference_steps=4, generator=seeded(), output_type="latent")
    assert torch.equal(output.latents, again.latents)
    pipe.scheduler = TangentEulerMaruyamaScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.tangent_d == before.config.tangent_d


@pytest.mark.parametrize("solver", ALL_SCHEDULERS)
def test_a_pipeline_keeps_its_scheduler(pipe: LDLMPipeline, solver: type, tmp_path: Path):
    pipe.scheduler = solver.from_config(
        diffusers_config(pipe.scheduler) if solver.__module__.startswith("diffusers.") else pipe.scheduler.config
    )
    expected = pipe(batch_size=2, num_inference_steps=3, generator=seeded()).sequences
    pipe.save_pretrained(tmp_path)
    loaded = LDLMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is solver
    assert torch.equal(loaded(batch_size=2, num_inference_steps=3, generator=seeded()).sequences, expected)


def test_a_scheduler_of_another_schedule_is_refused(pipe: LDLMPipeline):
    given = pipe.scheduler
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler belongs to another noise schedule"):
        pipe(num_inference_steps=2)
    pipe.scheduler = DDIMScheduler.from_config(diffusers_config(given))
    with pytest.raises(ValueError, match="counts discrete levels"):
        pipe(timesteps=[1.0, 0.5])


def test_diffusers_ddim_samples_what_ours_does(pipe: LDLMPipeline):
    """Same noise, same times: the two solve one equation, up to the float32 of diffusers' levels."""
    noise = torch.randn(2, 6, 16, generator=seeded())
    ours = TangentDDIMScheduler.from_config(pipe.scheduler.config, t_min=0.0)
    pipe.scheduler = DDIMScheduler.from_config(diffusers_config(ours))
    theirs = pipe(batch_size=2, num_inference_steps=4, latents=noise, output_type="latent").latents
    times = model_times(pipe.scheduler).tolist()
    pipe.scheduler = ours
    found = pipe(batch_size=2, timesteps=times, latents=noise, output_type="latent").latents
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("scale", "decay", "rescale"),
    [
        (1.0, 0.0, 0.0),
        (0.0, 0.0, 1.0),
        (1.7, 0.0, 0.0),
        (0.5, 0.4, 0.0),
        (2.0, 1.5, 0.0),
        (3.0, 0.0, 1.0),
        (3.0, 0.5, 0.3),
    ],
)
def test_self_condition_guidance_is_its_formula(pipe: LDLMPipeline, scale: float, decay: float, rescale: float):
    noise = torch.randn(2, 6, 16, generator=seeded())
    pipe.scheduler = TangentDDIMScheduler.from_config(pipe.scheduler.config)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0]) // 2))
    arguments: dict[str, Any] = {
        "self_condition_scale": scale,
        "self_condition_decay": decay,
        "guidance_rescale": rescale,
    }
    found = pipe(batch_size=2, num_inference_steps=STEPS, latents=noise, output_type="latent", **arguments).latents
    handle.remove()
    assert pipe.num_function_evaluations == sum(seen) == (STEPS if scale in (0, 1) and not decay else 2 * STEPS - 1)

    scheduler = TangentDDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents, clean = noise, torch.zeros_like(noise)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            unguided = pipe.transformer(latents, t, torch.zeros_like(clean)).sample
            guided = pipe.transformer(latents, t, clean).sample
            # sigma / alpha = d tan(pi t / 2)
            weight = 1 + (scale - 1) * np.exp(-decay * 3 * np.tan(np.pi * float(t) / 2)) if i else 1.0
            clean = unguided + weight * (guided - unguided)
            if weight not in (0, 1):
                spread = [row.std() / moved.std() for row, moved in zip(guided, clean, strict=True)]
                clean = (1 - rescale) * clean + rescale * clean * torch.stack(spread)[:, None, None]
            latents = scheduler.step(clean, t, latents).prev_sample
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "expected"), [(None, [1.0, 1.0, 1.0]), (2.5, [1.0, 2.5, 2.5]), (0.0, [1.0, 1.0, 1.0])]
)
def test_guidance_that_was_learned_costs_no_second_evaluation(
    make_pipeline: Callable[..., LDLMPipeline], randomize: Callable, scale: float | None, expected: list[float]
):
    config = make_pipeline().transformer.config
    transformer = randomize(LDLMTransformer1DModel.from_config(config, guidance_embeds=True))
    pipe = make_pipeline(transformer=transformer, scheduler=TangentDDIMScheduler())
    noise = torch.randn(2, 6, 16, generator=seeded())
    found = pipe(
        batch_size=2, num_inference_steps=3, latents=noise, output_type="latent", self_condition_scale=scale
    ).latents
    assert pipe.num_function_evaluations == 3

    pipe.scheduler.set_timesteps(3)
    latents, clean = noise, torch.zeros_like(noise)
    with torch.no_grad():
        for t, weight in zip(pipe.scheduler.timesteps, expected, strict=True):
            condition = torch.zeros_like(clean) if scale == 0 else clean
            clean = transformer(latents, t, condition, guidance=weight).sample
            latents = pipe.scheduler.step(clean, t, latents).prev_sample
    torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5)


def test_without_a_self_condition_the_transformer_sees_none(pipe: LDLMPipeline):
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2].abs().max().item()))
    pipe(num_inference_steps=3, self_condition_scale=0.0)
    assert seen == [0.0] * 3
    pipe(num_inference_steps=3)
    assert seen[3] == 0
    assert min(seen[4:]) > 0


@pytest.mark.parametrize("name", ["self_condition_scale", "self_condition_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1", True])
def test_bad_guidance(pipe: LDLMPipeline, name: str, value: Any):
    with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
        pipe(num_inference_steps=1, **{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "1", True])
def test_bad_rescaling_of_guidance(pipe: LDLMPipeline, value: Any):
    with pytest.raises(ValueError, match=r"`guidance_rescale` must be a number in \[0, 1\]"):
        pipe(num_inference_steps=1, guidance_rescale=value)


def test_a_pipeline_is_guided_as_it_was_saved(pipe: LDLMPipeline, tmp_path: Path):
    guided = LDLMPipeline(**pipe.components, self_condition_scale=2.5, guidance_rescale=0.7)
    guided.save_pretrained(tmp_path)
    loaded = LDLMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    guidance = {"self_condition_scale": 2.5, "guidance_rescale": 0.7}
    expected = pipe(batch_size=2, num_inference_steps=3, generator=seeded(), output_type="latent", **guidance).latents
    as_it_is = pipe(
        batch_size=2, num_inference_steps=3, generator=seeded(), output_type="latent", self_condition_scale=2.5
    ).latents
    assert not torch.equal(expected, as_it_is)
    assert torch.equal(
        loaded(batch_size=2, num_inference_steps=3, generator=seeded(), output_type="latent").latents, expected
    )
    assert loaded.num_function_evaluations == 5
    assert torch.equal(
        LDLMPipeline.from_pipe(loaded)(
            batch_size=2, num_inference_steps=3, generator=seeded(), output_type="latent"
        ).latents,
        expected,
    )
    plain = pipe(batch_size=2, num_inference_steps=3, generator=seeded(), output_type="latent").latents
    assert torch.equal(
        loaded(
            batch_size=2, num_inference_steps=3, generator=seeded(), self_condition_scale=1, output_type="latent"
        ).latents,
        plain,
    )
    with pytest.raises(ValueError, match="`self_condition_scale` must be a finite number"):
        LDLMPipeline(**pipe.components, self_condition_scale=-1.0)
    transformer = LDLMTransformer1DModel.from_config(pipe.transformer.config, self_conditioning=False)
    without = pipe.components | {"transformer": transformer}
    # a student in its place is not guided
    unguided = LDLMPipeline(**without, self_condition_scale=2.5)
    unguided.set_progress_bar_config(disable=True)
    unguided(num_inference_steps=3)
    assert unguided.num_function_evaluations == 3
    with pytest.raises(ValueError, match="trained without a self-condition"):
        unguided.set_guidance(2.5)


def test_every_component_has_its_turn_when_memory_is_short(pipe: LDLMPipeline):
    in_order = pipe.model_cpu_offload_seq.split("->")
    modules = [name for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)]
    assert sorted(in_order) == sorted(modules)


def test_components_rebuild_the_pipeline(pipe: LDLMPipeline):
    again = LDLMPipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    expected = pipe(num_inference_steps=STEPS, generator=seeded()).sequences
    assert torch.equal(again(num_inference_steps=STEPS, generator=seeded()).sequences, expected)


def test_no_graph_is_built(pipe: LDLMPipeline):
    output = pipe(num_inference_steps=1, output_type="latent")
    assert not output.latents.requires_grad
    assert isinstance(pipe.transformer, LDLMTransformer1DModel)


class InStep:
    """Takes the steps of several calls in turns, as long as all of them have steps left."""

    def __init__(self, num_calls: int, num_steps: int):
        self.barrier = threading.Barrier(num_calls, timeout=30)
        self.num_steps = num_steps
        self.reached: dict[int, tuple[int, int]] = {}

    def __call__(self, pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict) -> None:
        if step < self.num_steps:
            self.barrier.wait()
        self.reached[pipeline.num_timesteps] = (step + 1, pipeline.num_function_evaluations)


@pytest.mark.parametrize("solver", [*ALL_SCHEDULERS, TangentFlowMapScheduler])
@pytest.mark.parametrize("own_pipelines", [False, True])
def test_threads_share_a_pipeline(make_pipeline, randomize, solver: type, own_pipelines: bool):
    """Two calls whose steps alternate write what each writes alone; so do pipelines that `from_pipe` makes."""
    transformer = LDLMTransformer1DModel(
        in_channels=16,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        sample_size=6,
        next_timestep_conditioning=True,
    )
    pipe = make_pipeline(transformer=randomize(transformer))
    pipe.scheduler.register_to_config(timestep_cdf=[0.0, 0.2, 1.0], time_grid="learned")
    pipe.scheduler = solver.from_config(
        diffusers_config(pipe.scheduler) if solver.__module__.startswith("diffusers.") else pipe.scheduler.config
    )
    steps = (16, 64)
    expected = [
        pipe(batch_size=3, num_inference_steps=num_steps, generator=seeded(), output_type="latent").latents
        for num_steps in steps
    ]
    turns = InStep(num_calls=2, num_steps=min(steps))
    pipes = [LDLMPipeline.from_pipe(pipe) for _ in steps] if own_pipelines else [pipe, pipe]
    for one in pipes:
        one.set_progress_bar_config(disable=True)

    def call(one: LDLMPipeline, num_steps: int) -> torch.Tensor:
        return one(
            batch_size=3,
            num_inference_steps=num_steps,
            generator=seeded(),
            output_type="latent",
            callback_on_step_end=turns,
        ).latents

    with ThreadPoolExecutor() as threads:
        found = list(threads.map(call, pipes, steps))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert turns.reached == {num_steps: (num_steps, num_steps) for num_steps in steps}


def test_a_callback_interrupts_its_own_call_only(pipe: LDLMPipeline):
    expected = pipe(batch_size=2, num_inference_steps=16, generator=seeded(), output_type="latent").latents
    turns = InStep(num_calls=2, num_steps=4)
    taken = []

    def stop(pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict) -> None:
        turns(pipeline, step, t, tensors)
        taken.append(step)
        pipeline._interrupt = step == 3

    with ThreadPoolExecutor() as threads:
        stopped = threads.submit(pipe, batch_size=2, num_inference_steps=64, callback_on_step_end=stop)
        found = threads.submit(
            pipe,
            batch_size=2,
            num_inference_steps=16,
            generator=seeded(),
            output_type="latent",
            callback_on_step_end=turns,
        )
        assert torch.equal(found.result().latents, expected)
        stopped.result()
    assert taken == [0, 1, 2, 3]


def test_a_call_can_be_interrupted_from_another_thread(pipe: LDLMPipeline):
    started, interrupted = threading.Event(), threading.Event()

    def wait(pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict) -> None:
        started.set()
        assert interrupted.wait(30)

    with ThreadPoolExecutor() as threads:
        call = threads.submit(pipe, num_inference_steps=8, callback_on_step_end=wait)
        assert started.wait(30)
        assert pipe.num_timesteps == 8
        pipe._interrupt = True
        interrupted.set()
        call.result()
    assert pipe.num_function_evaluations == 1


@pytest.mark.parametrize("solver", ALL_SCHEDULERS)
def test_the_scheduler_shows_the_grid_of_the_last_call(pipe: LDLMPipeline, solver: type):
    """While it runs and afterwards, on the object that was given."""
    scheduler = pipe.scheduler = solver.from_config(
        diffusers_config(pipe.scheduler) if solver.__module__.startswith("diffusers.") else pipe.scheduler.config
    )
    seen: list[torch.Tensor] = []
    for num_steps in (3, 5):
        pipe(
            num_inference_steps=num_steps,
            callback_on_step_end=lambda pipeline, step, t, _: seen.append(t == pipeline.scheduler.timesteps[step]),
        )
        assert len(scheduler.timesteps) == pipe.num_timesteps == num_steps
    assert len(seen) == 8 and all(seen)
    assert pipe.scheduler is scheduler
