"""The samplers of token-level diffusion: reference numbers, identities, and exact networks whose text they reproduce.

An exact network knows a joint distribution of two words. Positions of a text are drawn independently given the logits,
so one text of many independent pairs is as many samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import REFERENCE, Case, fake_logits, tensor

from ldlm_hf import (
    CANDIScheduler,
    DuoScheduler,
    FLMScheduler,
    FMLMScheduler,
    MDLMScheduler,
    PsiScheduler,
    ReMDMScheduler,
)
from ldlm_hf.baselines.categorical import Generators
from ldlm_hf.baselines.masked import confidence_shares
from ldlm_hf.baselines.noise_schedule import log_linear_alpha
from ldlm_hf.baselines.token_scheduler import TokenScheduler


K, PAIRS = 3, 6000
DISCRETE = [MDLMScheduler, ReMDMScheduler, DuoScheduler, PsiScheduler]
NEEDS_VOCABULARY = [CANDIScheduler, FLMScheduler, FMLMScheduler]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(scheduler_class: type[TokenScheduler], **settings: Any) -> TokenScheduler:
    return scheduler_class(**({"vocab_size": K} if scheduler_class in NEEDS_VOCABULARY else {}), **settings)


def sample(
    scheduler: TokenScheduler,
    network: Callable[..., torch.Tensor],
    num_steps: int,
    shape: tuple[int, int] = (1, 2 * PAIRS),
    generator: Any = None,
    vocab_size: int = K,
    embeddings: torch.Tensor | None = None,
) -> torch.Tensor:
    """Words (B, L)."""
    generator = seeded() if generator is None else generator
    embeddings = torch.eye(vocab_size) if embeddings is None else embeddings
    scheduler.set_timesteps(num_steps)
    state = scheduler.start(torch.zeros(shape, dtype=torch.long), vocab_size, generator, embeddings)
    for t in scheduler.timesteps:
        logits = network(**scheduler.model_inputs(state, t))
        state = scheduler.step(logits, t, state, generator=generator, embeddings=embeddings).prev_sample
    return scheduler.words(state)


# ---------------------------------------------------------------------------------------------- exact networks


@pytest.fixture(scope="module")
def joint() -> torch.Tensor:
    """P(x_1, x_2), (K, K)."""
    weights = torch.rand(K, K, generator=seeded(3), dtype=torch.float64) ** 3 + 0.02
    return weights / weights.sum()


def pairs(words: torch.Tensor) -> torch.Tensor:
    return words.view(-1, 2)


def statistic(words: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-square of pairs, whose mean is K^2 - 1 = 8 and whose standard deviation is 4."""
    assert ((words >= 0) & (words < K)).all()
    counts = (pairs(words) @ torch.tensor([K, 1])).bincount(minlength=K * K).double()
    return float(((counts - PAIRS * expected.flatten()).square() / (PAIRS * expected.flatten())).sum())


