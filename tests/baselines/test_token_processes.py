"""The noise, losses and transitions of token-level diffusion: reference numbers, identities, and exact enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import REFERENCE, Case, fake_logits, steps, tensor

from ldlm_hf.baselines.candi import noise_level, noisy_embeddings, probability_flow_step
from ldlm_hf.baselines.categorical import (
    by_slices,
    cross_entropy,
    draw,
    nucleus,
    row_generators,
    uniform_like,
    word_probabilities,
)
from ldlm_hf.baselines.flow_language_model import (
    distillation_steps,
    first_half_share,
    flow_map_jump,
    soft_cross_entropy,
)
from ldlm_hf.baselines.masked import mask_words, masked_loss, remasking_bound, unmasking_probability
from ldlm_hf.baselines.noise_schedule import log_linear_alpha, stratified_times, training_times
from ldlm_hf.baselines.one_hot_noise import argmax_signal, argmax_signal_slope, embedded_noise, unwarp_time, warp_time
from ldlm_hf.baselines.uniform import (
    argmax_alpha,
    argmax_words,
    gaussian_words,
    kl_divergence,
    log_noise_ratio,
    replace_words,
    transition_weights,
    uniform_loss,
)


CASES = ("A", "B")
GPT2 = 50_257


def close(found: torch.Tensor, expected: Any, rtol: float = 1e-8) -> bool:
    # numbers of the file have twelve digits
    return torch.allclose(found.double(), tensor(expected), rtol=rtol, atol=1e-12)


def entries(method: str, part: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, one) for name, some in REFERENCE[method][part].items() for one in some]


def one_row(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed)]


# ---------------------------------------------------------------------------------------------- schedules


def test_schedule_and_times() -> None:
    schedule = REFERENCE["mdlm"]["schedule"]
    times = tensor(schedule["t"])
    assert close(log_linear_alpha(times), schedule["alpha"])
    assert close(-torch.log(log_linear_alpha(times)), schedule["sigma"])
    ones = torch.ones(len(times), 1, dtype=torch.float64)
    assert close(masked_loss(ones, ones > 0, times)[:, 0], schedule["loss_weight"])
    antithetic = REFERENCE["mdlm"]["antithetic"]
    uniforms = tensor(antithetic["uniforms"])
    assert close(training_times(stratified_times(uniforms, 0, 4)), antithetic["t"])
    # a slice of the batch gets its own rows
    assert torch.equal(stratified_times(uniforms[2:], 2, 4), stratified_times(uniforms, 0, 4)[2:])


# ---------------------------------------------------------------------------------------------- masked


def masked_rows(
    logits: torch.Tensor, z: torch.Tensor, alphas: tuple[float, float], sigma: float, **top_p: Any
) -> torch.Tensor:
    """p(z_s | z_t) over K + 1 ids, of the two probabilities that a sampler uses."""
    words = word_probabilities(logits, **top_p)
    vocab_size = words.shape[-1]
    unmasking = unmasking_probability(*alphas, sigma)
    of_mask = torch.cat([unmasking * words, torch.full_like(words[..., :1], 1 - unmasking)], dim=-1)
    of_word = (1 - sigma) * F.one_hot(z, vocab_size + 1).double()
    of_word[..., -1] += sigma
    return torch.where((z == vocab_size)[..., None], of_mask, of_word)


@pytest.mark.parametrize("name", CASES)
def test_masked_loss(name: str) -> None:
    case, expected = Case(name), REFERENCE["mdlm"]["loss"][name]
    logits = fake_logits(case.z_masked, case.vocab_size)
    losses = masked_loss(cross_entropy(logits, case.x), case.z_masked == case.vocab_size, tensor(expected["t"]))
    assert close(losses.mean(1), expected["loss_per_example"])
    if name == "A":
        assert close(losses, expected["nll_per_token"])


@pytest.mark.parametrize(("name", "entry"), entries("mdlm", "posterior"))
def test_masked_posterior(name: str, entry: dict[str, Any]) -> None:
    z, vocab_size = tensor(entry["z"]), Case(name).vocab_size
    alphas = tuple(float(log_linear_alpha(torch.tensor(entry[time], dtype=torch.float64))) for time in "ts")
    rows = masked_rows(fake_logits(z, vocab_size), z, alphas, 0.0)
    assert close(rows, entry["probabilities"])
    assert unmasking_probability(*alphas, 0.0) == pytest.approx((entry["t"] - entry["s"]) / entry["t"])


@pytest.mark.parametrize(("name", "entry"), entries("remdm", "transition"))
def test_remasking_transition(name: str, entry: dict[str, Any]) -> None:
    z, vocab_size = tensor(entry["z"]), Case(name).vocab_size
    alphas = (entry["alpha_t"], entry["alpha_s"])
    sigma = entry["eta"] * remasking_bound(*alphas)
    assert sigma == pytest.approx(entry["sigma"])
    rows = masked_rows(fake_logits(z, vocab_size), z, alphas, sigma, top_p=entry["top_p"], keep_crossing=False)
    assert close(rows, entry["probabilities"])


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.25])
def test_masked_transitions_keep_the_marginals(sigma: float) -> None:
    """sum over z_t of p(z_s | z_t) q(z_t | x) is q(z_s | x), with the right words predicted."""
    alpha_t, alpha_s, vocab_size, x = 0.4, 0.7, 3, 1
    assert sigma <= remasking_bound(alpha_t, alpha_s)
    z = torch.arange(vocab_size + 1)
    rows = masked_rows(
        100 * F.one_hot(torch.tensor(x), vocab_size).double().expand(4, -1), z, (alpha_t, alpha_s), sigma
    )
    assert torch.allclose(rows.sum(-1), torch.ones(4, dtype=torch.float64))
    start, end = torch.zeros(2, 4, dtype=torch.float64)
    start[x], start[-1], end[x], end[-1] = alpha_t, 1 - alpha_t, alpha_s, 1 - alpha_s
    assert torch.allclose(start @ rows, end)


def test_masks_are_as_frequent_as_the_schedule_says() -> None:
    alpha = torch.tensor([0.3, 0.9])
    z = mask_words(torch.zeros(2, 20_000, dtype=torch.long), alpha, 7, one_row() * 2)
    assert torch.allclose((z == 0).double().mean(1), alpha.double(), atol=0.015)
    assert set(z.unique().tolist()) == {0, 7}


def test_a_network_at_its_start_has_the_entropy_of_the_vocabulary() -> None:
    times = training_times(stratified_times(torch.rand(4000, generator=one_row()[0]), 0, 4000))
    x = torch.zeros(4000, 8, dtype=torch.long)
    z = mask_words(x, log_linear_alpha(times), 5, row_generators(one_row(1)[0], 4000))
    losses = masked_loss(cross_entropy(torch.zeros(4000, 8, 5), x), z == 5, times)
    assert float(losses.mean()) == pytest.approx(math.log(5), rel=0.02)


# ---------------------------------------------------------------------------------------------- uniform


def uniform_rows(p: torch.Tensor, z: torch.Tensor, alphas: tuple[float, float], kappa: float = 1.0) -> torch.Tensor:
    """p(z_s | z_t) over K ids, of the three weights that a sampler uses."""
    vocab_size = p.shape[-1]
    weights = transition_weights(p.gather(-1, z[..., None]), *alphas, vocab_size, kappa)
    return weights[0] * F.one_hot(z, vocab_size) + weights[1] * p + weights[2] / vocab_size


def literal_uniform_loss(
    p: torch.Tensor, i: torch.Tensor, o: torch.Tensor, alpha: torch.Tensor, slope: torch.Tensor
) -> torch.Tensor:
    """The sum over the vocabulary as Duo's paper writes it, (n,)."""
    vocab_size = p.shape[-1]
    alpha, slope = alpha[:, None], slope[:, None]
    right = vocab_size * alpha * F.one_hot(o, vocab_size) + 1 - alpha
    predicted = vocab_size * alpha * p + 1 - alpha
    right_i, predicted_i = right.gather(-1, i[:, None]), predicted.gather(-1, i[:, None])
    logs = torch.log(predicted_i * right / (predicted * right_i))
    terms = vocab_size / right_i - vocab_size / predicted_i - (right / right_i * logs).sum(-1, keepdim=True)
    return (slope / (vocab_size * alpha) * terms)[:, 0]


