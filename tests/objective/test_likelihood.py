"""The bound of Appendix A.1 where the answer is known: Gaussian latents, a mixture of Gaussians, known decoders."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ldlm_hf import AdaptiveTimestepSampler, LikelihoodBound, LikelihoodSettings, TangentEulerMaruyamaScheduler
from ldlm_hf.evaluation.likelihood_report import estimate
from ldlm_hf.objective.likelihood import (
    Denoiser,
    best_end_time,
    diffusion_integral,
    encoder_entropy,
    first_time,
    gaussian_draw,
    hidden_nll,
    last_step_kl,
    likelihood_weight,
    predict_clean_latents,
    sum_of_squares,
    terminal_kl,
    token_nll,
)
from ldlm_hf.objective.time_proposals import PROPOSALS, TimeProposal, build_proposal, stratified_uniforms
from ldlm_hf.schedulers import tangent


DS = [0.5, 3.0, 9.0]
SHAPE = (2, 3)  # N, d_z
NUM_ENTRIES = 6


def random_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained_sampler() -> AdaptiveTimestepSampler:
    """A sampler that has seen the training loss of unit Gaussian latents, which is flat towards t = 1."""
    sampler = AdaptiveTimestepSampler(num_bins=20, update_every=50)
    generator = random_generator()
    for _ in range(50):
        timesteps = torch.rand(256, generator=generator)
        sampler.update(timesteps, tangent.alpha_sigma(timesteps, 3.0)[1].square())
    assert sampler.is_active
    return sampler


def proposal(name: str, encoder_noise: float, d: float, latent_std: float = 1.0) -> TimeProposal:
    return build_proposal(name, first_time(encoder_noise, d), d, latent_std, trained_sampler())


def diffusion_draws(
    denoiser: Denoiser, latents: torch.Tensor, times: TimeProposal, d: float, num_draws: int, **kwargs
) -> torch.Tensor:
    """The diffusion term (K, N) of latents (N, ...), as the script draws it."""
    generator = random_generator(1)
    scheduler = TangentEulerMaruyamaScheduler(tangent_d=d)
    timesteps = times.quantile(stratified_uniforms(num_draws, len(latents), generator))
    draws = []
    for row in timesteps:
        predicted = predict_clean_latents(denoiser, latents, row, scheduler, generator=generator, **kwargs)
        draws.append(diffusion_integral(sum_of_squares(predicted, latents), row, times.density(row), d))
    return torch.stack(draws)


class GaussianLatents:
    """Latents N(mean, covariance) of shape (2, 3), and their best denoiser, the posterior mean."""

    def __init__(self, d: float):
        self.d = d
        generator = random_generator(2)
        factor = torch.randn(NUM_ENTRIES, NUM_ENTRIES, dtype=torch.float64, generator=generator)
        self.mean = torch.randn(NUM_ENTRIES, dtype=torch.float64, generator=generator)
        self.covariance = factor @ factor.T / NUM_ENTRIES + 0.05 * torch.eye(NUM_ENTRIES, dtype=torch.float64)

    def sample(self, count: int) -> torch.Tensor:
        noise = torch.randn(count, NUM_ENTRIES, dtype=torch.float64, generator=random_generator(3))
        return (self.mean + noise @ torch.linalg.cholesky(self.covariance).T).view(count, *SHAPE)

    def denoiser(self, noisy: torch.Tensor, timesteps: torch.Tensor, self_condition: torch.Tensor | None):
        alpha, sigma = (level[:, None, None] for level in tangent.alpha_sigma(timesteps, self.d))
        identity = torch.eye(NUM_ENTRIES, dtype=torch.float64)
        gain = alpha * self.covariance @ torch.linalg.inv(alpha**2 * self.covariance + sigma**2 * identity)
        surprise = noisy.flatten(1) - alpha[:, 0] * self.mean
        return (self.mean + (gain @ surprise[..., None])[..., 0]).view_as(noisy)

    def cross_entropies(self, latents: torch.Tensor, encoder_noise: float) -> torch.Tensor:
        """-E log p(z) for z ~ N(latents, s^2 I), in closed form, for each of the latents."""
        identity = torch.eye(NUM_ENTRIES, dtype=torch.float64)
        prior = MultivariateNormal(self.mean, self.covariance + encoder_noise**2 * identity)
        encoder = MultivariateNormal(latents.flatten(1), encoder_noise**2 * identity)
        return kl_divergence(encoder, prior) + encoder.entropy()


@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("encoder_noise", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("d", DS)
def test_prior_is_the_true_cross_entropy_of_gaussian_latents(d: float, encoder_noise: float, name: str):
    model = GaussianLatents(d)
    latents = model.sample(512)
    draws = diffusion_draws(model.denoiser, latents, proposal(name, encoder_noise, d), d, num_draws=64)
    alpha, sigma = (float(level) for level in tangent.alpha_sigma(torch.ones(()), d))
    terminal = terminal_kl(latents, alpha, sigma)
    entropy = encoder_entropy(NUM_ENTRIES, encoder_noise)
    measured = estimate(draws + terminal + entropy)
    truths = model.cross_entropies(latents, encoder_noise)
    assert measured["nats_per_token"] == pytest.approx(float(truths.mean()), abs=4 * measured["monte_carlo_error"])
    # uniform times rarely come near t_s, where the weight is largest
    assert 0 < measured["monte_carlo_error"] < (0.25 if name == "uniform" else 0.08)

    # and that of the distribution itself, which is its entropy
    identity = torch.eye(NUM_ENTRIES, dtype=torch.float64)
    relaxed = MultivariateNormal(model.mean, model.covariance + encoder_noise**2 * identity)
    assert measured["nats_per_token"] == pytest.approx(float(relaxed.entropy()), abs=4 * measured["standard_error"])


@pytest.mark.parametrize("end_time", [0.1, 0.3, 0.7])
def test_ending_early_is_exact_where_the_last_prediction_has_the_error_that_the_prior_expects(end_time: float):
    """Latents N(0, c^2 I): what is known of them at any time is N(z^, c^2 / (1 + c^2 SNR) I)."""
    deviation, encoder_noise, d = 1.3, 0.2, 3.0
    generator = random_generator(4)
    latents = deviation * torch.randn(2048, *SHAPE, dtype=torch.float64, generator=generator)
    scheduler = TangentEulerMaruyamaScheduler(tangent_d=d)

    def denoiser(noisy: torch.Tensor, timesteps: torch.Tensor, self_condition: torch.Tensor | None) -> torch.Tensor:
        alpha, sigma = (level[:, None, None] for level in tangent.alpha_sigma(timesteps, d))
        return alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2) * noisy

    end = torch.full((2048,), end_time, dtype=torch.float64)
    snr = float(tangent.log_snr(end[0], d).exp())
    expected_error = deviation / math.sqrt(1 + deviation**2 * snr)
    integral = diffusion_draws(denoiser, latents, build_proposal("log_snr", end_time, d, deviation), d, num_draws=8)

    def rate(latent_noise: float) -> dict[str, float]:
        steps = []
        for _ in range(8):
            predicted = predict_clean_latents(denoiser, latents, end, scheduler, generator=generator)
            errors = sum_of_squares(predicted, latents)
            steps.append(last_step_kl(errors, NUM_ENTRIES, snr, encoder_noise, latent_noise))
        return estimate(integral + torch.stack(steps))

    measured = rate(expected_error)
    assert measured["standard_error"] < 0.1
    truth = NUM_ENTRIES / 2 * math.log(1 + deviation**2 / encoder_noise**2)
    assert measured["nats_per_token"] == pytest.approx(truth, abs=4 * measured["standard_error"])
    # whoever expects another error than there is pays for it
    for wrong in (0.5, 2.0):
        assert (
            rate(wrong * expected_error)["nats_per_token"]
            > measured["nats_per_token"] + 4 * measured["standard_error"]
        )


def test_last_step_is_the_divergence_of_the_gaussians_that_it_names():
    encoder_noise, latent_noise, snr = 0.4, 0.7, 3.5
    k = encoder_noise**2 * snr
    latents, predicted, noisy = torch.randn(3, 5, *SHAPE, dtype=torch.float64, generator=random_generator())
    posterior = Normal(latents + k * (noisy - latents), encoder_noise * math.sqrt(1 - k))
    variance = encoder_noise**2 * (1 - k) + (1 - k) ** 2 * latent_noise**2
    prior = Normal(predicted + k * (noisy - predicted), math.sqrt(variance))
    expected = kl_divergence(posterior, prior).flatten(1).sum(1)
    errors = sum_of_squares(predicted, latents)
    torch.testing.assert_close(last_step_kl(errors, NUM_ENTRIES, snr, encoder_noise, latent_noise), expected)
    # at t_s nothing is left
    at_start = last_step_kl(errors, NUM_ENTRIES, encoder_noise**-2, encoder_noise, latent_noise)
    torch.testing.assert_close(at_start, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_best_end_is_where_the_denoiser_is_better_than_perfect_ones_are():
    """A perfect denoiser's error, 1 / (1 + SNR), costs log(1 + 1 / s_enc^2) wherever the process ends: one time with a
    smaller error decides."""
    encoder_noise, d = 0.05, 3.0
    timesteps = torch.linspace(first_time(encoder_noise, d), 1, 2001, dtype=torch.float64)[:-1]
    perfect = 1 / (1 + tangent.log_snr(timesteps, d).exp())
    for place in (700, 1900):
        favoured = perfect.clone()
        favoured[place] *= 0.8
        end_time, latent_noise = best_end_time(timesteps, favoured, encoder_noise, d)
        assert end_time == float(timesteps[place])
        assert latent_noise == pytest.approx(math.sqrt(float(favoured[place])))


@pytest.mark.parametrize(("scale", "snr"), [(0.9, 8.0), (1.1, 0.0)])
def test_best_end_is_before_the_errors_floor_and_at_once_for_a_poor_denoiser(scale: float, snr: float):
    """The cost of ending at SNR S has the slope (scale - 1) / (1 + S), nearly, and beyond the floor 0.1, nearly."""
    encoder_noise, d, floor = 0.05, 3.0, 0.1
    timesteps = torch.linspace(first_time(encoder_noise, d), 1, 2001, dtype=torch.float64)[:-1]
    errors = (scale / (1 + tangent.log_snr(timesteps, d).exp())).clamp(min=floor)
    end_time, latent_noise = best_end_time(timesteps, errors, encoder_noise, d)
    found = float(tangent.log_snr(torch.tensor(end_time, dtype=torch.float64), d).exp())
    assert found == pytest.approx(snr, rel=0.02, abs=1e-3)
    assert latent_noise == pytest.approx(math.sqrt(max(scale / (1 + snr), floor)), rel=0.01)


def test_schedules_differ_in_times_only():
    """Drawn in log-SNR, the estimate does not know d: noise and SNRs are the same, so the numbers are."""
    estimates = []
    for d in DS:
        model = GaussianLatents(d)
        draws = diffusion_draws(model.denoiser, model.sample(64), proposal("log_snr", 0.3, d), d, num_draws=4)
        estimates.append(draws)
    torch.testing.assert_close(estimates[0], estimates[1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(estimates[0], estimates[2], rtol=1e-8, atol=1e-8)


def test_a_worse_denoiser_has_a_larger_bound():
    model, times = GaussianLatents(3.0), proposal("log_snr", 0.3, 3.0)
    latents = model.sample(512)
    best = estimate(diffusion_draws(model.denoiser, latents, times, 3.0, num_draws=8))
    for worsen in (
        lambda clean, noisy: 0.8 * clean,
        lambda clean, noisy: clean + 0.2,
        lambda clean, noisy: clean.flip(1),
        lambda clean, noisy: torch.lerp(clean, noisy, 0.5),
    ):
        worse = estimate(
            diffusion_draws(
                lambda noisy, t, s, worsen=worsen: worsen(model.denoiser(noisy, t, s), noisy),
                latents,
                times,
                3.0,
                num_draws=8,
            )
        )
        assert worse["nats_per_token"] > best["nats_per_token"] + 4 * (
            worse["monte_carlo_error"] + best["monte_carlo_error"]
        )


@pytest.mark.parametrize("name", PROPOSALS)
def test_a_denoiser_that_always_says_zero_is_the_prior_n_0_s_enc(name: str):
    """Its integral is SNR(t_s) ||z||^2 / 2, the divergence of N(z, s^2 I) from N(0, s^2 I)."""
    encoder_noise = 0.4
    latents = torch.ones(4096, *SHAPE, dtype=torch.float64)
    times = proposal(name, encoder_noise, 3.0)
    measured = estimate(diffusion_draws(lambda noisy, t, s: torch.zeros_like(noisy), latents, times, 3.0, 16))
    expected = NUM_ENTRIES / (2 * encoder_noise**2)
    assert measured["nats_per_token"] == pytest.approx(expected, rel=0.02)
    assert measured["nats_per_token"] == pytest.approx(expected, abs=4 * measured["monte_carlo_error"])


def test_log_snr_proposal_has_no_variance_on_the_gaussian_it_is_made_for():
    """With c the latents' own deviation, every time gives the same mean: only the noise is left."""
    deviation, encoder_noise, d = 1.7, 0.2, 3.0
    times = proposal("log_snr", encoder_noise, d, latent_std=deviation)
    timesteps = times.quantile(torch.linspace(0.01, 0.99, 99, dtype=torch.float64))
    snr = tangent.log_snr(timesteps, d).exp()
    smallest_error = deviation**2 / (1 + deviation**2 * snr)
    values = likelihood_weight(timesteps, d) * smallest_error / times.density(timesteps)
    expected = math.log(1 + deviation**2 / encoder_noise**2) / 2
    torch.testing.assert_close(values, torch.full_like(values, expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("encoder_noise", [0.1, 0.3, 0.8])
def test_prior_of_a_mixture_of_two_gaussians_against_numerical_integration(encoder_noise: float):
    d, centre, width = 3.0, 1.0, 0.3
    generator = random_generator(5)
    signs = torch.randint(0, 2, (4096, 1), generator=generator).double() * 2 - 1
    latents = centre * signs + width * torch.randn(4096, 1, dtype=torch.float64, generator=generator)

    def denoiser(noisy: torch.Tensor, timesteps: torch.Tensor, self_condition: torch.Tensor | None) -> torch.Tensor:
        alpha, sigma = (level[:, None] for level in tangent.alpha_sigma(timesteps, d))
        variance = (alpha * width) ** 2 + sigma**2
        expected_sign = torch.tanh(alpha * centre * noisy / variance)
        # the posterior mean given the sign is linear in it, so its mean over the sign is that of the mean sign
        return centre * expected_sign + alpha * width**2 / variance * (noisy - alpha * centre * expected_sign)

    times = proposal("log_snr", encoder_noise, d)
    draws = diffusion_draws(denoiser, latents, times, d, num_draws=16)
    measured = estimate(draws + encoder_entropy(1, encoder_noise))

    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    spread = math.sqrt(width**2 + encoder_noise**2)
    log_density = torch.logaddexp(Normal(-centre, spread).log_prob(grid), Normal(centre, spread).log_prob(grid))
    log_density = log_density - math.log(2)
    entropy = float(torch.trapezoid(-log_density.exp() * log_density, grid))
    assert measured["nats_per_token"] == pytest.approx(entropy, abs=4 * measured["standard_error"])
    assert measured["standard_error"] < 0.03
    # a single Gaussian of the same variance is told apart
    assert 0.5 * math.log(2 * math.pi * math.e * (spread**2 + centre**2)) > entropy + 4 * measured["standard_error"]


def test_self_conditioning_hands_the_denoiser_its_own_first_estimate():
    calls: list[torch.Tensor | None] = []

    def denoiser(noisy: torch.Tensor, timesteps: torch.Tensor, self_condition: torch.Tensor | None) -> torch.Tensor:
        calls.append(self_condition)
        return torch.zeros_like(noisy) if self_condition is None else self_condition + 1

    latents = torch.ones(4, *SHAPE, dtype=torch.float64)
    times = proposal("log_snr", 0.3, 3.0)
    draws = diffusion_draws(denoiser, latents, times, 3.0, num_draws=1, self_conditioning=True)
    assert calls[0] is None
    assert torch.equal(calls[1], torch.zeros_like(latents))
    # the second estimate, zero plus one, is right
    assert draws.abs().max() == 0
    assert diffusion_draws(denoiser, latents, times, 3.0, num_draws=1).min() > 0


@pytest.mark.parametrize("d", DS)
@pytest.mark.parametrize("name", PROPOSALS)
def test_densities_integrate_to_one_and_are_those_of_the_quantiles(name: str, d: float):
    encoder_noise = 0.2
    times = proposal(name, encoder_noise, d)
    start = first_time(encoder_noise, d)
    ends = times.quantile(torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64))
    assert float(ends[0]) == pytest.approx(start, rel=1e-12)
    assert start < ends[1] <= 1
    timesteps = torch.linspace(start, 1 - 1e-9, 2_000_001, dtype=torch.float64)
    densities = times.density(timesteps)
    assert float(torch.trapezoid(densities, timesteps)) == pytest.approx(1, abs=1e-4)

    # mean of a function over quantiles of a uniform grid = its integral against the density
    drawn = times.quantile((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    for power in (1, 2, 5):
        integral = float(torch.trapezoid(densities * timesteps**power, timesteps))
        assert float((drawn**power).mean()) == pytest.approx(integral, abs=1e-4)


def test_adaptive_proposal_never_has_less_than_half_of_log_snr():
    adaptive, log_snr = proposal("adaptive", 0.05, 3.0), proposal("log_snr", 0.05, 3.0)
    timesteps = adaptive.quantile(torch.linspace(0, 0.999, 500, dtype=torch.float64))
    assert (adaptive.density(timesteps) >= log_snr.density(timesteps) / 2).all()
    assert not torch.allclose(adaptive.density(timesteps), log_snr.density(timesteps), rtol=0.1)


def test_proposals_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="log_snr, uniform, adaptive"):
        build_proposal("snr", 0.1, 3.0, 1.0)
    with pytest.raises(ValueError, match="proposal='log_snr'"):
        build_proposal("adaptive", 0.1, 3.0, 1.0)
    with pytest.raises(ValueError, match="refreshed"):
        build_proposal("adaptive", 0.1, 3.0, 1.0, AdaptiveTimestepSampler())


@pytest.mark.parametrize("d", DS)
def test_first_time_is_where_the_process_is_as_noisy_as_the_encoder(d: float):
    for encoder_noise in (0.01, 0.3, 5.0):
        alpha, sigma = tangent.alpha_sigma(torch.tensor(first_time(encoder_noise, d), dtype=torch.float64), d)
        assert float(sigma / alpha) == pytest.approx(encoder_noise, rel=1e-12)


def test_likelihood_weight_is_half_the_snr_times_the_slope_of_its_logarithm():
    timesteps = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    log_snr = tangent.log_snr(timesteps, 3.0)
    (slope,) = torch.autograd.grad(log_snr.sum(), timesteps)
    expected = 0.5 * log_snr.exp() * -slope
    torch.testing.assert_close(likelihood_weight(timesteps.detach(), 3.0), expected.detach())


def test_terminal_kl_is_zero_at_the_end_of_the_schedule_and_right_before_it():
    latents = torch.randn(5, *SHAPE, dtype=torch.float64, generator=random_generator())
    for d in DS:
        alpha, sigma = (float(level) for level in tangent.alpha_sigma(torch.ones(()), d))
        assert terminal_kl(latents, alpha, sigma).tolist() == 5 * [0.0]
    alpha, sigma = (float(level) for level in tangent.alpha_sigma(torch.tensor(0.4), 3.0))
    expected = kl_divergence(Normal(alpha * latents, sigma), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(terminal_kl(latents, alpha, sigma), expected)


def test_encoder_entropy_is_that_of_its_gaussian():
    for encoder_noise in (0.05, 1.0, 3.0):
        expected = NUM_ENTRIES * float(Normal(0.0, encoder_noise).entropy())
        assert encoder_entropy(NUM_ENTRIES, encoder_noise) == pytest.approx(expected, rel=1e-6)


def test_hidden_states_have_the_likelihood_of_their_gaussian():
    generator = random_generator()
    hidden_states, predicted = torch.randn(2, 4, 8, 5, generator=generator)
    expected = -Normal(predicted.double(), 0.7).log_prob(hidden_states.double()).flatten(1).sum(1)
    torch.testing.assert_close(hidden_nll(predicted, hidden_states, 0.7), expected)


def test_tokens_have_the_likelihood_of_their_decoder():
    """Log-probabilities as logits, and the same shifted: a known categorical distribution at each place."""
    generator = random_generator()
    input_ids = torch.randint(0, 11, (3, 7), generator=generator)
    probabilities = torch.rand(3, 7, 11, generator=generator).softmax(-1)
    expected = -torch.stack([probabilities[i, torch.arange(7), input_ids[i]].log().sum() for i in range(3)]).double()
    for shift in (0.0, 5.0):
        logits = probabilities.log() + shift
        found = torch.stack([token_nll(*sequence) for sequence in zip(logits, input_ids, strict=True)])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_gaussian_draws_have_the_width_that_they_are_given():
    mean = torch.full((200_000,), 2.0)
    drawn = gaussian_draw(mean, 0.3, random_generator())
    assert float(drawn.mean()) == pytest.approx(2.0, abs=0.004)
    assert float(drawn.std()) == pytest.approx(0.3, abs=0.002)
    assert torch.equal(gaussian_draw(mean, 0.0), mean)


def test_stratified_uniforms_leave_no_stratum_empty_and_no_place_out():
    uniforms = stratified_uniforms(2000, 10, random_generator())
    assert uniforms.dtype == torch.float64
    strata = (uniforms * 10).floor().sort(1).values
    assert torch.equal(strata, torch.arange(10, dtype=torch.float64).expand(2000, 10))
    # each sequence by itself sees every time
    torch.testing.assert_close(uniforms.mean(0), torch.full((10,), 0.5, dtype=torch.float64), rtol=0, atol=0.03)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1


def test_errors_are_the_spread_of_repeated_estimates():
    """Sequences of spread 2, draws of spread 3: both errors by formula, and no spread counted twice."""
    generator = random_generator()
    errors = []
    for _ in range(400):
        sequences = 2 * torch.randn(50, generator=generator)
        measured = estimate(sequences + 3 * torch.randn(8, 50, generator=generator))
        errors.append((measured["nats_per_token"] - float(sequences.mean()), measured["nats_per_token"], measured))
    conditional, total, _ = zip(*errors, strict=True)
    squares = [(one["monte_carlo_error"] ** 2, one["standard_error"] ** 2) for *_, one in errors]
    monte_carlo, standard = torch.tensor(squares).mean(0).sqrt()
    assert float(torch.tensor(conditional).std()) == pytest.approx(3 / math.sqrt(400), rel=0.1)
    assert float(monte_carlo) == pytest.approx(3 / math.sqrt(400), rel=0.05)
    assert float(torch.tensor(total).std()) == pytest.approx(math.sqrt(4 / 50 + 9 / 400), rel=0.1)
    assert float(standard) == pytest.approx(math.sqrt(4 / 50 + 9 / 400), rel=0.05)
    with pytest.raises(ValueError, match="2 draws of 2 sequences"):
        estimate(torch.zeros(1, 9))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_noise", 0.0),
        ("encoder_noise", math.inf),
        ("decoder_noise", -1.0),
        ("hidden_noise", 0.0),
        ("end_time", 1.0),
        ("latent_noise", -0.1),
    ],
)
def test_noise_levels_without_a_density_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        LikelihoodSettings(**({"encoder_noise": 0.1, "decoder_noise": 0.3, "hidden_noise": 1.0} | {name: value}))


@pytest.fixture
def draw_terms(make_components: Callable, random_tokens: Callable) -> Callable:
    """One draw of a tiny model's terms with given settings, and the bound that drew it."""

    def draw(settings: LikelihoodSettings | None = None, **components):
        settings = settings or LikelihoodSettings(encoder_noise=0.2, decoder_noise=0.3, hidden_noise=0.8)
        bound = LikelihoodBound(**(make_components() | components), settings=settings)
        input_ids = random_tokens(4)
        times = build_proposal("log_snr", bound.start, 3.0, 1.0)
        timesteps = times.quantile(torch.tensor([0.1, 0.4, 0.6, 0.9]))
        encoded = bound.encode(input_ids)
        generator = random_generator(7)
        return bound, bound.draw(input_ids, *encoded, timesteps, times.density(timesteps), generator), encoded

    return draw


@pytest.mark.parametrize("end_time", [0.0, 0.5])
def test_times_are_drawn_on_the_cpu_wherever_the_models_are(
    make_components: Callable, random_tokens: Callable, end_time: float
):
    """The meta device stands for a GPU."""
    components = make_components()
    components = {name: part.to("meta") if hasattr(part, "to") else part for name, part in components.items()}
    settings = LikelihoodSettings(encoder_noise=0.2, decoder_noise=0.3, hidden_noise=0.8, end_time=end_time)
    bound = LikelihoodBound(**components, settings=settings)
    input_ids = random_tokens(2).to("meta")
    terms = bound.draw(input_ids, *bound.encode(input_ids), torch.tensor([0.6, 0.9]).double(), torch.ones(2))
    assert terms.total.device.type == "meta"


def test_terms_of_a_tiny_model_add_up_to_equation_23(draw_terms: Callable):
    bound, terms, (hidden_states, latents) = draw_terms()
    assert latents.shape == (4, 6, 16)
    assert terms.terminal_kl.tolist() == 4 * [0.0]
    assert terms.encoder_entropy.tolist() == 4 * [encoder_entropy(6 * 16, 0.2)]
    assert terms.last_step.tolist() == 4 * [0.0]
    torch.testing.assert_close(terms.rate, terms.diffusion)
    torch.testing.assert_close(terms.prior_cross_entropy, terms.diffusion + terms.encoder_entropy)
    reconstruction = terms.hidden_reconstruction + terms.token_reconstruction
    torch.testing.assert_close(terms.total, reconstruction + terms.prior_cross_entropy - terms.encoder_entropy)
    torch.testing.assert_close(terms.tokens_only, terms.token_reconstruction + terms.diffusion)

    # the same draws by hand: encoder noise, decoder noise, then the diffusion's
    generator = random_generator(7)
    noises = [torch.randn(latents.shape, generator=generator) for _ in range(3)]
    with torch.no_grad():
        predicted = bound.latent_decoder(latents + 0.2 * noises[0] + 0.3 * noises[1]).hidden_states
        logits = bound.token_decoder(predicted).logits
        torch.testing.assert_close(
            terms.hidden_reconstruction, hidden_nll(predicted, hidden_states, 0.8), rtol=1e-5, atol=0
        )
        input_ids = torch.randint(2, 40, (4, 8), generator=random_generator(0))
        tokens = torch.stack([token_nll(*sequence) for sequence in zip(logits, input_ids, strict=True)])
        torch.testing.assert_close(terms.token_reconstruction, tokens, rtol=1e-5, atol=0)


def test_prior_may_end_where_sampling_does(draw_terms: Callable):
    settings = LikelihoodSettings(0.2, 0.3, hidden_noise=0.8, end_time=0.25, latent_noise=0.6)
    bound, terms, (_, latents) = draw_terms(settings)
    assert bound.start == 0.25
    torch.testing.assert_close(terms.rate, terms.diffusion + terms.last_step)
    # its noise is the fourth that is drawn
    generator = random_generator(7)
    noise = [torch.randn(latents.shape, generator=generator) for _ in range(4)][-1]
    alpha, sigma = tangent.alpha_sigma(torch.tensor(0.25), 3.0)
    with torch.no_grad():
        predicted = bound.transformer((alpha * latents + sigma * noise).float(), torch.tensor(0.25)).sample
    errors = sum_of_squares(predicted, latents)
    expected = last_step_kl(errors, 6 * 16, float((alpha / sigma) ** 2), 0.2, 0.6)
    torch.testing.assert_close(terms.last_step, expected, rtol=1e-5, atol=0)
    # an end time before t_s is no end time
    bound, terms, _ = draw_terms(LikelihoodSettings(0.2, 0.3, hidden_noise=0.8, end_time=0.01))
    assert bound.start == first_time(0.2, 3.0)
    assert terms.last_step.tolist() == 4 * [0.0]


def test_a_token_decoder_that_knows_nothing_costs_log_v_a_token(draw_terms: Callable, make_components: Callable):
    token_decoder = make_components()["token_decoder"]
    torch.nn.init.zeros_(token_decoder.head.weight)
    _, terms, _ = draw_terms(token_decoder=token_decoder)
    torch.testing.assert_close(
        terms.token_reconstruction, torch.full((4,), 8 * math.log(40), dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_self_conditioning_changes_the_prior_and_nothing_else(draw_terms: Callable):
    settings = {"encoder_noise": 0.2, "decoder_noise": 0.3, "hidden_noise": 0.8}
    _, plain, _ = draw_terms(LikelihoodSettings(**settings))
    _, conditioned, _ = draw_terms(LikelihoodSettings(**settings, self_conditioning=True))
    assert torch.equal(plain.hidden_reconstruction, conditioned.hidden_reconstruction)
    assert torch.equal(plain.token_reconstruction, conditioned.token_reconstruction)
    assert not torch.allclose(plain.diffusion, conditioned.diffusion)


def test_without_hidden_states_there_is_the_bound_on_tokens_alone(draw_terms: Callable, make_components: Callable):
    _, terms, _ = draw_terms(LikelihoodSettings(0.2, 0.3, hidden_noise=None))
    assert terms.hidden_reconstruction is None
    assert terms.total is None
    assert torch.isfinite(terms.tokens_only).all()
    with pytest.raises(ValueError, match="hidden_noise=None"):
        LikelihoodBound(
            **(make_components() | {"latent_decoder": None}), settings=LikelihoodSettings(0.2, 0.3, hidden_noise=1.0)
        )