def masked_network(joint: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The posterior of a word given the other one, if that is there."""

    def network(input_ids: torch.Tensor) -> torch.Tensor:
        first, second = pairs(input_ids).T
        of_first = torch.cat([joint.T, joint.sum(1)[None]])[second]
        of_second = torch.cat([joint, joint.sum(0)[None]])[first]
        return torch.stack([of_first, of_second], dim=1).log().view(1, -1, K)

    return network


def uniform_network(joint: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The posterior of a word given the other noisy one."""

    def network(input_ids: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha = torch.exp(-timestep)
        likelihood = alpha * torch.eye(K, dtype=torch.float64) + (1 - alpha) / K  # clean, noisy
        first, second = pairs(input_ids).T
        of_first = likelihood.T[second] @ joint.T
        of_second = likelihood.T[first] @ joint
        return torch.stack([of_first, of_second], dim=1).log().view(1, -1, K)

    return network


def flow_network(joint: torch.Tensor, scheduler: FLMScheduler) -> Callable[..., torch.Tensor]:
    """The posterior of a word given both noisy ones."""

    def network(weights: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = scheduler.flow_times[scheduler.grid.index(float(timestep))]
        # log N(z; t onehot(x), (1 - t)^2) but for what does not depend on x
        levels = (weights.double() * t - t * t / 2) / (1 - t) ** 2
        first, second = levels.view(-1, 2, K).unbind(1)
        posterior = (joint.log() + first[:, :, None] + second[:, None]).flatten(1).log_softmax(-1).view(-1, K, K)
        return torch.stack([posterior.logsumexp(2), posterior.logsumexp(1)], dim=1).view(1, -1, K)

    return network


def name_of(scheduler: TokenScheduler) -> str:
    return "-".join([type(scheduler).__name__, *(scheduler.config.get(key, "") for key in ("strategy", "mode"))])


MASKED_SAMPLERS = [
    MDLMScheduler(),
    MDLMScheduler(final="ancestral"),
    ReMDMScheduler(eta=0.1, top_p=1.0),
    ReMDMScheduler(strategy="cap", eta=0.05, top_p=1.0),
    ReMDMScheduler(strategy="loop", eta=0.05, top_p=1.0),
]
UNIFORM_SAMPLERS = [
    DuoScheduler(),
    PsiScheduler(eta=0.1, rescale_as_coded=False, top_p=1.0),
    PsiScheduler(mode="cap", eta=0.05, top_p=1.0),
    PsiScheduler(mode="loop", eta=0.02, top_p=1.0),
    PsiScheduler(mode="constant", kappa=0.9, high_share=0.5, middle_share=0.4, top_p=1.0),
]


@pytest.mark.parametrize("scheduler", MASKED_SAMPLERS, ids=name_of)
def test_masked_samplers_reproduce_the_text(scheduler: TokenScheduler, joint: torch.Tensor) -> None:
    words = sample(scheduler, masked_network(joint), num_steps=128)
    assert statistic(words, joint) < 8 + 5 * 4


@pytest.mark.parametrize("scheduler", UNIFORM_SAMPLERS, ids=name_of)
def test_uniform_samplers_reproduce_the_text(scheduler: TokenScheduler, joint: torch.Tensor) -> None:
    words = sample(scheduler, uniform_network(joint), num_steps=128)
    assert statistic(words, joint) < 8 + 5 * 4


def test_the_flow_reproduces_the_text(joint: torch.Tensor) -> None:
    scheduler = FLMScheduler(vocab_size=K)
    words = sample(scheduler, flow_network(joint, scheduler), num_steps=200)
    assert statistic(words, joint) < 8 + 5 * 4


def test_one_step_draws_each_word_by_itself(joint: torch.Tensor) -> None:
    product = joint.sum(1)[:, None] * joint.sum(0)
    for scheduler, network in ((MDLMScheduler(), masked_network), (DuoScheduler(), uniform_network)):
        words = sample(scheduler, network(joint), num_steps=1)
        assert statistic(words, product) < 8 + 5 * 4
        assert statistic(words, joint) > 8 + 20 * 4


# ---------------------------------------------------------------------------------------------- identities


def some_network(input_ids: torch.Tensor, timestep: Any = 0.0) -> torch.Tensor:
    return fake_logits(input_ids, 7, c=timestep)


def test_samplers_without_remasking_are_ancestral() -> None:
    """The same draws make the same texts."""
    shape = (3, 9)
    mdlm = sample(MDLMScheduler(), some_network, 6, shape, vocab_size=7)
    for strategy in ("rescale", "cap"):
        remdm = ReMDMScheduler(strategy=strategy, eta=0.0, top_p=1.0)
        assert torch.equal(sample(remdm, some_network, 6, shape, vocab_size=7), mdlm)
    duo = sample(DuoScheduler(), some_network, 6, shape, vocab_size=7)
    psi = PsiScheduler(mode="constant", kappa=1.0, top_p=1.0)
    assert torch.equal(sample(psi, some_network, 6, shape, vocab_size=7), duo)
    other = PsiScheduler(mode="constant", kappa=0.2, top_p=1.0, high_share=0.0, middle_share=1.0)
    assert not torch.equal(sample(other, some_network, 6, shape, vocab_size=7), duo)


@pytest.mark.parametrize("scheduler_class", [*DISCRETE, *NEEDS_VOCABULARY])
def test_a_text_with_its_own_generator_is_the_same_in_any_batch(scheduler_class: type[TokenScheduler]) -> None:
    def network(**inputs: torch.Tensor) -> torch.Tensor:
        state = inputs["input_ids"] if "input_ids" in inputs else inputs["weights"]
        return fake_logits(state, K)

    def texts(seeds: list[int]) -> torch.Tensor:
        generators = [seeded(seed) for seed in seeds]
        return sample(build(scheduler_class), network, 5, (len(seeds), 6), generators)

    together = texts([4, 5, 6])
    assert torch.equal(together[1:2], texts([5]))


def test_confidence_remasks_unsure_words_first() -> None:
    shares = confidence_shares(torch.tensor([[0.9, 0.1, torch.inf], [torch.inf] * 3]))
    assert shares[0, 1] > shares[0, 0] > 0 and shares[0, 2] == 0 and shares[1].tolist() == [0, 0, 0]
    assert float(shares[0].sum()) == pytest.approx(1)

    scheduler = ReMDMScheduler(strategy="confidence", top_p=1.0)
    scheduler.set_timesteps(4)
    state = torch.full((1, 4000), 2)
    sure = torch.tensor([0.0, 9.0]).expand(1, 4000, 2)
    first = scheduler.step(sure, 1.0, state, generator=seeded()).prev_sample
    drawn = first == 1
    assert torch.isinf(scheduler.confidences[first == 2]).all()
    assert torch.allclose(scheduler.confidences[drawn], torch.sigmoid(torch.tensor(9.0)).double())
    # the whole text shares one bound, so about one word of it goes
    second = scheduler.step(sure, scheduler.timesteps[1], first, generator=seeded(1)).prev_sample
    assert 0 <= int((drawn & (second == 2)).sum()) <= 6 and int((second == 2).sum()) < int((first == 2).sum())


def test_words_that_are_there_are_masked_as_often_as_eta_says() -> None:
    scheduler = ReMDMScheduler(eta=0.2, top_p=1.0)
    scheduler.set_timesteps(4)
    scheduler.set_timesteps(4)
    words = torch.zeros(1, 40_000, dtype=torch.long)
    stepped = scheduler.step(torch.zeros(1, 40_000, 5), scheduler.timesteps[1], words, generator=seeded()).prev_sample
    assert float((stepped == 5).double().mean()) == pytest.approx(0.2, abs=0.01)


def test_words_are_masked_in_the_loop_alone() -> None:
    scheduler = ReMDMScheduler(strategy="loop", eta=0.3)
    scheduler.set_timesteps(20)
    sigmas = [scheduler.remasking(index) for index in range(20)]
    times = [scheduler.grid[index : index + 2] for index in range(20)]
    # capped, since alpha is 0.9 there
    assert [sigma == pytest.approx(1 / 9) for sigma in sigmas] == [9 <= index < 18 for index in range(20)]
    assert all(pair == [0.1, 0.1] for pair, sigma in zip(times, sigmas, strict=True) if sigma)


@pytest.mark.parametrize("shares", [{}, {"high_share": 0.5, "middle_share": 0.5}, {"high_share": 0.0}])
def test_loops_of_any_number_of_steps(shares: dict[str, float]) -> None:
    for scheduler in (ReMDMScheduler(strategy="loop", **shares), PsiScheduler(mode="loop", **shares)):
        for count in range(1, 24):
            scheduler.set_timesteps(count)
            grid = torch.tensor(scheduler.grid)
            assert len(grid) == count + 1 and (grid.diff() <= 0).all()


@pytest.mark.parametrize("final", ["argmax", "ancestral"])
def test_no_mask_is_left(final: str) -> None:
    words = sample(MDLMScheduler(final=final), some_network, 1, (2, 50), vocab_size=7)
    assert (words < 7).all()


# ---------------------------------------------------------------------------------------------- reference numbers

PSI_MODES = {
    "max-capped-0.01": {"mode": "cap", "eta": 0.01},
    "max-rescale-0.05": {"mode": "rescale", "eta": 0.05},
    "constant-remdm-0.01": {"mode": "loop", "eta": 0.01, "high_share": 0.45, "middle_share": 0.5},
    "constant-0.95": {"mode": "constant", "kappa": 0.95, "high_share": 0.5, "middle_share": 0.4},
}


@pytest.mark.parametrize("entry", REFERENCE["psi"]["kappa"], ids=lambda entry: entry["middle"])
def test_psi_grids(entry: dict[str, Any]) -> None:
    scheduler = PsiScheduler(**PSI_MODES[entry["middle"]])
    scheduler.set_timesteps(entry["steps"])
    assert scheduler.grid == pytest.approx(entry["times"], rel=1e-9)
    # the last entry belongs to no step
    found = [scheduler.kappa(index) for index in range(entry["steps"])]
    assert found == pytest.approx(entry["kappas"][:-1], rel=1e-8)


def test_the_definition_of_rescale_renoises_more() -> None:
    def renoisings(**settings: bool) -> float:
        scheduler = PsiScheduler(**settings)
        scheduler.set_timesteps(256)
        alphas = [scheduler.alpha(t) for t in scheduler.grid]
        return sum((1 - scheduler.kappa(i)) * (1 - alphas[i + 1]) for i in range(256))

    assert renoisings() == pytest.approx(0.6, abs=0.05)
    assert renoisings(rescale_as_coded=False) == pytest.approx(9, abs=0.5)


@pytest.mark.parametrize(
    ("name", "entry"), [(name, one) for name, some in REFERENCE["flm"]["euler"].items() for one in some]
)
def test_the_euler_sampler(name: str, entry: dict[str, Any]) -> None:
    case = Case(name)
    scheduler = FLMScheduler(vocab_size=case.vocab_size)
    scheduler.set_timesteps(entry["steps"])
    assert scheduler.flow_times == pytest.approx(entry["t_grid"], rel=1e-9)
    state = case.noise
    for index, t in enumerate(scheduler.timesteps):
        inputs = scheduler.model_inputs(state, t)
        logits = 30 * torch.tanh(fake_logits(inputs["weights"], case.vocab_size, c=inputs["timestep"]) / 30)
        state = scheduler.step(logits, t, state).prev_sample
        if index < len(entry["state_after_each_step"]):
            assert torch.allclose(state, tensor(entry["state_after_each_step"][index]), rtol=1e-8, atol=1e-11)
    assert scheduler.words(state).tolist() == entry["tokens"]


class ReferenceNoise(FMLMScheduler):
    """Draws the noise of the reference numbers."""

    def noise(self, shape: tuple[int, ...], generators: Generators, device: torch.device) -> torch.Tensor:
        return next(case.noise for case in map(Case, "AB") if case.noise.shape == shape)


@pytest.mark.parametrize(
    ("name", "entry"), [(name, one) for name, some in REFERENCE["fmlm"]["sampler"].items() for one in some]
)
def test_the_flow_map_sampler(name: str, entry: dict[str, Any]) -> None:
    case = Case(name)
    scheduler = ReferenceNoise(vocab_size=case.vocab_size, gamma=entry["gamma"])
    scheduler.set_timesteps(entry["steps"])
    state = case.noise
    for index, t in enumerate(scheduler.timesteps):
        inputs = scheduler.model_inputs(state, t)
        ends = [float(inputs["timestep"]), float(inputs["next_timestep"])]
        if "time_inputs" in entry:
            assert ends == pytest.approx(entry["time_inputs"][index], rel=1e-7, abs=1e-12)
        logits = 30 * torch.tanh(fake_logits(inputs["weights"], case.vocab_size, c=ends[0], c2=ends[1]) / 30)
        state = scheduler.step(logits, t, state).prev_sample
        if index < len(entry["state_after_each_step"]):
            assert torch.allclose(state, tensor(entry["state_after_each_step"][index]), rtol=1e-7, atol=1e-9)
    assert scheduler.words(state).tolist() == entry["tokens"]


def test_the_steps_of_candi() -> None:
    """What is revealed stays, the noisy embeddings move, and at the end most words are revealed."""
    embeddings = F.normalize(torch.randn(K, 2, generator=seeded()), dim=-1)
    for as_coded in (False, True):
        scheduler = CANDIScheduler(vocab_size=K, rank_max=0.2, as_coded=as_coded)
        scheduler.set_timesteps(10)
        state = scheduler.start(torch.zeros(1, 4000, dtype=torch.long), K, seeded(), embeddings)
        sigma = scheduler.sigma(0.999)
        covariance = state.embeddings[0].mT @ state.embeddings[0] / 4000
        assert torch.allclose(covariance, sigma**2 * embeddings.mT @ embeddings, atol=0.3)
        for index, t in enumerate(scheduler.timesteps):
            inputs = scheduler.model_inputs(state, t)
            assert float(inputs["timestep"]) == pytest.approx(-math.log(1 - scheduler.grid[index]))
            seen = scheduler.sigma(scheduler.grid[index + as_coded])
            assert torch.allclose(inputs["inputs_embeds"] * math.sqrt(1 + seen**2), state.embeddings, atol=1e-5)
            logits = torch.tensor([0.0, 1.0, 2.0]).expand(1, 4000, K)
            before, state = state, scheduler.step(logits, t, state, seeded(index), embeddings=embeddings).prev_sample
            assert torch.equal(state.words[before.revealed], before.words[before.revealed])
            assert (state.revealed | ~before.revealed).all()
            newly = (state.revealed & ~before.revealed).sum() / (~before.revealed).sum()
            if index < 8:
                step = 0.09999 if as_coded else scheduler.grid[index] - scheduler.grid[index + 1]
                assert float(newly) == pytest.approx(step / scheduler.grid[index], abs=0.06)
        assert float(state.revealed.double().mean()) > 0.99


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("scheduler_class", [*DISCRETE, *NEEDS_VOCABULARY])
def test_settings_are_saved(scheduler_class: type[TokenScheduler], tmp_path: Path) -> None:
    scheduler = build(scheduler_class, temperature=0.7)
    scheduler.save_pretrained(tmp_path)
    loaded = scheduler_class.from_pretrained(tmp_path)
    assert loaded.config.temperature == 0.7
    loaded.set_timesteps(4)
    extra = scheduler_class in DISCRETE
    assert len(loaded.timesteps) == len(loaded) == 4 + extra
    assert loaded.timesteps.dtype == torch.float64


@pytest.mark.parametrize(
    ("scheduler_class", "settings", "match"),
    [
        (MDLMScheduler, {"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        (DuoScheduler, {"temperature": -0.5}, r"temperature=-0.5 must lie in \[0, inf\)"),
        (MDLMScheduler, {"final": "greedy"}, "final='greedy' must be one of argmax, ancestral"),
        (ReMDMScheduler, {"strategy": "loops"}, "strategy='loops' must be one of"),
        (ReMDMScheduler, {"eta": 1.5}, r"eta=1.5 must lie in \[0, 1\]"),
        (ReMDMScheduler, {"high_share": 0.6, "middle_share": 0.5}, r"middle_share=0.5 must lie in \[0, 0.4\]"),
        (PsiScheduler, {"kappa": 2.0}, r"kappa=2.0 must lie in \[0, 1\]"),
        (CANDIScheduler, {"rank_max": 0.4}, "rank_max < 0.3333"),
        (FLMScheduler, {"temperature": 0.0}, r"temperature=0.0 must lie in \(0, inf\)"),
        (FMLMScheduler, {"gamma": 1.1}, r"gamma=1.1 must lie in \[0, 1\]"),
    ],
)
def test_settings_that_are_refused(scheduler_class: Any, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(scheduler_class, **settings)


def test_steps_that_are_refused() -> None:
    scheduler, state = MDLMScheduler(), torch.full((2, 4), 5)
    logits = torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(logits, 1.0, state)
    for count in (0, 2.5, "8"):
        with pytest.raises(ValueError, match=f"num_inference_steps={count!r} must be an integer of at least 1"):
            scheduler.set_timesteps(count)
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="timestep=0.3 is not one of the 2 times"):
        scheduler.step(logits, 0.3, state)
    with pytest.raises(ValueError, match="a list of 3 for 2 texts"):
        scheduler.step(logits, 1.0, state, generator=[seeded()] * 3)
    for t in scheduler.timesteps:
        (state,) = scheduler.step(logits, t, state, return_dict=False)
    with pytest.raises(ValueError, match="All steps of the grid are taken"):
        scheduler.step(logits, 1e-5, state)
    with pytest.raises(ValueError, match="DuoScheduler writes whole texts"):
        DuoScheduler().give(state, state, state > 0)


@pytest.mark.parametrize("scheduler_class", [*DISCRETE, *NEEDS_VOCABULARY])
def test_steps_begin_where_they_are_told(scheduler_class: type[TokenScheduler]) -> None:
    def stepped(begin_index: int | None, place: int) -> Any:
        scheduler = build(scheduler_class)
        scheduler.set_timesteps(6)
        assert scheduler.begin_index is None
        embeddings = torch.randn(K, 4, generator=seeded(2))
        state = scheduler.start(torch.zeros(1, 50, dtype=torch.long), K, seeded(), embeddings)
        if begin_index is not None:
            scheduler.set_begin_index(begin_index)
        t = scheduler.timesteps[place]
        logits = fake_logits(torch.zeros(1, 50, dtype=torch.long), K)
        state = scheduler.step(logits, t, state, generator=seeded(1), embeddings=embeddings).prev_sample
        assert scheduler.step_index == (place if begin_index is None else begin_index) + 1
        return torch.cat([part.flatten().double() for part in state]) if isinstance(state, tuple) else state

    assert torch.equal(stepped(3, 3), stepped(None, 3))
    assert torch.equal(stepped(3, 1), stepped(None, 3))


def test_the_network_is_told_the_time_exactly() -> None:
    scheduler = DuoScheduler()
    scheduler.set_timesteps(1000)
    told = torch.stack([scheduler.model_inputs(torch.zeros(1, 1), t)["timestep"] for t in scheduler.timesteps])
    assert torch.allclose(torch.exp(-told), log_linear_alpha(torch.tensor(scheduler.grid, dtype=torch.float64)))
    assert told.dtype == torch.float64