def test_uniform_loss() -> None:
    case, expected = Case("A"), REFERENCE["duo"]["loss"]["A"]
    alpha = log_linear_alpha(tensor(expected["t"]))
    logits = fake_logits(case.z_uniform, case.vocab_size, c=-torch.log(alpha))
    shape = case.x.shape
    losses = by_slices(
        uniform_loss,
        logits,
        case.z_uniform,
        case.x,
        alpha[:, None].expand(shape),
        tensor(expected["dalpha"])[:, None].expand(shape),
        size=3,
    )
    assert close(losses, expected["nll_per_token"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_loss_is_its_literal_sum(dtype: torch.dtype) -> None:
    generator = one_row()[0]
    logits = 3 * torch.randn(200, 50, generator=generator, dtype=torch.float64)
    i, o = torch.randint(50, (2, 200), generator=generator)
    i[:50] = o[:50]
    alpha = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    slope = torch.full_like(alpha, -0.999)
    expected = literal_uniform_loss(logits.softmax(-1), i, o, alpha, slope)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    assert torch.allclose(uniform_loss(logits.to(dtype), i, o, alpha, slope).double(), expected, rtol=rtol)
    assert (expected > 0).all()


@pytest.mark.parametrize(("name", "entry"), entries("duo", "posterior"))
def test_uniform_posterior(name: str, entry: dict[str, Any]) -> None:
    z, vocab_size = tensor(entry["z"]), Case(name).vocab_size
    logits = fake_logits(z, vocab_size, c=-math.log(entry["alpha_t"]))
    p = word_probabilities(logits, top_p=entry["top_p"])
    assert close(uniform_rows(p, z, (entry["alpha_t"], entry["alpha_s"])), entry["probabilities"])


@pytest.mark.parametrize(("name", "entry"), entries("psi", "transition"))
def test_psi_transition(name: str, entry: dict[str, Any]) -> None:
    """Of masks, it is ReMDM with sigma = (1 - kappa) (1 - alpha_s)."""
    z, vocab_size, kappa = tensor(entry["z"]), Case(name).vocab_size, entry["kappa"]
    alphas = (entry["alpha_t"], entry["alpha_s"])
    if entry["family"] == "masked":
        sigma = (1 - kappa) * (1 - alphas[1])
        rows = masked_rows(fake_logits(z, vocab_size), z, alphas, sigma, top_p=entry["top_p"])
    else:
        logits = fake_logits(z, vocab_size, c=-math.log(alphas[0]))
        rows = uniform_rows(word_probabilities(logits, top_p=entry["top_p"]), z, alphas, kappa)
    assert close(rows, entry["probabilities"])


@pytest.mark.parametrize("kappa", [0.0, 0.6, 1.0])
def test_uniform_transitions_keep_the_marginals(kappa: float) -> None:
    alpha_t, alpha_s, vocab_size, x = 0.4, 0.7, 4, 1
    z = torch.arange(vocab_size)
    p = F.one_hot(torch.tensor(x), vocab_size).double().expand(vocab_size, -1)
    rows = uniform_rows(p, z, (alpha_t, alpha_s), kappa)
    assert torch.allclose(rows.sum(-1), torch.ones(vocab_size, dtype=torch.float64))
    at_t, at_s = (alpha * p[0] + (1 - alpha) / vocab_size for alpha in (alpha_t, alpha_s))
    assert torch.allclose(at_t @ rows, at_s)


def test_replaced_words_have_their_law() -> None:
    z = replace_words(torch.full((1, 50_000), 2), torch.tensor([0.4]), 5, one_row())
    shares = z[0].bincount(minlength=5) / 50_000
    assert torch.allclose(shares, torch.tensor([0.12, 0.12, 0.52, 0.12, 0.12]), atol=0.01)


# ---------------------------------------------------------------------------------------------- Gaussian argmax


@pytest.mark.parametrize("vocab_size", [5, GPT2])
def test_the_law_of_the_argmax(vocab_size: int) -> None:
    expected = REFERENCE["duo"]["gaussian_to_discrete"]
    alpha, slope = argmax_alpha(tensor(expected["gamma"]), vocab_size)
    assert close(alpha, expected["alpha"][str(vocab_size)])
    assert close(slope, expected["dalpha_dgamma"][str(vocab_size)])
    mu = torch.linspace(0, 6, 25, dtype=torch.float64)
    differences = (argmax_signal(mu + 1e-5, vocab_size) - argmax_signal(mu - 1e-5, vocab_size)) / 2e-5
    assert torch.allclose(argmax_signal_slope(mu, vocab_size), differences, rtol=1e-5, atol=1e-9)
    ends = argmax_signal(torch.tensor([0.0, 40.0]), vocab_size)
    assert torch.allclose(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize("vocab_size", [5, 40, GPT2])
def test_the_time_warp_and_its_inverse(vocab_size: int) -> None:
    tau = torch.cat([steps(1001) / 1000, tensor([1e-9, 1e-6, 1 - 1e-6])])
    t = warp_time(tau, vocab_size)
    assert float((unwarp_time(t, vocab_size) - tau).abs().max()) < 1e-9
    assert t[0] == 0 and t[1000] == 1 and (t[1:1001] > t[:1000]).all()
    if str(vocab_size) in REFERENCE["flm"]["time_warp"]:
        expected = REFERENCE["flm"]["time_warp"][str(vocab_size)]
        assert close(warp_time(tensor(expected["tau"]), vocab_size), expected["g_exact"])
        assert close(unwarp_time(tensor(expected["t"]), vocab_size), expected["inverse_exact"])


def test_the_argmax_of_the_flow_is_right_as_often_as_tau_says() -> None:
    vocab_size, tau = 6, 0.4
    t = float(warp_time(torch.tensor(tau), vocab_size))
    x = (1 - t) * torch.randn(40_000, vocab_size, generator=one_row()[0])
    x[:, 2] += t
    share = float((x.argmax(-1) == 2).double().mean())
    assert share == pytest.approx(tau + (1 - tau) / vocab_size, abs=0.01)


@pytest.mark.parametrize("vocab_size", [5, 60])
def test_the_curriculum_has_the_law_of_uniform_noise(vocab_size: int) -> None:
    x = torch.full((2, 20_000), 3)
    gamma = torch.tensor([-1.0, 0.5])
    z, ids, weights = gaussian_words(x, gamma, vocab_size, 1e-3, [*one_row(1), *one_row(2)])
    alpha, _ = argmax_alpha(gamma, vocab_size)
    for row, level in zip(z, alpha.tolist(), strict=True):
        shares = row.bincount(minlength=vocab_size).double() / len(row)
        expected = torch.full((vocab_size,), (1 - level) / vocab_size, dtype=torch.float64)
        expected[3] += level
        statistic = float(((shares - expected).square() / expected).sum() * len(row))
        assert statistic < vocab_size - 1 + 5 * math.sqrt(2 * (vocab_size - 1))
    # the words of a position are distinct, and the likeliest of them is z
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert torch.equal(ids.gather(-1, weights.argmax(-1, keepdim=True))[..., 0], z)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_the_curriculum_draws_the_largest_entries_of_a_gaussian() -> None:
    """With all K entries, against draws of all of them: the mean of softmax weights, sorted."""
    x, vocab_size, gamma = torch.zeros(1, 30_000, dtype=torch.long), 4, torch.tensor([0.0])
    _, ids, weights = gaussian_words(x, gamma, vocab_size, 0.5, one_row())
    noise = torch.randn(30_000, vocab_size, generator=one_row(1)[0], dtype=torch.float64)
    w = math.sqrt(0.5) * (noise + F.one_hot(torch.zeros(30_000, dtype=torch.long), vocab_size))
    expected = (w / 0.5).softmax(-1)
    assert torch.allclose(weights[0, :, 0].mean(), expected[:, 0].mean(), atol=0.01)
    falling = [some.sort(-1, descending=True).values.mean(0) for some in (weights[0], expected)]
    assert torch.allclose(*falling, atol=0.01)
    assert ids.shape == (1, 30_000, vocab_size)


@pytest.mark.parametrize(("name", "entry"), entries("duo", "curriculum_loss"))
def test_the_curriculum_loss(name: str, entry: dict[str, Any]) -> None:
    case, times = Case(name), tensor(entry["t"])
    gamma = log_noise_ratio(times, entry["gamma_min"], entry["gamma_max"])
    alpha, slope = argmax_alpha(gamma, case.vocab_size)
    slope = slope * (entry["gamma_max"] - entry["gamma_min"])
    assert close(alpha, entry["alpha"]) and close(slope, entry["dalpha_dt"])
    signal, noise = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    w = signal[:, None, None] * F.one_hot(case.x, case.vocab_size) + noise[:, None, None] * case.noise
    assert torch.equal(w.argmax(-1), tensor(entry["z"]))
    logits = fake_logits((w / entry["tau"]).softmax(-1), case.vocab_size, c=-torch.log(alpha))
    rows = [value[:, None].expand(case.x.shape) for value in (alpha, slope)]
    losses = by_slices(uniform_loss, logits, w.argmax(-1), case.x, *rows)
    assert close(losses, entry["nll_per_token"], rtol=1e-7)


@pytest.mark.parametrize(("name", "entry"), entries("duo", "distillation"))
def test_consistency_distillation(name: str, entry: dict[str, Any]) -> None:
    """Both noisy texts are the argmax of the same noise, of which only the largest of the others counts."""
    case = Case(name)
    ends = (tensor(entry["t_drawn"]) + entry["dt"]).clamp(0, 1)
    gammas = [log_noise_ratio(t, entry["gamma_min"], entry["gamma_max"]) for t in (ends, ends - entry["dt"])]
    right = case.noise.gather(-1, case.x[..., None])[..., 0]
    largest, others = case.noise.scatter(-1, case.x[..., None], -math.inf).max(-1)
    z = [argmax_words(case.x, others, right, largest, gamma) for gamma in gammas]
    c = [-torch.log(argmax_alpha(gamma, case.vocab_size)[0]) for gamma in gammas]
    assert z[0].tolist() == entry["z_t"] and z[1].tolist() == entry["z_s"]
    assert close(c[0], entry["student_time_input"]) and close(c[1], entry["teacher_time_input"])
    student, teacher = (fake_logits(ids, case.vocab_size, c=time) for ids, time in zip(z, c, strict=True))
    # KL(student || teacher) is Duo's; the other one is there for comparison
    pair = (student, teacher) if entry["kind"] == "kl-bwd" else (teacher, student)
    # differences of logarithms near 1 have lost digits
    assert torch.allclose(by_slices(kl_divergence, *pair), tensor(entry["loss_per_token"]), rtol=1e-5, atol=1e-15)


def test_the_largest_noise_alone_makes_the_same_argmax() -> None:
    noise = torch.randn(1, 500, 6, generator=one_row()[0], dtype=torch.float64)
    x = torch.randint(6, (1, 500), generator=one_row(1)[0])
    for gamma in (-2.0, 0.0, 1.0):
        w = math.exp(-gamma / 2) * F.one_hot(x, 6) + noise
        largest, others = noise.scatter(-1, x[..., None], -math.inf).max(-1)
        right = noise.gather(-1, x[..., None])[..., 0]
        assert torch.equal(argmax_words(x, others, right, largest, torch.tensor([gamma])), w.argmax(-1))


# ---------------------------------------------------------------------------------------------- CANDI


@pytest.mark.parametrize("vocab_size", [5, GPT2])
def test_candi_noise_levels(vocab_size: int) -> None:
    expected = REFERENCE["candi"]["sigma"][str(vocab_size)]["r_min 0.05 r_max 0.25"]
    found = noise_level(tensor(expected["t"]), 0.05, 0.25, vocab_size)
    assert close(found, expected["sigma_with_K_over_K_minus_1"])


def test_candi_noise_puts_the_share_of_words_above_the_right_one() -> None:
    vocab_size, time = 200, torch.tensor(0.7, dtype=torch.float64)
    sigma = float(noise_level(time, 0.05, 0.25, vocab_size))
    rank = 0.05 + 0.2 * (1 - float(log_linear_alpha(time)))
    y = sigma * torch.randn(4000, vocab_size, generator=one_row()[0])
    y[:, 0] += 1
    share = float((y[:, 1:] > y[:, :1]).double().mean())
    assert share == pytest.approx(rank * vocab_size / (vocab_size - 1), abs=0.005)


def test_candi_loss() -> None:
    case, expected = Case("A"), REFERENCE["candi"]["loss"]["A"]
    hidden, sigma = tensor(expected["hidden"]).bool(), tensor(expected["sigma"])
    times = tensor(expected["t"])
    alpha = log_linear_alpha(times)
    y = F.one_hot(case.x, case.vocab_size) + (hidden * sigma[:, None])[..., None] * case.noise
    logits = fake_logits(y, case.vocab_size, c=-torch.log(alpha), c2=sigma)
    losses = masked_loss(cross_entropy(logits, case.x), hidden, times)
    assert close(noise_level(times, 0.05, 0.25, case.vocab_size), expected["sigma"])
    assert close(losses, expected["nll_per_token"])


@pytest.mark.parametrize(("name", "entry"), entries("candi", "step"))
@pytest.mark.parametrize("as_coded", [True, False])
def test_candi_step(name: str, entry: dict[str, Any], as_coded: bool) -> None:
    case = Case(name)
    words = torch.sin(steps(case.vocab_size)[:, None] + 2 * steps(3) + 1)
    b, length = case.x.shape
    hidden_states = 0.8 * torch.sin(1.1 * steps(b)[:, None, None] + 0.6 * steps(length)[:, None] + 1.9 * steps(3))
    chosen = tensor(entry["x0_argmax" if as_coded else "x0_argmax_ode"])
    moved = probability_flow_step(hidden_states, words[chosen], entry["sigma_at_t"], entry["sigma_at_s"], as_coded)
    key = "new_embedding_as_coded" if as_coded else "new_embedding_probability_flow"
    # of words that are revealed, the embedding is never read again
    hidden = case.z_masked == case.vocab_size
    assert close(moved[hidden], tensor(entry[key])[hidden].tolist())


def test_noise_of_embeddings_has_the_law_of_embedded_noise() -> None:
    embeddings = F.normalize(torch.randn(30, 4, generator=one_row()[0], dtype=torch.float64), dim=-1)
    noise = torch.randn(1, 60_000, 4, generator=one_row(1)[0], dtype=torch.float64)
    found = embedded_noise(noise, embeddings)[0]
    assert torch.allclose(found.mT @ found / 60_000, embeddings.mT @ embeddings, atol=0.15)
    clean = embeddings[torch.zeros(1, 3, dtype=torch.long)]
    assert torch.allclose(noisy_embeddings(clean, torch.zeros(1, 3, 4).double(), 2.0, embeddings), clean / 5**0.5)


# ---------------------------------------------------------------------------------------------- FLM


@pytest.mark.parametrize("cap", [None, 30.0])
def test_flow_loss(cap: float | None) -> None:
    case, expected = Case("A"), REFERENCE["flm"]["loss"]["A"]
    tau = tensor(expected["tau"])
    t = warp_time(tau, case.vocab_size)[:, None, None]
    x_t = (1 - t) * case.noise + t * F.one_hot(case.x, case.vocab_size)
    logits = fake_logits(x_t, case.vocab_size, c=tau)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    key = "without_logit_cap" if cap is None else "with_logit_cap_30"
    assert close(cross_entropy(logits, case.x), expected[key]["ce_per_token"])


def test_jumps_of_a_flow_map_compose() -> None:
    """The jump's parts weigh as the distillation target weighs them: lambda = (1 - t) (u - s) / ((1 - u) (t - s))."""
    s, u, t = 0.2, 0.5, 0.8
    z, first, second = torch.randn(3, 4, generator=one_row()[0], dtype=torch.float64)
    halves = flow_map_jump(flow_map_jump(z, first, s, u), second, u, t)
    share = first_half_share(*torch.tensor([s, u, t], dtype=torch.float64))
    assert torch.allclose(halves, flow_map_jump(z, share * first + (1 - share) * second, s, t))


@pytest.mark.parametrize("part", ["off_diagonal", "boundary_0_to_1", "diagonal"])
def test_distillation_loss(part: str) -> None:
    case, expected = Case("A"), REFERENCE["fmlm"]["loss"]["A"]
    ends = {
        "off_diagonal": (expected["tau_s"], expected["tau_t"]),
        "boundary_0_to_1": ([0.0, 0.0], [1.0, 1.0]),
        "diagonal": (expected["diagonal_tau"], expected["diagonal_tau"]),
    }
    tau_s, tau_t = (tensor(values) for values in ends[part])
    tau_u = (tau_s + tau_t) / 2
    s, u, t = (warp_time(tau, case.vocab_size)[:, None, None] for tau in (tau_s, tau_u, tau_t))
    x_s = (1 - s) * case.noise + s * F.one_hot(case.x, case.vocab_size)

    def network(x: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh(fake_logits(x, case.vocab_size, c=start, c2=end) / 30)

    logits = network(x_s, tau_s, tau_t)
    if part == "diagonal":
        losses = cross_entropy(logits, case.x)
    else:
        first = network(x_s, tau_s, tau_u)
        second = network(flow_map_jump(x_s, first.softmax(-1), s, u), tau_u, tau_t)
        share = first_half_share(s, u, t)[..., 0].expand(case.x.shape)
        losses = by_slices(soft_cross_entropy, logits, first, second, share)
    assert close(losses, expected[f"{part}_ce_per_token"], rtol=1e-6)


def test_steps_that_are_distilled() -> None:
    """Half of the rows have no length, the others any within [0, 1], and some are the whole way."""
    count = 6400
    uniforms, places = torch.rand(2, count, generator=one_row()[0], dtype=torch.float64)
    starts, ends = distillation_steps(torch.arange(count), count, uniforms, places)
    diagonal = starts == ends
    assert int(diagonal.sum()) == count // 2 and (starts >= 0).all() and (ends <= 1).all()
    # one in each of as many parts
    assert torch.equal((starts[diagonal] * count / 2).long(), torch.arange(count // 2))
    whole = (starts == 0) & (ends == 1)
    assert int(whole.sum()) == count // 2 // 32
    lengths = (ends - starts)[~diagonal & ~whole]
    assert float(lengths.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(ends[~diagonal & ~whole].mean()) == pytest.approx(0.75, abs=0.02)
    part = slice(100, 200)
    some = distillation_steps(torch.arange(100, 200), count, uniforms[part], places[part])
    assert torch.equal(some[0], starts[part]) and torch.equal(some[1], ends[part])


# ---------------------------------------------------------------------------------------------- an exact oracle

K, L = 3, 2


@pytest.fixture
def joint() -> torch.Tensor:
    """P(x_1, x_2), (K, K)."""
    weights = torch.rand(K, K, generator=one_row()[0], dtype=torch.float64) ** 2
    return weights / weights.sum()


def time_weights(points: int = 4000, first: float = 1e-7) -> tuple[torch.Tensor, torch.Tensor]:
    """Times on a logarithmic grid and their weights by the trapezoidal rule."""
    times = torch.logspace(math.log10(first), 0, points, dtype=torch.float64)
    gaps = times.diff()
    weights = torch.zeros_like(times)
    weights[:-1] += gaps / 2
    weights[1:] += gaps / 2
    return times, weights


def integrated(
    joint: torch.Tensor,
    x: tuple[int, ...],
    num_states: int,
    likelihoods: Callable[[torch.Tensor], torch.Tensor],
    losses: Callable[[torch.Tensor, tuple[int, ...], torch.Tensor, torch.Tensor], torch.Tensor],
) -> float:
    """The integral over t of the expected loss of x, over all noisy texts."""
    times, weights = time_weights()
    levels = likelihoods(times)  # q(z | x) of one position, (T, K, states)
    total = torch.zeros_like(times)
    for z in itertools.product(range(num_states), repeat=L):
        probability = levels[:, x[0], z[0]] * levels[:, x[1], z[1]]
        total += probability * losses(times, z, levels, torch.tensor(x))
    return float((total * weights).sum())


@pytest.mark.parametrize("x", [(0, 0), (0, 2), (2, 1)])
def test_mdlm_bound_is_tight_with_the_posterior(joint: torch.Tensor, x: tuple[int, ...]) -> None:
    def likelihoods(times: torch.Tensor) -> torch.Tensor:
        alpha = log_linear_alpha(times)[:, None, None]
        return torch.cat([alpha * torch.eye(K), (1 - alpha).expand(-1, K, 1)], dim=-1)

    def losses(times: torch.Tensor, z: tuple[int, ...], levels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        posterior = torch.einsum("ab,ta,tb->tab", joint, levels[:, :, z[0]], levels[:, :, z[1]])
        marginals = torch.stack([posterior.sum(2), posterior.sum(1)], dim=1).clamp(min=1e-300)  # (T, L, K)
        is_masked = (torch.tensor(z) == K).expand(len(times), L)
        return masked_loss(cross_entropy(marginals.log(), x.expand(len(times), L)), is_masked, times).sum(1)

    found = integrated(joint, x, K + 1, likelihoods, losses)
    expected = -math.log(joint[x])
    assert found == pytest.approx(expected, rel=2.5e-3) and found <= expected


@pytest.mark.parametrize("x", [(0, 0), (2, 1)])
def test_duo_bound_is_tight_with_the_leave_one_out_posterior(joint: torch.Tensor, x: tuple[int, ...]) -> None:
    e = 1e-3

    def likelihoods(times: torch.Tensor) -> torch.Tensor:
        alpha = log_linear_alpha(times)[:, None, None]
        return alpha * torch.eye(K) + (1 - alpha) / K

    def losses(
        times: torch.Tensor, z: tuple[int, ...], levels: torch.Tensor, x: torch.Tensor, leave_out: bool = True
    ) -> torch.Tensor:
        first, second = levels[:, :, z[0]], levels[:, :, z[1]]  # (T, K)
        own = [torch.ones_like(first), torch.ones_like(second)] if leave_out else [first, second]
        of_first = (second @ joint.mT) * own[0]
        of_second = (first @ joint) * own[1]
        alpha = log_linear_alpha(times)
        slope = torch.full_like(alpha, -(1 - e))
        return sum(
            uniform_loss(p.log(), torch.full((len(times),), i), torch.full((len(times),), int(o)), alpha, slope)
            for p, i, o in zip((of_first, of_second), z, x, strict=True)
        )

    prior = L * ((e + (1 - e) / K) * math.log(1 + (K - 1) * e) + (1 - 1 / K) * (1 - e) * math.log(1 - e))
    expected = -math.log(joint[x])
    found = integrated(joint, x, K, likelihoods, losses)
    assert found + prior == pytest.approx(expected, abs=1e-4)

    def with_own_word(*arguments: Any) -> torch.Tensor:
        return losses(*arguments, leave_out=False)

    # the ordinary posterior is a bound, and far from tight
    assert integrated(joint, x, K, likelihoods, with_own_word) > 1.02 * expected


# ---------------------------------------------------------------------------------------------- draws and slices


def test_both_rules_of_the_nucleus() -> None:
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert torch.allclose(nucleus(p, 0.6), torch.tensor([0, 0.625, 0.375], dtype=torch.float64))
    assert torch.allclose(nucleus(p, 0.6, keep_crossing=False), torch.tensor([0.0, 1, 0], dtype=torch.float64))
    assert torch.allclose(nucleus(p, 0.01, keep_crossing=False), torch.tensor([0.0, 1, 0], dtype=torch.float64))
    assert nucleus(p, 1.0) is p
    # what adds up to exactly so much
    p = torch.tensor([0.125, 0.5, 0.375])
    for keep_crossing in (True, False):
        assert torch.allclose(nucleus(p, 0.875, keep_crossing), torch.tensor([0, 4 / 7, 3 / 7]))


@pytest.mark.parametrize("keep_crossing", [True, False])
@pytest.mark.parametrize("top_p", [1e-6, 0.2, 0.7, 0.95])
def test_the_nucleus_is_that_of_a_stable_sort(top_p: float, keep_crossing: bool) -> None:
    """Many words are as likely as others, as by logits in bfloat16."""
    p = torch.randint(-4, 4, (50, 30), generator=one_row()[0]).double().softmax(-1)
    ordered, places = p.sort(dim=-1, descending=True, stable=True)
    sums = ordered.cumsum(-1)
    is_cut = sums.roll(1, dims=-1) >= top_p if keep_crossing else sums > top_p
    is_cut[:, 0] = False
    expected = torch.zeros_like(p).scatter_(-1, places, ordered.masked_fill(is_cut, 0))
    assert torch.allclose(nucleus(p, top_p, keep_crossing), expected / expected.sum(-1, keepdim=True))


def test_draws_have_their_law() -> None:
    p = torch.tensor([0.0, 0.6, 0.0, 0.3, 0.1, 0.0])
    uniforms = uniform_like(torch.empty(1, 40_000), one_row())[0]
    uniforms[:2] = torch.tensor([0, 1 - 2**-53], dtype=torch.float64)  # the least and the largest
    for scale in (1, 7):  # weights need not sum to 1
        drawn = draw(scale * p.expand(40_000, 6), uniforms)
        assert drawn[:2].tolist() == [4, 1]
        assert torch.allclose(drawn.bincount(minlength=6) / 40_000, p, atol=0.01)
        assert (p[drawn] > 0).all()


def test_unlikely_words_are_drawn() -> None:
    """Numbers in float32 would leave out what is less likely than 2^-24."""
    p = torch.tensor([1 - 2**-30, 2**-30])
    assert draw(p.expand(2, 2), torch.tensor([2**-29, 2**-31], dtype=torch.float64)).tolist() == [0, 1]


def test_one_word_is_drawn_at_temperature_zero() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert word_probabilities(logits, temperature=0.0).tolist() == [[0, 1, 0]]


def test_slices_change_no_loss_and_no_gradient() -> None:
    logits = torch.randn(2, 5, 7, generator=one_row()[0], requires_grad=True)
    ids = torch.randint(7, (2, 5), generator=one_row()[0])
    expected = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    gradient = torch.autograd.grad(expected, logits)[0]
    sliced = by_slices(lambda some, rows: F.cross_entropy(some, rows, reduction="none"), logits, ids, size=3)
    assert sliced.shape == (2, 5)
    assert torch.allclose(sliced.mean(), expected)
    assert torch.allclose(torch.autograd.grad(sliced.mean(), logits)[0], gradient)
    half = cross_entropy(logits.detach().bfloat16(), ids)
    assert half.dtype == torch.float32
