"""What keeps a student varied: two terms on its first step, which every objective can have.

The first step decides layout and colours, and there a student loses most of its teacher's variety.

- anchor (``objective.anchor``): the first step is pulled to where the guided teacher is at the end of it.
- spread (``objective.spread``): predictions for one prompt from several noises are pushed apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...pipelines.schedule import shift_sigma, unshift_sigma
from ..batch import Batch
from ..config import DistillConfig
from ..losses import regression_loss, spread_loss
from ..roles import Roles
from ..trajectory import Trajectory
from .matching import StudentStep
from .passes import step_counts, teacher_passes
from .towards import teacher_ode


def variety_loss(roles: Roles, config: DistillConfig, batch: Batch, step: StudentStep) -> Tensor | None:
    """The terms of a micro batch, a scalar. None: the run has no such term, or the batch no first step.

    A student of one step has no anchor: its first step ends in the picture, where a regression blurs.

    Args:
        step: carries the student's graph.
    """
    objective, n = config.objective, int((batch.stages == 0).sum())
    if n == 0:
        return None
    first = slice(len(batch.stages) - n, None)  # latest first: the first stage is the end of the batch
    x0, terms = step.x0[first], []
    if objective.anchor and len(batch.trajectory) > 1:
        cond, null = ({key: value[first] for key, value in c.items()} for c in (batch.cond, batch.null))
        grid = anchor_grid(batch.trajectory, objective.anchor_steps)
        levels = batch.trajectory.schedule.alpha_sigma(torch.tensor(grid, dtype=torch.float64))
        scale = objective.guidance_scale
        state = teacher_ode(roles, grid[:-1], levels, step.x[first], cond, null, lambda _timesteps: scale)
        target = x0_towards(batch.trajectory, grid, step.x[first], state)
        terms.append(objective.anchor * regression_loss(x0, target, kind=objective.rho, c=objective.huber_c))
    if objective.spread:
        terms.append(objective.spread * spread_loss(x0.unflatten(0, (config.samples_per_prompt, -1))))
    return torch.stack(terms).sum() * (n / len(batch.stages)) if terms else None


def anchor_grid(trajectory: Trajectory, steps: int) -> list[float]:
    """The teacher's timesteps in the first stage, both ends included: even steps of the unshifted time, ``steps + 1``
    timesteps or fewer where a model has only whole ones.
    """
    schedule, shift = trajectory.schedule, trajectory.config.shift
    n = schedule.num_train_timesteps
    start, end = (float(unshift_sigma(t / n, shift)) for t in trajectory.timesteps[:2])
    inner = shift_sigma(torch.linspace(start, end, steps + 1, dtype=torch.float64)[1:-1], shift) * n
    inner = inner if schedule.kind == "flow" else inner.round()
    return list(dict.fromkeys([float(trajectory.timesteps[0]), *inner.tolist(), float(trajectory.timesteps[1])]))


def x0_towards(trajectory: Trajectory, grid: list[float], x: Tensor, state: Tensor) -> Tensor:
    """The clean prediction that takes ``x`` to ``state`` in one deterministic step along the ends of a grid, all ``[B,
    ...]``. That step is ``state = r x + (alpha' - r alpha) x0`` with ``r = sigma' / sigma``.
    """
    alphas, sigmas = trajectory.schedule.alpha_sigma(torch.tensor([grid[0], grid[-1]], dtype=torch.float64))
    r = float(sigmas[1] / sigmas[0])
    return (state - r * x) / (float(alphas[1]) - r * float(alphas[0]))


def anchor_passes(config: DistillConfig) -> float:
    """The teacher's passes per sample of an update for the anchor, a mean over stages and step counts. Whole timesteps
    may make them fewer.
    """
    counts = step_counts(config)
    share = sum(1 / k for k in counts if k > 1) / len(counts)
    return share * config.objective.anchor_steps * teacher_passes(config) if config.objective.anchor else 0.0
