"""Steering: the tilted distribution where it is known, then texts of a tiny pipeline."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ldlm_hf import (
    LDLMPipeline,
    TangentChurnScheduler,
    TangentDDIMScheduler,
    TangentDPMSolverMultistepScheduler,
    TangentEulerMaruyamaScheduler,
    TangentFlowMapScheduler,
    TangentScheduler,
    diffusers_config,
)
from ldlm_hf.pipelines.steering import (
    LatentGradient,
    Particles,
    Steering,
    effective_sample_size,
    reward_gradient,
    steered_prediction,
    systematic_resampling,
)
from ldlm_hf.schedulers.discrete import Solver
from ldlm_hf.schedulers.tangent import alpha_sigma


STEPS = 6
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- where the answer is known: numbers with an exact denoiser, z = alpha z_0 + sigma eps


def of_unit_gaussian(latents: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[z_0 | z] for z_0 ~ N(0, 1), since alpha^2 + sigma^2 = 1"""
    return alpha * latents


def of_two_modes(latents: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[z_0 | z] for z_0 = 1 or -1, with equal shares"""
    return torch.tanh(alpha * latents / sigma.square())


def predictions(
    denoiser: Denoiser, scheduler: TangentScheduler, batch_size: int, steering: Steering, num_steps: int = 30
) -> torch.Tensor:
    """The last predictions (B, 1, 1) of the pipeline's loop, float64."""
    scheduler.set_timesteps(num_steps)
    solver, generator = Solver(scheduler), seeded(1)
    latents = torch.randn(batch_size, 1, 1, generator=generator, dtype=torch.float64)
    clean_latents = latents
    for i, t in enumerate(solver.times):
        clean_latents = denoiser(latents, *alpha_sigma(t, scheduler.config.tangent_d))
        latents, clean_latents = steering(solver, i, latents, clean_latents)
        latents = solver.step(clean_latents, solver.timesteps[i], latents, generator)
    return clean_latents


def number(clean_latents: torch.Tensor) -> torch.Tensor:
    return clean_latents[:, 0, 0]


STOCHASTIC = [
    lambda: TangentDDIMScheduler(eta=1.0),
    lambda: TangentEulerMaruyamaScheduler(),
    lambda: TangentDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    lambda: TangentChurnScheduler(),
    lambda: TangentChurnScheduler(update="noised"),
]


@pytest.mark.parametrize("make_scheduler", STOCHASTIC)
@pytest.mark.parametrize("every", [1, 7])
def test_particles_of_a_gaussian_are_of_the_tilted_gaussian(
    make_scheduler: Callable[[], TangentScheduler], every: int
) -> None:
    """N(m, v) exp(lambda x) is N(m + lambda v, v), with m and v those of the solver's own last predictions."""
    num_particles, scale = 20_000, 1.0
    unsteered = Particles(number, 1, num_particles, 0.0)
    plain = predictions(of_unit_gaussian, make_scheduler(), num_particles, unsteered)
    particles = Particles(number, 1, num_particles, scale, every, seeded())
    steered = predictions(of_unit_gaussian, make_scheduler(), num_particles, particles)
    particles.weigh(steered)
    weights, values = particles.log_weights[0].softmax(-1), number(steered)
    mean = float((weights * values).sum())
    variance = float((weights * (values - mean).square()).sum())
    expected = float(plain.var())
    assert mean == pytest.approx(scale * expected, abs=0.06)
    assert variance == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_texts_are_drawn_from_the_tilted_shares_of_two_modes(scale: float) -> None:
    """Of 1 and -1 with the rewards 1 and 0 the first is drawn with probability 1 / (1 + exp(-lambda))."""
    num_texts, num_particles = 600, 32
    particles = Particles(lambda x: (number(x) > 0).double(), num_texts, num_particles, scale, 1, seeded())
    last = predictions(of_two_modes, TangentDDIMScheduler(eta=1.0), num_texts * num_particles, particles)
    drawn = number(particles.draw(last))
    share = 1 / (1 + math.exp(-scale))
    assert drawn.shape == (num_texts,)
    # three standard errors
    assert float((drawn > 0).double().mean()) == pytest.approx(
        share, abs=3 * math.sqrt(share * (1 - share) / num_texts)
    )


def test_a_scale_of_zero_changes_nothing() -> None:
    scheduler = TangentDDIMScheduler(eta=1.0)
    plain = predictions(of_unit_gaussian, scheduler, 40, lambda _, __, latents, clean: (latents, clean))
    assert torch.equal(predictions(of_unit_gaussian, scheduler, 40, Particles(number, 4, 10, 0.0)), plain)


@pytest.mark.parametrize("scale", [0.0, 0.7, 2.0])
def test_the_gradient_of_a_linear_reward_moves_the_mean_of_a_unit_gaussian(scale: float) -> None:
    """N(0, 1) exp(lambda x) is N(lambda, 1), whose exact denoiser is the steered one, so that from the same noise the
    last predictions are those of that denoiser."""

    def of_moved_gaussian(latents: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return scale + alpha * (latents - alpha * scale)

    scheduler = TangentDDIMScheduler()
    expected = predictions(of_moved_gaussian, scheduler, 100, lambda _, __, latents, clean: (latents, clean))
    steered = predictions(of_unit_gaussian, scheduler, 100, LatentGradient(number, scale))
    torch.testing.assert_close(steered, expected.float(), rtol=0, atol=1e-5)


def test_a_step_along_a_quadratic_reward() -> None:
    """r = -|x - m|^2 / 2 has the gradient m - x"""
    latents, target = torch.randn(3, 4, 2), torch.randn(4, 2)
    gradient = reward_gradient(lambda x: -(x - target).square().sum((1, 2)) / 2, latents)
    torch.testing.assert_close(gradient, target - latents)
    moved = steered_prediction(latents, gradient, sigma=0.5, scale=2.0)
    torch.testing.assert_close(moved, (latents + target) / 2)


def test_effective_sample_size() -> None:
    assert effective_sample_size(torch.full((8,), 1 / 8)) == pytest.approx(8)
    assert effective_sample_size(torch.tensor([0.0, 1.0, 0.0])) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(1 / 0.375)


def test_systematic_resampling_is_unbiased() -> None:
    """Over all u a particle of weight w is kept M w times, and never other than rounded up or down."""
    weights = torch.tensor([0.4, 0.05, 0.25, 0.3, 0.0], dtype=torch.float64)
    counts = torch.stack(
        [systematic_resampling(weights, (i + 0.5) / 1000, 7).bincount(minlength=5) for i in range(1000)]
    ).double()
    torch.testing.assert_close(counts.mean(0), 7 * weights, rtol=0, atol=2e-3)
    assert bool(((counts - 7 * weights).abs() < 1).all())


@pytest.mark.parametrize("count", [2, 3, 10, 49])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 1e-12])
def test_systematic_resampling_keeps_equal_weights(count: int, uniform: float) -> None:
    weights = torch.zeros(count, dtype=torch.float64).softmax(-1)
    kept = systematic_resampling(weights, uniform, count)
    assert bool((kept >= 0).all()) and bool((kept < count).all())
    if uniform == 0.3:
        assert kept.tolist() == list(range(count))


