"""Objectives against closed forms: what each of them moves, what it leaves alone, and where it is at rest."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.guidance_norm import guided
from tdm.pipelines.schedule import NoiseSchedule, expand
from tdm.training.batch import Batch, draw_batch
from tdm.training.config import DistillConfig, ObjectiveConfig
from tdm.training.loop import distill
from tdm.training.losses import generator_loss, guidance_loss
from tdm.training.objectives import OBJECTIVES, Objective, objective_of
from tdm.training.objectives.matching import (
    critic_forward,
    critic_objective,
    sid_objective,
    start_states,
    student_step,
)
from tdm.training.objectives.towards import later_timesteps, ode_grid
from tdm.training.presets import OBJECTIVES as PRESETS
from tdm.training.roles import ROLES, AdapterRoles
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import MixtureTask
from tdm.training.trajectory import Trajectory, sample, with_fresh_noise
from torch import Tensor

FLOW = NoiseSchedule.flow()
VP = NoiseSchedule.vp(1000, 0.00085, 0.012, "scaled_linear")


class Gaussian:
    """Data ``N(mean, std^2)`` in each dimension: posterior mean, ODE and consistency function are formulas."""

    def __init__(self, schedule: NoiseSchedule, mean: float = 1.5, std: float = 0.6) -> None:
        self.schedule, self.mean, self.std = schedule, mean, std

    def predict(self, x: Tensor, timesteps: Tensor, _cond: object) -> tuple[Tensor, Tensor]:
        """``(x0, eps)``: the posterior mean and the noise that goes with it."""
        alpha, sigma = (expand(level, x) for level in self.schedule.alpha_sigma(timesteps))
        variance = (alpha * self.std).square() + sigma.square()
        x0 = self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean)
        return x0, (x - alpha * x0) / sigma

    def end(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Where the exact ODE takes ``x``: it keeps a sample's rank within the marginal."""
        alpha, sigma = (expand(level, x) for level in self.schedule.alpha_sigma(timesteps))
        spread = ((alpha * self.std).square() + sigma.square()).sqrt()
        return self.mean + self.std * (x - alpha * self.mean) / spread


class ExactRoles:
    """A teacher that makes no error, and a student that already is its consistency function, off by ``wrong``."""

    def __init__(self, gaussian: Gaussian, wrong: float = 0.0) -> None:
        self.gaussian, self.wrong = gaussian, torch.tensor(wrong, dtype=torch.float64, requires_grad=True)

    def student(self, x: Tensor, timesteps: Tensor, _cond: object) -> tuple[Tensor, Tensor]:
        alpha, sigma = (expand(level, x) for level in self.gaussian.schedule.alpha_sigma(timesteps))
        x0 = self.gaussian.end(x, timesteps) + self.wrong * sigma  # right at the clean end, whatever `wrong` is
        return x0, (x - alpha * x0) / sigma

    def guided_teacher(
        self, x: Tensor, timesteps: Tensor, cond: object, _null: object, _scale: float
    ) -> tuple[Tensor, Tensor]:
        return self.gaussian.predict(x, timesteps, cond)


def config_of(*overrides: str) -> DistillConfig:
    return load_config(None, ["trajectory.stages=sample", *overrides])


