"""Objectives without a critic: the student's prediction against a target that the teacher's ODE gives.

Both start from states of the student's own trajectory, so neither needs pictures.

- ``consistency``, latent consistency distillation (LCM, arXiv 2310.04378): the student's x0 at ``x_tau`` against its
  own x0 where one guided step of the teacher takes ``x_tau``.
- ``regression``: the student's x0 where a stage starts against the end of the teacher's guided ODE from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...pipelines.schedule import ddim_step, expand, grid_pairs, shift_sigma, uniform_grid, unshift_sigma
from ..batch import Batch
from ..config import DistillConfig, ObjectiveConfig
from ..losses import regression_loss
from ..roles import Roles
from ..trajectory import Condition, Trajectory
from .guidance import guidance_at
from .matching import CriticForward, Metrics, StudentStep
from .passes import Passes, prefix_passes, step_counts, teacher_passes


def consistency_objective(
    roles: Roles, config: ObjectiveConfig, batch: Batch, step: StudentStep, _forward: CriticForward | None
) -> tuple[Tensor, Metrics]:
    """The student's loss of LCM (arXiv 2310.04378): its x0 at ``x_tau`` against its own x0 where one guided step of the
    teacher, ``1 / ode_steps`` of the time range, takes ``x_tau``.

    Args:
        step: needs no graph.
    """
    assert batch.student is not None  # as asked of draw
    trajectory, (tau, xi) = batch.trajectory, batch.student
    schedule = trajectory.schedule
    x_tau = trajectory.renoise(step.x_m, batch.stages, tau, xi).x_tau
    with torch.no_grad():
        w = guidance_at(config, trajectory, tau, batch.scale)
        x0_teacher, eps = roles.guided_teacher(x_tau, tau, batch.cond, batch.null, w)
        later = later_timesteps(trajectory, tau, config.ode_steps)
        ended = later == schedule.clean_timestep
        # Where the step ends clean nothing is left to predict: the network is called there all the same, at the least
        # noise that it knows, and its answer is not used.
        later = torch.where(ended, schedule.clean_timestep + 1.0, later)
        alpha, sigma = schedule.alpha_sigma(later)
        x_later = ddim_step(x0_teacher, eps, expand(alpha, x0_teacher), expand(sigma, x0_teacher))
        x0_later, _ = roles.student(x_later, later, batch.cond)
        target = torch.where(expand(ended.float(), x0_teacher) > 0, x0_teacher, x0_later)
    x0, _ = roles.student(x_tau, tau, batch.cond)
    return _loss(config, x0, target)


def later_timesteps(trajectory: Trajectory, tau: Tensor, ode_steps: int) -> Tensor:
    """Timesteps ``1 / ode_steps`` of the unshifted time below each tau ``[B]``; the clean end if that is below it."""
    schedule, shift = trajectory.schedule, trajectory.config.shift
    n, clean = schedule.num_train_timesteps, schedule.clean_timestep
    time = (unshift_sigma((tau - clean) / n, shift) - 1 / ode_steps).clamp_min(0)
    timesteps = shift_sigma(time, shift) * n + clean
    return timesteps if schedule.kind == "flow" else timesteps.round()


def regression_objective(
    roles: Roles, config: ObjectiveConfig, batch: Batch, step: StudentStep, _forward: CriticForward | None
) -> tuple[Tensor, Metrics]:
    """The student's x0 at the states where its stages start against where the teacher's guided ODE takes them.

    Args:
        step: carries the student's graph.
    """
    latest_first = batch.stages.unique().flip(0).tolist()  # the order of the batch
    target = torch.cat([_ode_end(roles, config, batch, step.x, stage) for stage in latest_first])
    return _loss(config, step.x0, target)


@torch.no_grad()
def _ode_end(roles: Roles, config: ObjectiveConfig, batch: Batch, x: Tensor, stage: int) -> Tensor:
    """Where guided steps of the teacher take those of the states ``x`` ``[B, ...]`` that are of one stage."""
    here = (batch.stages == stage).nonzero()[:, 0]  # of the CPU's stages: a mask would wait for the device
    on_device = here.to(x.device)
    x = x[on_device]
    cond, null = ({key: value[on_device] for key, value in c.items()} for c in (batch.cond, batch.null))
    grid = ode_grid(batch.trajectory, stage, config.ode_steps)

    def w(timesteps: Tensor) -> float | Tensor:
        return guidance_at(config, batch.trajectory, timesteps, None if batch.scale is None else batch.scale[here])

    return teacher_ode(roles, grid, grid_pairs(batch.trajectory.schedule, grid), x, cond, null, w)


@torch.no_grad()
def teacher_ode(
    roles: Roles,
    timesteps: Sequence[float],
    levels: tuple[Tensor, Tensor],
    x: Tensor,
    cond: Condition,
    null: Condition,
    guidance_scale: Callable[[Tensor], float | Tensor],
) -> Tensor:
    """Where guided steps of the teacher's ODE take the states ``x`` ``[B, ...]``.

    Args:
        timesteps: K, a step from each.
        levels: alphas and sigmas ``[K + 1]``, where each step starts and the last one ends.
        guidance_scale: of timesteps ``[B]``.
    """
    alphas, sigmas = levels
    for i, t in enumerate(timesteps):
        here = torch.full((len(x),), t, dtype=torch.float64)
        x0, eps = roles.guided_teacher(x, here, cond, null, guidance_scale(here))
        x = ddim_step(x0, eps, float(alphas[i + 1]), float(sigmas[i + 1]))
    return x


def ode_grid(trajectory: Trajectory, stage: int, ode_steps: int) -> list[float]:
    """The teacher's timesteps from where a stage starts: there, and what its own grid of ``ode_steps`` has below."""
    first = float(trajectory.timesteps[stage])
    teacher_grid = uniform_grid(ode_steps, trajectory.schedule, trajectory.config.shift)
    return [first, *(t for t in teacher_grid if t < first - 1e-6)]


def _loss(config: ObjectiveConfig, x0: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
    loss = regression_loss(x0, target, kind=config.rho, c=config.huber_c)
    return loss, {"student_loss": loss.detach(), "std_ratio": x0.detach().std() / target.std()}


def consistency_passes(config: DistillConfig, _split: bool) -> Passes:
    """Three of the student: the sample, the target and the prediction."""
    return Passes(
        prefix_passes(config),
        student=3,
        critic=0,
        teacher=teacher_passes(config),
        score=0,
        student_backward=1,
        critic_backward=0,
    )


def regression_passes(config: DistillConfig, _split: bool) -> Passes:
    """Mostly the teacher's ODE: its grid has about ``ode_steps (K - i) / K`` steps below where stage i starts."""
    counts = step_counts(config)
    ode = sum(round(config.objective.ode_steps * (k - i) / k) / k for k in counts for i in range(k)) / len(counts)
    return Passes(
        prefix_passes(config),
        student=1,
        critic=0,
        teacher=teacher_passes(config) * ode,
        score=0,
        student_backward=1,
        critic_backward=0,
    )
