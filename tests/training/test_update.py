"""One update: its cost in network passes, what it changes, and what it leaves alone."""

import copy

import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.schedule import NoiseSchedule
from tdm.training.batch import Batch, draw_batch
from tdm.training.config import DistillConfig
from tdm.training.cost import head_start_passes, passes
from tdm.training.loop import draw_steps
from tdm.training.losses import generator_loss
from tdm.training.objectives import objective_of
from tdm.training.processes import Processes
from tdm.training.roles import ROLES, AdapterRoles
from tdm.training.settings import load_config
from tdm.training.trajectory import build_trajectories
from tdm.training.update import update
from torch.optim import SGD

FLOW = NoiseSchedule.flow()


class Bench:
    """A conditional linear model under the real update, counting every sample that goes through the network."""

    def __init__(self, *overrides: str, seed: int = 0, batch: int = 8) -> None:
        torch.manual_seed(0)
        self.config: DistillConfig = load_config(
            None, [f"batch_size={batch}", "trajectory.stages=sample", "student.rank=2", "critic.rank=2", *overrides]
        )
        self.base = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.generator = torch.Generator().manual_seed(seed)
        self.passes = {"forward": 0, "with_grad": 0}
        self.roles = AdapterRoles(
            self.base,
            self.call,
            schedule=FLOW,
            prediction_type="flow_prediction",
            targets={"student": ["0", "2"], "critic": ["0", "2"]},
            rank={"student": 2, "critic": 2},
            alpha={"student": None, "critic": None},
            generator=self.generator,
        )
        self.trajectories = build_trajectories(self.config.trajectory, FLOW)
        self.optimizers = {role: SGD(self.roles.parameters(role), lr=0.1) for role in ROLES}
        self.batches = 0

    def call(self, base, x, timesteps, cond):
        self.passes["forward"] += len(x)
        self.passes["with_grad"] += len(x) * torch.is_grad_enabled()
        return base(torch.cat([x, cond["c"]], 1)) * (0.5 + timesteps[:, None] / 1000)

    def draw(self, student: bool) -> list[Batch]:
        self.batches += 1
        n = self.config.batch_size
        cond, null = {"c": torch.ones(n, 1)}, {"c": torch.zeros(n, 1)}
        batch = draw_batch(
            self.trajectories[draw_steps(self.trajectories, self.generator)],
            cond,
            null,
            (n, 2),
            self.generator,
            student=student,
            guidance_band=objective_of(self.config.objective).guidance_band(self.config.objective),
        )
        count = n // (self.config.micro_batch_size or n)
        return [batch.part(i, count) for i in range(count)]

    def update(self, **kwargs):
        args = (self.roles, self.config, self.draw, self.optimizers, Processes())
        return update(*args, **kwargs)


@pytest.mark.parametrize(
    ("overrides", "forwards", "with_grad"),
    [
        (["objective.guidance_scale=4.5"], 6.5, 2),
        ([], 5.5, 2),  # no guidance: no unconditional pass
        (["objective.guidance_scale=4.5", "critic.per_student=2"], 10.0, 3),  # 1.5 prefix + student + critic more
        (["objective.guidance_scale=4.5", "trajectory.steps=1"], 5.0, 2),
        (["objective.guidance_scale=4.5", "trajectory.steps=2"], 5.5, 2),
        (["objective.guidance_scale=4.5", "critic.share_noise=true"], 5.5, 2),  # what the critic learned from, it knows
        (["objective.guidance_scale=4.5", "critic.share_noise=true", "critic.per_student=2"], 9.0, 3),
        (["objective.guidance_scale=4.5", "micro_batch_size=2"], 7.5, 2),  # the student's step again, for its gradient
        (["objective.guidance_scale=4.5", "micro_batch_size=2", "critic.share_noise=true"], 5.5, 2),
        (["objective.guidance_scale=4.5", "objective.guidance_term=decoupled", "objective.rho=mse"], 7.5, 2),
        (["objective.guidance_scale=4.5", "critic.leash=0.02"], 7.5, 2),
        (["objective.guidance_scale=4.5", "critic.leash=0.02", "critic.per_student=2"], 12.0, 3),
        (["objective.guidance_scale=4.5", "trajectory.sampler=stochastic", "trajectory.renoise=clean"], 6.5, 2),
        (["objective.guidance_scale=4.5", "objective.name=consistency"], 6.5, 1),
        (["objective.guidance_scale=4.5", "objective.name=consistency", "micro_batch_size=2"], 6.5, 1),
        (["objective.guidance_scale=4.5", "objective.name=regression", "objective.ode_steps=16"], 22.5, 1),
        (["objective.name=regression", "objective.ode_steps=8", "trajectory.shift=3"], 7.5, 1),
    ],
)
def test_passes_of_an_update(overrides, forwards, with_grad):
    bench = Bench(*overrides)
    for _ in range(10):
        bench.update()
    samples = 10 * bench.config.batch_size
    assert bench.passes["forward"] / samples == forwards
    assert bench.passes["with_grad"] / samples == with_grad
    assert (passes(bench.config).forwards, passes(bench.config).backwards) == (forwards, with_grad)  # as is estimated