@pytest.mark.parametrize("make_scheduler", STOCHASTIC)
def test_a_solver_goes_on_with_the_rows_that_are_kept(make_scheduler: Callable[[], TangentScheduler]) -> None:
    """A step of the kept rows is the kept rows of the step, with all that the solver remembers of the last one."""
    whole, rows = make_scheduler(), torch.tensor([2, 2, 0])
    whole.set_timesteps(6)
    sample, clean_latents = torch.randn(3, 2, 2), torch.randn(3, 3, 2, 2)
    for i in range(2):
        sample = whole.step(clean_latents[i], whole.timesteps[i], sample, generator=seeded()).prev_sample
    kept = copy.deepcopy(whole)
    kept.select(rows)
    t, noises = whole.timesteps[2], [0, 1, 2]
    expected = whole.step(clean_latents[2], t, sample, generator=[seeded(i) for i in noises]).prev_sample[rows]
    kept_noises = [seeded(noises[row]) for row in rows]
    torch.testing.assert_close(kept.step(clean_latents[2][rows], t, sample[rows], kept_noises).prev_sample, expected)


# --- texts


@pytest.fixture
def pipe(make_pipeline: Callable[..., LDLMPipeline]) -> LDLMPipeline:
    """Stochastic, and without encoders, as published models are."""
    return make_pipeline(
        token_encoder=None, latent_encoder=None, scheduler=TangentDDIMScheduler(eta=1.0, time_grid="log_snr")
    )


