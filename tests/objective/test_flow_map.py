from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ldlm_hf import DistillationObjective, LDLMTransformer1DModel, TangentDDIMScheduler, TangentFlowMapScheduler
from ldlm_hf.objective.flow_map import (
    BY_STUDENT,
    BY_TEACHER,
    DIAGONAL,
    flow_map_step,
    semigroup_target,
    semigroup_weight,
)
from ldlm_hf.schedulers.tangent import alpha_sigma


D, MEAN, STD = 3.0, 0.4, 0.5
TIMES = torch.tensor([[1.0, 0.6, 0.2], [0.9, 0.5, 0.0], [0.5, 0.49, 0.1], [0.3, 0.02, 0.01]], dtype=torch.float64)


def flow(z: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The probability-flow ODE of z_0 ~ N(m, std^2), which only scales: X = alpha_t m + v_t / v_s (z - alpha_s m)."""
    (alpha, sigma), (next_alpha, next_sigma) = (
        [part[:, None, None] for part in alpha_sigma(time, D)] for time in (s, t)
    )
    spread, next_spread = (
        torch.sqrt((a * STD).square() + b.square()) for a, b in ((alpha, sigma), (next_alpha, next_sigma))
    )
    return next_alpha * MEAN + next_spread / spread * (z - alpha * MEAN)


def exact_flow_map(z: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """D(z; s, t) from what the step has to be."""
    (alpha, sigma), (next_alpha, next_sigma) = (
        [part[:, None, None] for part in alpha_sigma(time, D)] for time in (s, t)
    )
    ratio = next_sigma / sigma
    return (flow(z, s, t) - ratio * z) / (next_alpha - ratio * alpha)


def test_two_steps_of_the_exact_flow_map_make_one():
    z = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, u, t = TIMES.unbind(1)
    target = semigroup_target(exact_flow_map, z, s, u, t, D)
    torch.testing.assert_close(target, exact_flow_map(z, s, t), rtol=1e-9, atol=1e-9)
    # with the weights of the linear path it is another
    linear = ((s - u) / (s - t))[:, None, None]
    first = exact_flow_map(z, s, u)
    second = exact_flow_map(flow_map_step(z, first, s, u, D), u, t)
    assert float((torch.lerp(second, first, linear) - exact_flow_map(z, s, t)).abs().max()) > 0.1


def test_the_flow_map_is_the_mean_prediction_along_the_way():
    """In rho = alpha / sigma, by the trapezoid rule from s = 0.9 to t = 0.1."""
    z = torch.tensor([[[0.3]]], dtype=torch.float64)
    s, t = torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    times = torch.linspace(0.9, 0.1, 20_001, dtype=torch.float64)
    alpha, sigma = alpha_sigma(times, D)
    x = flow(z, s, times[:1]) * 0 + torch.cat([flow(z, s, time[None]) for time in times[::200]])
    alpha, sigma = alpha[::200, None, None], sigma[::200, None, None]
    clean = MEAN + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * MEAN)
    rho = (alpha / sigma).flatten()
    mean = torch.trapezoid(clean.flatten(), rho) / (rho[-1] - rho[0])
    assert float(exact_flow_map(z, s, t)) == pytest.approx(float(mean), abs=1e-3)


def test_a_step_of_the_flow_map_is_the_schedulers():
    z, clean = torch.randn(2, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler = TangentFlowMapScheduler()
    scheduler.set_timesteps(timesteps=[0.7])
    assert scheduler.next_timesteps.tolist() == [0.0]
    found = scheduler.step(clean, scheduler.timesteps[0], z).prev_sample
    s, t = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    torch.testing.assert_close(found, flow_map_step(z, clean, s, t, D), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("t_min", [0.0, 0.1])
def test_samples_of_the_exact_flow_map_have_the_marginals_whatever_the_fresh_noise(gamma: float, t_min: float):
    scheduler = TangentFlowMapScheduler(gamma=gamma, t_min=t_min)
    scheduler.set_timesteps(timesteps=[1.0, 0.6, 0.3])
    ends = torch.tensor([0.6, 0.3, t_min])
    # noise levels of the landing times; the last step adds no noise
    for landing, end in zip(scheduler.next_timesteps[:-1], ends[:-1], strict=True):
        (alpha, sigma), (end_alpha, end_sigma) = alpha_sigma(landing, D), alpha_sigma(end, D)
        assert float(sigma / alpha) == pytest.approx(float((1 - gamma**2) ** 0.5 * end_sigma / end_alpha), abs=1e-6)
    assert float(scheduler.next_timesteps[-1]) == pytest.approx(t_min)
    generator = torch.Generator().manual_seed(0)
    z = first = torch.randn(40_000, 1, 1, generator=generator, dtype=torch.float64)
    landings = scheduler.next_timesteps.double()
    for i, time in enumerate(scheduler.timesteps):
        s, t = time.double().expand(len(z)), landings[i].expand(len(z))
        z = scheduler.step(exact_flow_map(z, s, t), time, z, generator=generator).prev_sample
        alpha, sigma = alpha_sigma(ends[i], D)
        spread = float(((alpha * STD).square() + sigma.square()).sqrt())
        assert float(z.mean()) == pytest.approx(float(alpha) * MEAN, abs=4 * spread / 200)
        assert float(z.std()) == pytest.approx(spread, rel=0.015)
    # the flow map itself keeps the correlation with the noise of the beginning; fresh noise takes away from it
    kept = 1.0
    for end in ends[:-1]:
        alpha, sigma = alpha_sigma(end, D)
        kept *= float(1 - (gamma * sigma).square() / ((alpha * STD).square() + sigma.square())) ** 0.5
    assert float(torch.corrcoef(torch.stack([z.flatten(), first.flatten()]))[0, 1]) == pytest.approx(kept, abs=0.02)


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_share_of_fresh_noise_out_of_its_range(gamma: float):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        TangentFlowMapScheduler(gamma=gamma)


def test_weights_at_the_ends():
    s, u, t = TIMES.unbind(1)
    weights = semigroup_weight(s, u, t, D)
    assert bool(torch.all((weights >= 0) & (weights < 1)))
    # at t = 0 only what the second step says counts
    assert float(weights[1]) == 0


@pytest.fixture
def make_objective(make_components: Callable) -> Callable[..., DistillationObjective]:
    def make(
        is_flow_map: bool = True, self_condition_scale: float = 1.0, guidance_rescale: float = 0.0
    ) -> DistillationObjective:
        parts = make_components()
        teacher = parts["transformer"]
        student = LDLMTransformer1DModel.from_config(
            teacher.config, self_conditioning=False, next_timestep_conditioning=is_flow_map
        )
        student.load_state_dict(teacher.state_dict(), strict=False)
        return DistillationObjective(
            parts["token_encoder"],
            parts["latent_encoder"],
            student,
            teacher,
            TangentDDIMScheduler(),
            self_condition_scale,
            guidance_rescale,
        )

    return make


def test_a_new_flow_map_is_its_teacher_whatever_the_second_time(make_objective: Callable):
    objective = make_objective()
    z = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    s, _, t = TIMES.float().unbind(1)
    with torch.no_grad():
        expected = objective.teacher(z, s).sample
        for end in (s, t):
            torch.testing.assert_close(objective.student_denoiser(z, s, end), expected)


def test_the_diagonal_stays_a_denoiser_of_one_time(make_objective: Callable, randomize: Callable):
    objective = make_objective()
    randomize(objective.transformer)
    z = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    s, _, t = TIMES.float().unbind(1)
    with torch.no_grad():
        one_time = objective.transformer(z, s).sample
        torch.testing.assert_close(objective.student_denoiser(z, s, s), one_time)
        assert float((objective.student_denoiser(z, s, t) - one_time).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("self_condition_scale", "guidance_rescale"), [(0.0, 0.0), (1.0, 0.0), (1.5, 0.0), (3.0, 0.6)]
)
@pytest.mark.parametrize(
    "targets",
    [
        [BY_STUDENT, DIAGONAL, BY_STUDENT, BY_TEACHER],
        [BY_TEACHER, BY_STUDENT, BY_STUDENT, BY_STUDENT],
        [DIAGONAL] * 4,
        None,  # a progressive student's
    ],
)
def test_losses_are_their_definition(
    make_objective: Callable,
    random_tokens: Callable,
    randomize: Callable,
    targets: list[str] | None,
    self_condition_scale: float,
    guidance_rescale: float,
):
    objective = make_objective(targets is not None, self_condition_scale, guidance_rescale)
    randomize(objective.transformer)
    randomize(objective.teacher)
    input_ids = random_tokens(4)
    targets = targets or [BY_TEACHER] * 4
    losses = objective(input_ids, TIMES, targets, torch.Generator().manual_seed(0))

    def teach(z: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        estimate = objective.teacher(z, s.float()).sample
        conditioned = objective.teacher(z, s.float(), estimate).sample
        guided = estimate + self_condition_scale * (conditioned - estimate)
        return guided * (1 - guidance_rescale + guidance_rescale * conditioned.std() / guided.std())

    denoisers = {BY_STUDENT: objective.student_denoiser, BY_TEACHER: teach}
    with torch.no_grad():
        latents = objective.latent_encoder(objective.token_encoder(input_ids).hidden_states).latents
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        s, u, t = TIMES.unbind(1)
        z = objective.scheduler.add_noise(latents, noise, s)
        errors: dict[bool, list[float]] = {True: [], False: []}  # by whether they are on the diagonal
        for i, kind in enumerate(targets):
            one = [part[i : i + 1] for part in (z, s, u, t)]
            if kind == DIAGONAL:
                target, end = teach(*one[:3]), one[1]
            else:
                target, end = semigroup_target(denoisers[kind], *one, D), one[3]
            error = (objective.student_denoiser(one[0], one[1], end) - target).square().mean()
            errors[kind == DIAGONAL].append(float(error))
    assert float(losses.total.detach()) == pytest.approx(sum(map(sum, errors.values())) / 4, rel=1e-4)
    for found, parts in ((losses.diagonal, errors[True]), (losses.semigroup, errors[False])):
        assert float(found) == pytest.approx(sum(parts) / max(len(parts), 1), rel=1e-4)

    losses.total.backward()
    received = {name for name, module in objective.named_children() for p in module.parameters() if p.grad is not None}
    assert received == {"transformer"}
    assert all(p.grad is not None for p in objective.transformer.parameters())
