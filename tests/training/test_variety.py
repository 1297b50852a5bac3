"""The terms against the loss of variety: where they pull, what they leave alone, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.schedule import NoiseSchedule, expand
from tdm.training.cost import micro_batches, passes
from tdm.training.loop import distill
from tdm.training.losses import spread_loss
from tdm.training.objectives.matching import student_step
from tdm.training.objectives.towards import teacher_ode
from tdm.training.objectives.variety import anchor_grid, variety_loss, x0_towards
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import MixtureTask
from tdm.training.trajectory import Trajectory, build_trajectories
from torch import Tensor

from .test_objectives import FLOW, VP, Gaussian, batch_of, conditioned, config_of, linear_roles
from .test_update import Bench


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_the_anchor_leads_to_the_end_of_the_teachers_ode(schedule: NoiseSchedule) -> None:
    """With a teacher whose ODE is known, in many steps."""
    gaussian, config = Gaussian(schedule), config_of()
    trajectory = Trajectory(config.trajectory, schedule)
    grid = anchor_grid(trajectory, 200)
    start, end = (torch.full((64,), t, dtype=torch.float64) for t in (grid[0], grid[-1]))
    assert (grid[0], grid[-1]) == tuple(trajectory.timesteps[:2].tolist())
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Roles:
        def guided_teacher(self, x: Tensor, timesteps: Tensor, cond: object, *_rest: object) -> tuple[Tensor, Tensor]:
            return gaussian.predict(x, timesteps, cond)

    roles: Any = Roles()
    levels = schedule.alpha_sigma(torch.tensor(grid, dtype=torch.float64))
    state = teacher_ode(roles, grid[:-1], levels, x, {}, {}, lambda _timesteps: 1.0)
    clean = gaussian.end(x, start)
    alpha, sigma = (expand(level, x) for level in schedule.alpha_sigma(end))
    spread = ((alpha * gaussian.std).square() + sigma.square()).sqrt()
    exact = alpha * gaussian.mean + spread * (clean - gaussian.mean) / gaussian.std
    torch.testing.assert_close(state, exact, rtol=0, atol=5e-3)

    x0 = x0_towards(trajectory, grid, x, state)
    alpha, sigma = (expand(level, x) for level in schedule.alpha_sigma(start))
    stages = torch.zeros(64, dtype=torch.int64)
    torch.testing.assert_close(trajectory.step(x0, (x - alpha * x0) / sigma, stages), state)


def test_whole_timesteps_make_no_step_twice() -> None:
    trajectory = Trajectory(config_of("trajectory.timesteps=[999,997,500,250]", "trajectory.margin=0.001",
                                      "trajectory.tau_max=0.9995").trajectory, VP)  # fmt: skip
    assert anchor_grid(trajectory, 4) == [999.0, 998.0, 997.0]


def test_spread_pushes_apart_what_is_of_one_prompt_whatever_its_scale() -> None:
    groups = torch.tensor([[[0.0, 0.0], [5.0, 5.0]], [[3.0, 4.0], [5.0, 6.0]]], dtype=torch.float64)  # [G, N, D]
    for scale in (1.0, 100.0):
        x = (scale * groups).requires_grad_(True)
        loss = spread_loss(x)
        assert loss.item() == pytest.approx(-1.0)
        loss.backward()
        assert x.grad is not None
        moved = -x.grad
        torch.testing.assert_close(moved[1] / moved[1].norm(dim=1, keepdim=True),
                                   torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64))  # fmt: skip
        torch.testing.assert_close(moved[0], -moved[1])
        # Growing all distances by one hundredth gains one hundredth, whatever they are.
        torch.testing.assert_close((moved * x.detach()).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_samples_that_are_one_and_the_same_give_no_infinite_gradient() -> None:
    x = torch.ones(4, 2, 8, requires_grad=True)
    spread_loss(x).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("setting", ["objective.anchor=1", "objective.spread=1"])
def test_only_the_first_step_and_only_the_student_are_moved(setting: str) -> None:
    config = load_config(None, ["batch_size=8", setting, "samples_per_prompt=2"])
    roles, batch = linear_roles(), conditioned(batch_of(config, FLOW, 8))
    for stage in range(4):
        batch = batch._replace(stages=torch.full((8,), stage))
        step = student_step(roles, batch, grad=True)
        loss = variety_loss(roles, config, batch, step)
        assert (loss is not None) == (stage == 0)
        if loss is not None:
            loss.backward()
            assert any(bool(w.grad.any()) for w in roles.parameters("student") if w.grad is not None)
            assert all(w.grad is None for w in roles.parameters("critic"))


def test_the_only_step_of_a_unified_student_has_no_anchor() -> None:
    config = load_config(None, ["batch_size=8", "objective.anchor=1", "trajectory.unify=[1,4]"])
    for steps, trajectory in build_trajectories(config.trajectory, FLOW).items():
        roles, batch = linear_roles(), conditioned(batch_of(config, FLOW, 8))
        batch = batch._replace(trajectory=trajectory, stages=torch.zeros(8, dtype=torch.int64))
        step = student_step(roles, batch, grad=True)
        assert (variety_loss(roles, config, batch, step) is None) == (steps == 1)


@pytest.mark.parametrize(
    ("settings", "teacher"), [(["objective.anchor_steps=4"], 4), (["objective.anchor_steps=2"], 3)]
)
def test_the_anchors_passes_are_counted(settings: list[str], teacher: int) -> None:
    bench = Bench("objective.guidance_scale=4.5", "objective.anchor=1", *settings)
    for _ in range(10):
        bench.update()
    counted = passes(bench.config)
    assert counted.teacher == teacher
    assert bench.passes["forward"] / (10 * bench.config.batch_size) == counted.forwards == 4.5 + teacher


class Prompts(MixtureTask):
    """Every condition is another number, so that a batch tells which samples are of one prompt."""

    drawn = 0

    def __init__(self) -> None:
        super().__init__("flow", width=8, samples=16)
        self.numbers: list[Tensor] = []

    def conditions(self, n: int, generator: torch.Generator) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        self.drawn = n
        _, shape = super().conditions(n, generator)
        return {"number": torch.arange(n, dtype=torch.float32)[:, None]}, shape

    def null(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return cond

    def call(self, base: Any, x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.numbers.append(cond["number"][:, 0])
        return super().call(base, x, timesteps, {})


def test_samples_of_one_prompt_stay_in_one_micro_batch(tmp_path: Any) -> None:
    task = Prompts()
    config = load_config(
        "mixture",
        ["updates=1", "batch_size=12", "micro_batch_size=4", "samples_per_prompt=2", "objective.spread=1",
         "output.preview_every=0", "output.evaluate_every=0"],
    )  # fmt: skip
    distill(task, config, tmp_path, report=lambda _: None)
    assert task.drawn == 6
    of_updates = [numbers for numbers in task.numbers if len(numbers) == 4]
    assert of_updates
    for numbers in of_updates:
        first, second = numbers.chunk(2)
        assert torch.equal(first, second)
        assert len(set(first.tolist())) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.spread=1"], "objective.spread needs samples_per_prompt above 1"),
        (["objective.spread=1", "samples_per_prompt=2", "trajectory.stages=sample"], "trajectory.stages=update"),
        (["samples_per_prompt=3"], "samples_per_prompt must divide batch_size, which is 16; 3 does not"),
        (["objective.anchor=-1"], "must not be negative"),
        (["objective.anchor=1", "trajectory.steps=1"], "the only step of a student ends in the picture"),
        (["objective.anchor=1", "objective.anchor_steps=0"], "objective.anchor_steps must be positive"),
        (["objective.anchor=1", "objective.name=consistency"], "objective.name=consistency does not train steps"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(TDMError, match=message):
        load_config(None, settings)


def test_a_micro_batch_holds_whole_groups() -> None:
    config = load_config(None, ["batch_size=12", "micro_batch_size=3", "samples_per_prompt=2"])
    with pytest.raises(TDMError, match=r"samples of one prompt \(2\) stay together: make micro_batch_size, which is 3"):
        micro_batches(config)