def batch_of(config: DistillConfig, schedule: NoiseSchedule, n: int = 64, *, decoupled: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    trajectory = Trajectory(config.trajectory, schedule)
    band = config.objective.guidance_band if decoupled else None
    batch = draw_batch(trajectory, {}, {}, (n, 3), generator, student=True, guidance_band=band)
    double = {name: getattr(batch, name).double() for name in ("noise", "fresh") if getattr(batch, name) is not None}
    renoise = {
        name: old._replace(xi=old.xi.double())
        for name in ("critic", "student", "guidance")
        if (old := getattr(batch, name)) is not None
    }
    return batch._replace(**double, **renoise)


def loss_of(roles: Any, config: DistillConfig, batch: Batch) -> Tensor:
    """The student's loss of the run's objective, with a graph."""
    objective = objective_of(config.objective)
    step = student_step(roles, batch, grad=objective.through_step)
    return objective.student_loss(roles, config.objective, batch, step, None)[0]


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("sampler", ["deterministic", "stochastic"])
def test_a_consistency_function_is_at_rest_and_another_student_is_not(schedule: NoiseSchedule, sampler: str) -> None:
    """The loss of an exact student is zero up to the error of the teacher's one step, which shrinks with its size."""
    losses = []
    for ode_steps in (8, 64, 512):
        config = config_of(
            "objective.name=consistency", f"objective.ode_steps={ode_steps}", "objective.rho=mse",
            f"trajectory.sampler={sampler}", "trajectory.renoise=clean", "trajectory.bands=full",
        )  # fmt: skip
        losses.append(float(loss_of(ExactRoles(Gaussian(schedule)), config, batch_of(config, schedule)).detach()))
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 1e-5
    wrong = ExactRoles(Gaussian(schedule), 0.5)
    loss_of(wrong, config, batch_of(config, schedule)).backward()
    assert wrong.wrong.grad is not None
    assert wrong.wrong.grad > 0  # down the gradient is less wrong


@pytest.mark.parametrize(("schedule", "shift"), [(FLOW, 1.0), (FLOW, 3.0), (VP, 1.0)], ids=["flow", "shifted", "vp"])
def test_the_step_of_consistency_is_even_in_unshifted_time_and_ends_clean(
    schedule: NoiseSchedule, shift: float
) -> None:
    trajectory = Trajectory(config_of(f"trajectory.shift={shift}").trajectory, schedule)
    grid = trajectory.timesteps
    assert later_timesteps(trajectory, grid, 4).tolist() == pytest.approx(
        [*grid[1:].tolist(), schedule.clean_timestep], abs=1e-9
    )
    assert later_timesteps(trajectory, grid[-1:], 3).tolist() == [schedule.clean_timestep]


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_regression_aims_at_the_end_of_the_teachers_ode(schedule: NoiseSchedule) -> None:
    """A student that is that end has no loss; the error of the teacher's steps shrinks with their number."""
    losses = []
    for ode_steps in (8, 400):
        config = config_of("objective.name=regression", f"objective.ode_steps={ode_steps}", "objective.rho=mse")
        roles = ExactRoles(Gaussian(schedule))
        losses.append(float(loss_of(roles, config, batch_of(config, schedule)).detach()))
    assert losses[0] > 30 * losses[1]
    assert losses[1] < 2e-5


def test_the_teachers_grid_begins_where_a_stage_starts() -> None:
    config = config_of("trajectory.shift=2", "trajectory.timesteps=[1000, 800, 500, 200]")
    trajectory = Trajectory(config.trajectory, FLOW)
    grid = [1000.0, 2000 * 0.75 / 1.75, 2000 / 3, 400.0]  # four steps with shift 2
    assert ode_grid(trajectory, 0, 4) == pytest.approx(grid)
    assert ode_grid(trajectory, 1, 4) == pytest.approx([800, *grid[2:]])
    assert ode_grid(trajectory, 3, 4) == [200]


def linear_roles(schedule: NoiseSchedule = FLOW) -> AdapterRoles:
    """A small real network in float64 under the real adapters, which already differ from each other."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()

    def call(network: torch.nn.Module, x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        shown = network(x.double()) * (0.5 + timesteps[:, None] / 1000)
        return shown + cond["c"][:, None] if cond else shown

    layers = ["0", "2"]
    roles = AdapterRoles(
        base, call, schedule=schedule, prediction_type="flow_prediction", generator=torch.Generator().manual_seed(0),
        targets={"student": layers, "critic": layers}, rank={"student": 2, "critic": 2},
        alpha={"student": None, "critic": None},
    )  # fmt: skip
    with torch.no_grad():
        for role in ROLES:
            for weight in roles.parameters(role):
                weight.add_(0.2 * torch.randn_like(weight))
    return roles


def conditioned(batch: Batch) -> Batch:
    n = len(batch.noise)
    return batch._replace(cond={"c": torch.ones(n, dtype=torch.float64)}, null={"c": torch.zeros(n).double()})


def test_sid_equals_the_gradient_of_its_formula_and_spares_critic_and_base() -> None:
    """Central differences over the student's weights, everything else held: teacher and critic are looked through."""
    config = config_of("objective.gradient=sid", "objective.guidance_scale=3", "objective.norm_min=1e6")
    roles, batch = linear_roles(), conditioned(batch_of(config, FLOW, 8))
    assert batch.student is not None
    step = student_step(roles, batch, grad=True)
    loss, _ = sid_objective(roles, config.objective, batch, step, None)
    loss.backward()
    weight = roles.parameters("student")[1]
    assert weight.grad is not None
    assert all(p.grad is None for p in roles.parameters("critic"))
    assert all(p.requires_grad for p in roles.parameters("critic"))

    def value(x: Tensor) -> float:
        """SiD's loss, written out, of one step from fixed states."""
        assert batch.student is not None
        with torch.no_grad():
            x0, eps = roles.student(x, batch.trajectory.timesteps[batch.stages], batch.cond)
            noised = batch.trajectory.renoise(
                batch.trajectory.step(x0, eps, batch.stages), batch.stages, *batch.student
            )
            c, _ = roles.teacher(noised.x_tau, batch.student.tau, batch.cond)
            u, _ = roles.teacher(noised.x_tau, batch.student.tau, batch.null)
            phi, psi = u + 3 * (c - u), roles.critic(noised.x_tau, batch.student.tau, batch.cond)[0]
            return float(((phi - psi) * (phi - x0) - (phi - psi) ** 2).mean() / 1e6)

    for i in range(0, weight.numel(), 5):
        flat, h = weight.data.view(-1), 1e-2
        before = flat[i].clone()
        flat[i] = before + h
        above = value(step.x)
        flat[i] = before - h
        below = value(step.x)
        flat[i] = before
        assert (above - below) / (2 * h) == pytest.approx(float(weight.grad.view(-1)[i]), rel=2e-2, abs=3e-10)


def test_two_terms_at_one_tau_pull_as_the_coupled_one() -> None:
    """With a linear penalty, no normaliser, and the same tau and noise, the decoupled form is the coupled one."""
    plain = ["objective.rho=mse", "objective.normalise=false", "objective.guidance_scale=4"]
    apart = ["objective.guidance_term=decoupled", "objective.guidance_band=separate"]
    gradients = []
    for decoupled in (False, True):
        config = config_of(*plain, *(apart if decoupled else []))
        roles, batch = linear_roles(), conditioned(batch_of(config, FLOW, 8))
        assert batch.student is not None
        batch = batch._replace(guidance=batch.student if decoupled else None)
        loss_of(roles, config, batch).backward()
        gradients.append([p.grad for p in roles.parameters("student")])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_weight_of_the_guidance_term_is_a_guidance_scale() -> None:
    """``k (w - 1)(c - u)``: as before, the coupled form with the scale ``1 + k (w - 1)``."""
    plain = ["objective.rho=mse", "objective.normalise=false"]
    apart = ["objective.guidance_term=decoupled", "objective.guidance_band=separate"]
    gradients = []
    for settings in (
        ["objective.guidance_scale=7"],
        ["objective.guidance_scale=4", *apart, "objective.guidance_weight=2"],
    ):
        config = config_of(*plain, *settings)
        roles, batch = linear_roles(), conditioned(batch_of(config, FLOW, 8))
        loss_of(roles, config, batch._replace(guidance=batch.student)).backward()
        gradients.append([p.grad for p in roles.parameters("student")])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("renoise", ["state", "clean"])
def test_published_decoupled_guidance_acts_on_the_noised_clean_prediction_below_the_stage(renoise: str) -> None:
    """By hand: matching without guidance at the student's tau, and ``(w - 1)(c - u)`` at ``alpha x0 + sigma xi``."""
    apart = ["objective.guidance_term=decoupled", "objective.guidance_band=below", "objective.normalise=false"]
    config = config_of("objective.rho=mse", "objective.guidance_scale=4", f"trajectory.renoise={renoise}", *apart)
    roles, batch = linear_roles(), conditioned(batch_of(config, FLOW, 64, decoupled=True))
    starts = batch.trajectory.timesteps[batch.stages]
    assert batch.guidance is not None
    assert batch.student is not None
    tau, xi = batch.guidance
    assert bool((tau <= starts).all())
    assert bool((tau[batch.stages < 3] < batch.trajectory.timesteps[batch.stages[batch.stages < 3] + 1]).any())
    loss = loss_of(roles, config, batch)
    step = student_step(roles, batch, grad=True)
    noised = batch.trajectory.renoise(step.x_m, batch.stages, *batch.student)
    x0_teacher, _ = roles.teacher(noised.x_tau, batch.student.tau, batch.cond)
    x0_critic, _ = roles.critic(noised.x_tau, batch.student.tau, batch.cond)
    alpha, sigma = (expand(level, step.x0) for level in FLOW.alpha_sigma(tau))
    x_tau = alpha * step.x0.detach() + sigma * xi
    (c, _), (u, _) = (roles.teacher(x_tau, tau, text) for text in (batch.cond, batch.null))
    expected = generator_loss(step.x0, x0_teacher, x0_critic.detach(), kind="mse", normalise=False)
    expected = expected + guidance_loss(step.x0, c, c + 3 * (c - u), kind="mse", normalise=False)
    ours, by_hand = (torch.autograd.grad(value, roles.parameters("student")) for value in (loss, expected))
    assert all(bool(gradient.any()) for gradient in ours[1::2])
    for a, b in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_sid_alpha_weighs_the_square_of_the_scores_difference() -> None:
    losses = {}
    for alpha in (1.0, 1.2):
        config = config_of("objective.gradient=sid", f"objective.sid_alpha={alpha}", "objective.norm_min=100")
        roles, batch = linear_roles(), conditioned(batch_of(config, FLOW, 8))
        losses[alpha] = float(loss_of(roles, config, batch).detach())
    assert batch.student is not None
    step = student_step(roles, batch, grad=False)
    forward = critic_forward(roles, config.objective, batch, step.x_m, batch.student, grad=False)
    teacher, _ = roles.teacher(forward.noised.x_tau, forward.tau, batch.cond)
    square = float((teacher - forward.x0_critic).square().mean())
    assert losses[1.0] - losses[1.2] == pytest.approx(0.2 * square / 100, rel=1e-4)


@pytest.mark.parametrize("limit", [2.0, 5.0, 1e9])
def test_no_error_of_the_critic_weighs_more_than_its_limit(limit: float) -> None:
    """``min(1 / sigma^2, limit)`` of each sample."""
    config = config_of("critic.target=clean", f"critic.weight_limit={limit}")
    roles, batch = linear_roles(), conditioned(batch_of(config, FLOW))
    step = student_step(roles, batch, grad=False)
    forward = critic_forward(roles, config.objective, batch, step.x_m, batch.critic, grad=False)
    errors = (forward.x0_critic - step.x0).square().mean(1)
    weights = torch.tensor([min(1 / float(t / 1000) ** 2, limit) for t in batch.critic.tau])
    loss = float(critic_objective(roles, config.critic, batch, step, forward))
    assert loss == pytest.approx(float((weights * errors).mean()), rel=1e-5)
    assert (float(weights.max()) == limit) == (limit < 1e9)


def test_each_objective_is_chosen_by_its_settings_and_by_no_others() -> None:
    def settings(objective: Objective) -> tuple[str, str, str]:
        return objective.name, objective.gradient, objective.guidance_term

    names = list(dict.fromkeys(objective.name for objective in OBJECTIVES))
    chosen = {settings(objective): objective for objective in OBJECTIVES}
    assert len(chosen) == len(OBJECTIVES)
    for name, gradient, term in itertools.product(names, ("kl", "sid"), ("coupled", "decoupled")):
        config = ObjectiveConfig(name=name, gradient=gradient, guidance_term=term)  # type: ignore[arg-type]
        if (name, gradient, term) in chosen:
            assert objective_of(config) is chosen[name, gradient, term]
        else:
            with pytest.raises(TDMError, match=r"is for objective.name=matching"):
                objective_of(config)
    with pytest.raises(TDMError, match=r"objective\.name must be one of matching, consistency, regression, not 'gan'"):
        load_config(None, ["objective.name=gan"])


def test_the_guidance_term_moves_along_guidance_alone() -> None:
    x0 = torch.randn(3, 4, requires_grad=True)
    cond, uncond = torch.randn(3, 4), torch.randn(3, 4)
    guidance_loss(x0, cond, guided(cond, uncond, 3.0), kind="mse", normalise=False).backward()
    torch.testing.assert_close(-x0.grad * x0.numel(), 2.0 * (cond - uncond))
    x0.grad = None
    generator_loss(x0, cond, uncond, kind="mse", normalise=False).backward()
    torch.testing.assert_close(-x0.grad * x0.numel(), cond - uncond)


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_from_the_clean_prediction_the_state_does_not_matter(schedule: NoiseSchedule) -> None:
    """``x_tau = alpha x0 + sigma xi``, and the two critic targets are one."""
    config = config_of("trajectory.renoise=clean", "trajectory.bands=full")
    roles, batch = linear_roles(schedule), conditioned(batch_of(config, schedule))
    step = student_step(roles, batch, grad=False)
    forward = critic_forward(roles, config.objective, batch, step.x_m, batch.critic, grad=False)
    alpha, sigma = (expand(level, step.x0) for level in schedule.alpha_sigma(batch.critic.tau))
    torch.testing.assert_close(forward.noised.x_tau, alpha * step.x0 + sigma * batch.critic.xi)
    targets = [config_of("trajectory.renoise=clean", f"critic.target={t}").critic for t in ("clean", "subinterval")]
    one, two = (float(critic_objective(roles, critic, batch, step, forward)) for critic in targets)
    assert one == pytest.approx(two, rel=1e-6)
    low, high = config.trajectory.tau_min, config.trajectory.tau_max
    time = (batch.critic.tau - schedule.clean_timestep) / schedule.num_train_timesteps
    assert time.min() < low + 0.1
    assert time.max() > high - 0.1
    by_stage = [time[batch.stages == i] for i in range(4)]
    assert all(part.min() < 0.4 and part.max() > 0.6 for part in by_stage)  # no stage has a band of its own


def test_a_stochastic_student_starts_a_stage_with_fresh_noise() -> None:
    config = config_of("trajectory.sampler=stochastic", "trajectory.renoise=clean")
    gaussian = Gaussian(FLOW)
    roles, batch = ExactRoles(gaussian), batch_of(config, FLOW, 8)
    assert batch.fresh is not None
    x = start_states(roles, batch)  # type: ignore[arg-type]
    t, sigmas = batch.trajectory.timesteps, batch.trajectory.sigmas
    for i, stage in enumerate(batch.stages.tolist()):
        state = batch.noise[i : i + 1]
        for k in range(stage):
            x0 = gaussian.end(state, t[k : k + 1])
            state = (1 - sigmas[k + 1]) * x0 + sigmas[k + 1] * batch.fresh[i, k]
        torch.testing.assert_close(x[i : i + 1].detach(), state)


def test_with_fresh_noise_an_exact_student_draws_the_true_distribution() -> None:
    """This holds at every step count. One step takes no fresh noise and keeps the rank of the start noise."""
    gaussian = Gaussian(FLOW)
    noise, fresh = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1)).double(), None
    for steps in (1, 2, 4):
        fresh = torch.randn(20_000, steps, 1, generator=torch.Generator().manual_seed(2)).double()
        predict = with_fresh_noise(ExactRoles(gaussian).student, fresh)
        x = sample(predict, FLOW, [1000 * (steps - i) / steps for i in range(steps)], noise, {})
        assert float(x.mean()) == pytest.approx(1.5, abs=0.02)
        assert float(x.std()) == pytest.approx(0.6, abs=0.01)
        rank = torch.corrcoef(torch.stack([x[:, 0], noise[:, 0]]))[0, 1]
        assert (float(rank) > 0.999) == (steps == 1)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["trajectory.bands=full"], "trajectory.bands=full goes below the states; set trajectory.renoise=clean"),
        (["objective.name=regression", "objective.gradient=sid"], "sid is for objective.name=matching, not regression"),
        (["objective.name=consistency", "critic.head_start=5"], "trains no critic"),
        (["objective.guidance_term=decoupled", "objective.rho=mse"], "a guidance_scale above 1"),
        (["objective.guidance_term=decoupled", "objective.guidance_scale=3"], "needs objective.rho=mse"),
        (["objective.guidance_term=decoupled", "objective.rho=vector_huber"], "needs objective.rho=mse"),
        (["trajectory.bands=below"], "trajectory.bands=below goes below the states; set trajectory.renoise=clean"),
        (["objective.guided_critic=true"], "guided_critic is for objective.gradient=sid"),
        (["objective.norm_max=0.001"], "norm_max must be above norm_min"),
        (["trajectory.eta=0.5"], "trajectory.eta below 1 is for trajectory.sampler=stochastic"),
        (["trajectory.eta=0", "trajectory.sampler=stochastic"], "trajectory.eta must be above 0"),
        (["critic.skip_above=0"], "critic.skip_above must be positive"),
        (["critic.leash=-1"], "critic.leash must not be negative"),
        (["objective.gradient=sid", "critic.share_noise=true"], "share_noise is for"),
        (["objective.ode_steps=3"], "at least trajectory.steps"),
        (["trajectory.unify=[1,2]"], r"trajectory.steps \(it is 4\) among them"),
        (["trajectory.unify=[1,4]", "trajectory.timesteps=[999,749,499,249]"], "leave it out with unify"),
        (["objective.gradient=kL"], "must be one of kl, sid"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(TDMError, match=line):
        load_config(None, overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_every_objective_trains_the_mixture_through_the_same_loop(name: str, tmp_path) -> None:
    small = ["updates=4", "batch_size=16", "student.rank=2", "critic.rank=2", "output.evaluate_every=4"]
    config = load_config(["mixture", name], [*small, "objective.guidance_scale=2", "output.teacher_steps=4"])
    written: dict[str, float] = {}
    run = distill(
        MixtureTask(width=8, samples=100), config, tmp_path, report=lambda _: None,
        callbacks=[lambda _run, line: written.update(line)],
    )  # fmt: skip
    assert math.isfinite(written["eval/energy"])
    assert math.isfinite(written["student_loss"])
    matching = config.objective.name == "matching"
    assert ("critic_loss" in written) == matching
    learned = {role: any(bool(w.any()) for n, w in run.roles.state(role).items() if "lora_B" in n) for role in ROLES}
    assert learned == {"student": True, "critic": matching}
