"""A run while it is trained: what the loop and its callbacks work with."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import TDMError
from ..pipelines.families.base import on_device
from ..pipelines.schedule import uniform_grid
from ..pipelines.students.file import Student
from .config import DistillConfig
from .export import student_of, training_notes
from .roles import STEPS, Ema, Roles
from .stages import Stage, total_updates
from .task import Sample, Task, Teacher
from .trajectory import Condition, Predict, Trajectory, sample, with_fresh_noise

CRITIC_SEED = 1_000  # of the noise in Run.critic: not that of any task's previews


@dataclass
class Run:
    """A run as callbacks and callers see it. ``step`` counts updates done, and ``stage`` is the one that it is in;
    `as_student` is the student to use.
    """

    task: Task
    config: DistillConfig
    out_dir: Path
    roles: Roles
    trajectories: dict[int, Trajectory]
    ema: Ema
    stage: Stage
    step: int = 0

    @property
    def trajectory(self) -> Trajectory:
        """The trajectory of the stage's ``trajectory.steps``, on which previews and evaluation are made."""
        return self.trajectories[self.stage.config.trajectory.steps]

    @property
    def updates(self) -> int:
        """All updates of the run."""
        return total_updates(self.config)

    def with_steps(self, cond: Condition, steps: int, n: int) -> Condition:
        """The condition of ``n`` samples, for a unified student with their step count (`STEPS`)."""
        if len(self.trajectories) == 1 or self.stage.config.trajectory.tell_steps == "none":
            return cond
        return {**cond, STEPS: torch.full((n,), list(self.trajectories).index(steps))}

    def as_student(self) -> Student:
        """The student as it is now (mean weights), for `TDMPipeline.from_pretrained`. It is a copy: later updates leave
        it alone.

        Raises:
            TDMError: the task is no pipeline, or the run trains what no student file holds (see `student_of`).
        """
        recipe = self.task.recipe(self.trajectories)
        if recipe is None:
            raise TDMError("this task is no pipeline, so that its student cannot be loaded in one; use Run.student")
        weights = {name: weight.to("cpu", copy=True) for name, weight in self.ema.weights.items()}
        notes = recipe.notes | training_notes(self.config, self.step)
        return student_of(self.config, replace(recipe, notes=notes), weights)

    def student(self, noise: Tensor, cond: Condition, steps: int | None = None) -> Tensor:
        """Samples ``[B, ...]`` of the student (mean weights) from ``noise`` of that shape, on its grid of ``steps``.
        None means `trajectory`.
        """
        trajectory = self.trajectory if steps is None else self.trajectories[steps]
        predict: Predict = self.roles.student
        if trajectory.config.sampler == "stochastic":
            predict = with_fresh_noise(predict, _fresh(noise, len(trajectory)), trajectory.config.eta)
        cond = on_device(self.with_steps(cond, len(trajectory), len(noise)), noise.device)
        with self.ema.applied():
            return sample(predict, self.task.schedule, trajectory.timesteps.tolist(), noise, cond)

    def evaluate(self) -> dict[str, float]:
        """The task's measures of the student; a unified one's other step counts as ``<measure>/<K>_steps``."""
        measures = self.task.evaluate(self.student, self.teacher)
        for k in self.trajectories:
            if k != len(self.trajectory):
                others = self.task.evaluate(functools.partial(self.student, steps=k), self.teacher)
                student = {name: value for name, value in others.items() if not name.startswith("teacher_")}
                measures |= {f"{name}/{k}_steps": value for name, value in student.items()}
        return measures

    @property
    def teacher(self) -> Teacher:
        """Samples of the teacher with the stage's guidance on ``output.teacher_steps`` uniform steps."""
        w, shift = self.stage.config.objective.guidance_scale, self.stage.config.trajectory.shift
        grid = uniform_grid(self.config.output.teacher_steps, self.task.schedule, shift)
        draw = guided_sampler(self.roles, self.task, w, grid)
        return Teacher(draw, {"guidance_scale": w, "timesteps": grid, "precision": self.roles.precision})

    @torch.no_grad()
    def critic(self, noise: Tensor, cond: Condition) -> Tensor:
        """The critic's clean prediction ``[B, ...]`` of the student's samples from ``noise``, noised again.
        Up to the student's last timestep, the noisiest state of clean samples that the critic is trained on with
        separate bands, and half of the range at most. The noise is the same each time.
        """
        x0, last = self.student(noise, cond), len(self.trajectory) - 1
        stages = torch.full((len(x0),), last)
        tau = self.trajectory.timesteps[stages].clamp_max(self.task.schedule.num_train_timesteps // 2)
        xi = torch.randn(x0.shape, generator=torch.Generator().manual_seed(CRITIC_SEED)).to(x0)
        cond = on_device(self.with_steps(cond, len(self.trajectory), len(x0)), x0.device)
        return self.roles.critic(self.trajectory.renoise(x0, stages, tau, xi).x_tau, tau, cond)[0]

    @torch.no_grad()
    def base_is_finite(self) -> bool:
        """Whether the teacher's prediction for one prompt, at the student's last timestep, is finite."""
        generator = torch.Generator().manual_seed(0)
        cond, shape = self.task.conditions(1, generator)
        x = torch.randn(1, *shape, generator=generator).to(self.task.device)
        cond = on_device(cond, x.device)
        return all(bool(part.isfinite().all()) for part in self.roles.teacher(x, self.trajectory.timesteps[-1:], cond))

    def due(self, every: int) -> bool:
        """Whether something that happens ``every`` so many updates (0 is never), and at the end of each stage, happens
        now.
        """
        return every > 0 and (self.step % every == 0 or self.step == self.stage.end)


def guided_sampler(roles: Roles, task: Task, guidance_scale: float, timesteps: Sequence[float]) -> Sample:
    """Samples of the guided teacher on a grid of ``timesteps``."""

    def draw(noise: Tensor, cond: Condition) -> Tensor:
        null = task.null(cond)

        def guided(x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
            return roles.guided_teacher(x, timesteps, cond, null, guidance_scale)

        return sample(guided, task.schedule, timesteps, noise, cond)

    return draw


def _fresh(noise: Tensor, steps: int) -> Tensor:
    """The noise ``[B, K, ...]`` of a stochastic sampler's steps. It follows from the start noise ``[B, ...]``, so that
    a seed stays one sample.
    """
    each = []
    for first in noise.cpu():
        generator = torch.Generator().manual_seed(zlib.crc32(first.numpy().tobytes()))
        each.append(torch.randn(steps, *first.shape, generator=generator))
    return torch.stack(each).to(noise.device)


Callback = Callable[[Run, dict[str, float]], None]
"""Called with the run and each line that goes to metrics.jsonl; raise from it to stop."""