def of_small_words(texts: list[str]) -> list[float]:
    """How many of the words w2 to w19 there are"""
    return [float(sum(int(word[1:]) < 20 for word in text.split() if word[0] == "w")) for text in texts]


def of_small_ids(sequences: torch.Tensor) -> torch.Tensor:
    return ((sequences >= 2) & (sequences < 20)).sum(1)


def test_particles_raise_the_reward(pipe: LDLMPipeline) -> None:
    arguments: dict[str, Any] = {"batch_size": 8, "num_inference_steps": STEPS}
    plain = pipe.steer(of_small_words, scale=0.0, generator=seeded(), **arguments)
    steered = pipe.steer(of_small_words, scale=10.0, generator=seeded(), **arguments)
    assert plain.rewards.tolist() == of_small_words(plain.texts)
    assert steered.rewards.tolist() == of_small_words(steered.texts)
    assert len(steered.texts) == 8 and steered.sequences.shape == (8, 8) and steered.latents.shape == (8, 6, 16)
    assert steered.rewards.mean() > plain.rewards.mean() + 1
    assert pipe.num_function_evaluations == STEPS


def test_a_reward_of_token_ids(pipe: LDLMPipeline) -> None:
    arguments: dict[str, Any] = {"scale": 3.0, "batch_size": 2, "num_inference_steps": STEPS}
    expected = pipe.steer(of_small_words, generator=seeded(), **arguments)
    found = pipe.steer(token_reward=of_small_ids, generator=seeded(), **arguments)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.rewards, expected.rewards.long())
    sequences, texts = pipe.steer(of_small_words, generator=seeded(), return_dict=False, **arguments)
    assert torch.equal(sequences, expected.sequences) and texts == expected.texts


def test_a_very_large_scale_takes_the_best_of_the_last_particles(pipe: LDLMPipeline) -> None:
    seen: list[torch.Tensor] = []

    def reward(sequences: torch.Tensor) -> torch.Tensor:
        seen.append(of_small_ids(sequences))
        return seen[-1]

    arguments: dict[str, Any] = {"num_particles": 5, "batch_size": 2, "num_inference_steps": STEPS}
    output = pipe.steer(token_reward=reward, scale=1e6, reward_every=2, **arguments)
    # after steps 2, 4 and the last, and of the texts that are returned
    assert [len(one) for one in seen] == [10, 10, 10, 2]
    assert torch.equal(output.rewards, seen[-2].view(2, 5).amax(1))


@pytest.mark.parametrize("way", ["particles", "gradient"])
def test_seeds_and_streams(pipe: LDLMPipeline, way: str) -> None:
    """The same seed writes the same texts; with a generator for each text, a text is the same alone."""
    rewards = {"reward": of_small_words} if way == "particles" else {"latent_reward": lambda x: x.mean((1, 2))}
    arguments: dict[str, Any] = {**rewards, "scale": 5.0, "num_particles": 4, "num_inference_steps": STEPS}
    one, other = (pipe.steer(batch_size=3, generator=seeded(), **arguments) for _ in range(2))
    assert torch.equal(one.latents, other.latents) and one.texts == other.texts
    together = pipe.steer(batch_size=3, generator=[seeded(i) for i in range(3)], **arguments)
    assert not torch.allclose(together.latents[0], together.latents[1], atol=1e-2)
    for i in range(3):
        alone = pipe.steer(generator=[seeded(i)], **arguments)
        torch.testing.assert_close(alone.latents[0], together.latents[i], rtol=1e-4, atol=1e-4)