@pytest.mark.parametrize(("guided", "forwards", "with_grad"), [("false", 6.5, 5), ("true", 8.5, 7)])
def test_a_guided_critic_makes_each_of_its_passes_twice(guided: str, forwards: float, with_grad: int) -> None:
    """SiD's backward also goes through the teacher's two passes, and the critic's."""
    bench = Bench("objective.guidance_scale=4.5", "objective.gradient=sid", f"objective.guided_critic={guided}")
    for _ in range(10):
        bench.update()
    expected, samples = passes(bench.config), 10 * bench.config.batch_size
    assert bench.passes["forward"] / samples == expected.forwards == forwards
    assert bench.passes["with_grad"] / samples == expected.backwards + expected.looked_through == with_grad


def test_passes_are_the_same_on_average_with_one_stage_per_update():
    bench = Bench("objective.guidance_scale=4.5", "trajectory.stages=update")
    for _ in range(400):
        bench.update()
    assert bench.passes["forward"] / (400 * 8) == pytest.approx(6.5, abs=0.15)


def test_a_unified_students_passes_are_a_mean_over_its_step_counts():
    bench = Bench("objective.guidance_scale=4.5", "trajectory.unify=[1,2,4,8]", "trajectory.spread=0.01")
    for _ in range(400):
        bench.update()
    assert passes(bench.config).forwards == 5 + (0 + 1 + 3 + 7) / 8
    assert bench.passes["forward"] / (400 * 8) == pytest.approx(passes(bench.config).forwards, abs=0.15)


def test_both_roles_learn_and_the_base_is_bit_equal():
    bench = Bench("objective.guidance_scale=2", "critic.target=subinterval")
    trained = {id(p) for role in ROLES for p in bench.roles.parameters(role)}
    frozen = {name: p.clone() for name, p in bench.base.named_parameters() if id(p) not in trained}
    before = {role: bench.roles.state(role) for role in ROLES}
    x, t, cond = torch.randn(4, 2), torch.full((4,), 500.0, dtype=torch.float64), {"c": torch.ones(4, 1)}
    teacher = bench.roles.teacher(x, t, cond)[0]
    metrics = [bench.update() for _ in range(3)][-1]
    assert len(frozen) == 4
    assert all(torch.equal(dict(bench.base.named_parameters())[name], p) for name, p in frozen.items())
    assert torch.equal(bench.roles.teacher(x, t, cond)[0], teacher)
    for role in ROLES:
        assert any(not torch.equal(bench.roles.state(role)[key], value) for key, value in before[role].items())
    stages = {f"gap_{i}" for i in range(4)}
    assert set(metrics) == {"critic_loss", "critic_grad", "student_loss", "student_grad", "std_ratio"} | stages
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in metrics.values())


def test_head_start_trains_the_critic_alone():
    bench = Bench()
    student, critic = bench.roles.state("student"), bench.roles.state("critic")
    metrics = bench.update(train_student=False)
    assert all(torch.equal(value, student[key]) for key, value in bench.roles.state("student").items())
    assert any(not torch.equal(value, critic[key]) for key, value in bench.roles.state("critic").items())
    assert set(metrics) == {"critic_loss", "critic_grad"}
    assert metrics["critic_grad"] > 0


def test_an_update_of_a_head_start_is_one_of_the_critic():
    bench = Bench("critic.per_student=3")
    bench.update(train_student=False)
    assert bench.batches == 1
    samples, expected = bench.config.batch_size, head_start_passes(bench.config)
    assert bench.passes["forward"] / samples == expected.forwards == 1.5 + 1 + 1
    assert bench.passes["with_grad"] / samples == expected.backwards == 1