def test_particles_that_are_resampled_go_on_apart(pipe: LDLMPipeline) -> None:
    """All but one particle are ruled out by the first reward: noise and prediction of all are its own then, and with
    the next noise they part."""
    seen: list[dict[str, torch.Tensor]] = []

    def reward(sequences: torch.Tensor) -> list[float]:
        return [100.0 * (i == 0 and not seen) for i in range(len(sequences))]

    pipe.steer(
        token_reward=reward,
        num_particles=4,
        num_inference_steps=3,
        callback_on_step_end=lambda _, __, ___, tensors: seen.append(dict(tensors)),
        callback_on_step_end_tensor_inputs=["latents", "clean_latents"],
    )
    assert torch.equal(seen[0]["clean_latents"], seen[0]["clean_latents"][:1].expand(4, -1, -1))
    assert not torch.equal(seen[0]["latents"][0], seen[0]["latents"][1])
    assert not torch.equal(seen[1]["clean_latents"][0], seen[1]["clean_latents"][1])


def test_callbacks_interrupt_and_progress(pipe: LDLMPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    shapes: list[tuple[int, ...]] = []

    def stop_after_two(pipeline: LDLMPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        shapes.append(tuple(tensors["latents"].shape))
        pipeline._interrupt = step == 1

    pipe.set_progress_bar_config(disable=False)
    output = pipe.steer(
        of_small_words, num_particles=3, batch_size=2, num_inference_steps=9, callback_on_step_end=stop_after_two
    )
    assert shapes == [(6, 6, 16)] * 2 and pipe.num_function_evaluations == 2 and len(output.texts) == 2
    assert "/9" in capsys.readouterr().err


@pytest.mark.parametrize("scheduler", [TangentDDIMScheduler(), TangentDDIMScheduler(eta=1.0)])
def test_the_gradient_of_latents_raises_the_reward(pipe: LDLMPipeline, scheduler: TangentScheduler) -> None:
    pipe.scheduler = scheduler
    direction = torch.randn(6, 16, generator=seeded(3))

    def reward(latents: torch.Tensor) -> torch.Tensor:
        return (latents * direction).mean((1, 2))

    arguments: dict[str, Any] = {"batch_size": 3, "num_inference_steps": STEPS}
    rewards = [
        pipe.steer(latent_reward=reward, scale=scale, generator=seeded(), **arguments).rewards
        for scale in (0.0, 10.0, 40.0)
    ]
    plain = pipe(generator=seeded(), output_type="latent", **arguments).latents
    torch.testing.assert_close(rewards[0], reward(plain))
    assert bool((rewards[0] < rewards[1]).all()) and bool((rewards[1] < rewards[2]).all())
    assert not rewards[0].requires_grad


def test_a_prompt_stays_as_it_is(make_conditional_pipeline: Callable[[], LDLMPipeline]) -> None:
    pipe = make_conditional_pipeline()
    seen: list[str] = []

    def reward(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return of_small_words(texts)

    arguments: dict[str, Any] = {"prompt": ["w5 w6", "w7"], "num_inference_steps": 2, "guidance_scale": 2.0}
    output = pipe.steer(reward, num_particles=3, num_texts_per_prompt=2, max_new_tokens=4, **arguments)
    assert len(output.texts) == 4 and output.sequences.shape == (4, 6)
    assert all(text.startswith("w5 w6") for text in [*output.texts[:2], *seen[:6]])
    assert all(text.startswith("w7") for text in [*output.texts[2:], *seen[6:12]])
    # nor does a gradient move its latents
    plain = pipe(output_type="latent", generator=seeded(), **arguments).latents
    moved = pipe.steer(latent_reward=lambda x: x.sum((1, 2)), generator=seeded(), **arguments)
    assert torch.equal(moved.latents[0, :2], plain[0, :2]) and torch.equal(moved.latents[1, :1], plain[1, :1])
    assert not torch.equal(moved.latents[0, 2:], plain[0, 2:])


def test_bfloat16(pipe: LDLMPipeline) -> None:
    pipe.to(torch.bfloat16)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "batch_size": 2}
    assert len(pipe.steer(of_small_words, num_particles=3, **arguments).texts) == 2
    output = pipe.steer(latent_reward=lambda x: x.mean((1, 2)), **arguments)
    assert output.latents.dtype == output.rewards.dtype == torch.float32


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda: TangentDDIMScheduler(),
        lambda: TangentDPMSolverMultistepScheduler(),
        lambda: TangentChurnScheduler(churn=0.0),
        lambda: DDIMScheduler.from_config(diffusers_config(TangentDDIMScheduler())),
        lambda: DPMSolverMultistepScheduler.from_config(
            diffusers_config(TangentDDIMScheduler()), algorithm_type="sde-dpmsolver++"
        ),
    ],
)
def test_particles_need_a_stochastic_scheduler(pipe: LDLMPipeline, make_scheduler: Callable) -> None:
    pipe.scheduler = make_scheduler()
    with pytest.raises(ValueError, match=rf"{type(pipe.scheduler).__name__} adds no noise.*eta=1.0"):
        pipe.steer(of_small_words, num_inference_steps=STEPS)
    assert pipe.steer(latent_reward=lambda x: x.mean((1, 2)), num_inference_steps=STEPS).texts
    pipe.scheduler = TangentDDIMScheduler.from_config(pipe.scheduler.config, eta=1.0)
    assert pipe.steer(of_small_words, num_inference_steps=STEPS).texts
    with pytest.raises(ValueError, match="adds no noise in 1 steps"):
        pipe.steer(of_small_words, num_inference_steps=1)