@pytest.mark.parametrize(("limit", "skipped"), [(1e-9, True), (1e9, False)])
def test_a_step_of_the_critic_with_a_loss_above_the_limit_is_skipped(limit: float, skipped: bool) -> None:
    bench = Bench(f"critic.skip_above={limit}", "objective.guidance_scale=3")
    critic = bench.roles.state("critic")
    metrics = bench.update()
    same = all(torch.equal(value, critic[key]) for key, value in bench.roles.state("critic").items())
    assert same == skipped
    assert float(metrics["critic_skipped"]) == skipped
    assert metrics["student_grad"] > 0


def test_each_critic_update_has_its_own_batch():
    bench = Bench("critic.per_student=3")
    bench.update()
    assert bench.batches == 3


def test_the_same_seed_is_the_same_update_bit_for_bit():
    one, two, other = Bench(seed=1), Bench(seed=1), Bench(seed=2)
    for bench in (one, two, other):
        for _ in range(3):
            bench.update()
    for role in ROLES:
        a, b, c = (bench.roles.state(role) for bench in (one, two, other))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("share", ["true", "false"])
@pytest.mark.parametrize("stages", ["sample", "update"])
def test_micro_batches_make_the_update_of_the_whole_batch(share, stages):
    """Three updates of SGD in float32 agree to 1e-6. Only the order of sums differs."""
    options = [f"critic.share_noise={share}", f"trajectory.stages={stages}", "objective.guidance_scale=3"]
    whole, micro = Bench(*options), Bench(*options, "micro_batch_size=2")
    for _ in range(3):
        one, two = whole.update(), micro.update()
    for role in ROLES:
        for key, value in whole.roles.state(role).items():
            assert torch.allclose(value, micro.roles.state(role)[key], rtol=0, atol=1e-6)
    for name in ("critic_loss", "critic_grad", "student_loss", "student_grad"):
        assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4)


def test_sharing_takes_the_critic_before_its_step():
    """A critic with an absurd rate changes the student's next update, not the one that shares its noise."""
    states = []
    for lr in (0.1, 100.0):
        bench = Bench("critic.share_noise=true", "objective.guidance_scale=3")
        bench.optimizers["critic"].param_groups[0]["lr"] = lr
        bench.update()
        states.append(bench.roles.state("student"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_perfect_student_is_at_rest():
    """With the student's states distributed as the teacher's and a critic equal to the teacher, nothing pushes it."""
    bench = Bench()
    bench.optimizers["critic"].param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(bench.roles.state("student"))
    metrics = bench.update()  # both adapters still are the teacher: the direction is 0
    assert metrics["student_grad"].item() == 0
    assert all(torch.equal(value, before[key]) for key, value in bench.roles.state("student").items())


def test_each_stage_has_its_own_guidance():
    """One number for all stages is the plain scale; a stage that asks for another gets it."""

    def student(*overrides):
        bench = Bench("objective.guidance_scale=3", *overrides)
        bench.update()
        return bench.roles.state("student")

    plain, same = student(), student("objective.stage_guidance=[3,3,3,3]")
    other = student("objective.stage_guidance=[3,3,3,1]")
    assert all(torch.allclose(plain[key], same[key], rtol=0, atol=1e-7) for key in plain)
    assert any(not torch.allclose(plain[key], other[key], rtol=0, atol=1e-4) for key in plain)
    with pytest.raises(TDMError, match="needs 4 numbers of at least 1"):
        load_config(None, ["objective.guidance_scale=3", "objective.stage_guidance=[3,3]"])


def test_a_leash_holds_the_critic_near_the_teacher() -> None:
    """With a strong leash the critic stays nearer to its initial weights."""
    apart = []
    for leash in ("0", "1000"):
        bench = Bench(f"critic.leash={leash}", "student.lr=1e-9")
        for _ in range(20):
            bench.update()
        x, t, cond = torch.ones(4, 2), torch.full((4,), 500.0, dtype=torch.float64), {"c": torch.ones(4, 1)}
        with torch.no_grad():
            apart.append(float((bench.roles.critic(x, t, cond)[0] - bench.roles.teacher(x, t, cond)[0]).abs().max()))
    assert apart[1] < 0.5 * apart[0]


def test_the_normaliser_has_limits_on_both_sides() -> None:
    x0, far = torch.zeros(1, 4, requires_grad=True), torch.full((1, 4), 8.0)
    losses = [
        float(generator_loss(x0, far, torch.zeros(1, 4), kind="mse", norm_min=0.01, norm_max=limit).detach())
        for limit in (None, 5.0, 16.0)
    ]
    assert losses == pytest.approx([32 / 8, 32 / 5, 32 / 8])