def test_particles_of_a_flow_map_need_its_gamma(pipe: LDLMPipeline) -> None:
    transformer = type(pipe.transformer).from_config(pipe.transformer.config, next_timestep_conditioning=True)
    pipe.register_modules(transformer=transformer, scheduler=TangentFlowMapScheduler())
    with pytest.raises(ValueError, match="TangentFlowMapScheduler adds no noise"):
        pipe.steer(of_small_words, num_inference_steps=STEPS)
    pipe.scheduler = TangentFlowMapScheduler(gamma=1.0)
    assert pipe.steer(of_small_words, num_inference_steps=STEPS).texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": None}, "exactly one of reward, token_reward, latent_reward, got none"),
        ({"latent_reward": number}, "got reward and latent_reward"),
        ({"reward": "w5"}, "`reward` must be a function.*'w5'"),
        ({"num_particles": 1}, "`num_particles`=1.*2 or more"),
        ({"num_particles": 0}, "`num_particles`.*0"),
        ({"num_particles": 2.5}, "`num_particles`.*2.5"),
        ({"reward_every": 0}, "`reward_every`.*0"),
        ({"scale": -1.0}, "`scale`.*-1"),
        ({"scale": math.nan}, "`scale`.*nan"),
        ({"scale": None}, "`scale`.*None"),
        ({"max_new_tokens": 9}, "`max_new_tokens`=9.*8 tokens"),
        ({"max_new_tokens": 0}, "`max_new_tokens`.*0"),
        ({"prompt": "w5"}, "role_embeds=False"),
        ({"generator": [seeded()] * 3}, "list of 3.*`batch_size` is 1"),
        ({"num_inference_steps": 0}, "`num_inference_steps`.*0"),
    ],
)
def test_bad_arguments_are_refused_before_any_step(pipe: LDLMPipeline, arguments: dict, message: str) -> None:
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        pipe.steer(**({"reward": of_small_words, "num_inference_steps": 2} | arguments))
    assert not calls


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], r"`reward` must return 16 numbers.*\(1,\)"),
        (1.0, r"`reward` must return 16 numbers.*\(\)"),
        ([[1.0]] * 16, r"`reward` must return 16 numbers.*\(16, 1\)"),
        (None, "`reward` must return a number for each text.*None"),
        (["good"] * 16, "`reward` must return a number for each text.*good"),
        ([math.nan] * 16, "`reward` returned.*nan.*finite"),
        (torch.full((16,), -math.inf), "`reward` returned.*inf.*large negative"),
    ],
)
def test_bad_rewards(pipe: LDLMPipeline, rewards: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.steer(lambda texts: rewards, num_inference_steps=2)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: x.mean(), r"`latent_reward` must return 2 numbers.*\(\)"),
        (lambda x: x.detach().mean((1, 2)), "`latent_reward` has no gradient"),
        (lambda x: [0.0, 0.0], "`latent_reward` has no gradient"),
        (lambda x: x.mean((1, 2)) / 0, "`latent_reward` returned.*finite"),
        (lambda x: (0 * x).square().sum((1, 2)).sqrt(), "gradient of `latent_reward` is not finite"),
    ],
)
def test_bad_rewards_of_latents(pipe: LDLMPipeline, reward: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.steer(latent_reward=reward, batch_size=2, num_inference_steps=2)
