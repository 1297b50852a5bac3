"""One update of the run's objective: its critic if it has one, then the student.

Passes of Trajectory Distribution Matching at K = 4 with guidance and one critic update: 1.5 of prefix (mean), student
1, critic 1, teacher 2 (conditional and unconditional in one batch), critic again 1 = 6.5 forwards, and 2 backwards.
Critic and student share the student's sample, and each draws its own tau and noise; with ``critic.share_noise`` they
share those too, and the critic's prediction before its own step: 5.5 forwards. In micro batches without sharing, the
student's one step is made again for its gradient once the critic has learned from all of them: 7.5. No value is read
back from the device. training/cost.py counts those of the other objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from .batch import Batch
from .config import DistillConfig
from .objectives.matching import (
    Metrics,
    Seen,
    Stage,
    critic_objective,
    look,
    sid_objective,
    student_objective,
    student_stage,
    student_step,
)
from .objectives.towards import consistency_objective, regression_objective
from .processes import Processes
from .roles import Role, Roles

Draw = Callable[[bool], Sequence[Batch]]
"""This process's micro batches of a fresh batch, with a re-noising for the student or without."""


def update(
    roles: Roles,
    config: DistillConfig,
    draw: Draw,
    optimizers: dict[Role, Optimizer],
    processes: Processes,
    *,
    train_student: bool = True,
) -> Metrics:
    """One update of ``config.objective``.

    Args:
        train_student: False trains the critic only (``critic.head_start``).

    Returns:
        0-dim tensors on the device: losses, gradient norms, ``std_ratio`` (student's over teacher's x0) and, of
        matching, ``gap_<stage>`` ``= mean |teacher - critic| / |x0 - teacher|``; of this process's share, but for the
        norms.
    """
    if config.objective.name == "matching":
        return _matching(roles, config, draw, optimizers, processes, train_student=train_student)
    objective = consistency_objective if config.objective.name == "consistency" else regression_objective
    batches, told = draw(True), []
    for batch in batches:
        loss, metrics = objective(roles, config.objective, batch)
        (loss / len(batches)).backward()
        told.append(metrics)
    return _mean(told) | {"student_grad": _descend(roles, "student", config.student.clip, optimizers, processes)}


def _matching(
    roles: Roles,
    config: DistillConfig,
    draw: Draw,
    optimizers: dict[Role, Optimizer],
    processes: Processes,
    *,
    train_student: bool,
) -> Metrics:
    """``critic.per_student`` critic updates, each on a fresh batch (a critic step on the same sample again teaches
    little), the last on the sample that the student update then uses.
    """
    metrics: Metrics = {}
    for i in range(config.critic.per_student):
        last = train_student and i == config.critic.per_student - 1
        share = last and config.critic.share_noise
        batches = draw(last and not share)
        n = len(batches)
        told: list[Metrics] = []
        stages: list[Stage] = []
        for batch in batches:
            # A single micro batch keeps the student's graph for its own update; of several only the states are kept.
            stage = student_stage(roles, batch, grad=share or (last and n == 1))
            seen = look(roles, batch, stage.x_m, batch.critic, grad=True)
            loss = critic_objective(config.critic, stage, seen)
            (loss / n).backward()
            told.append({"critic_loss": loss.detach()})
            if share:
                told.append(_student_backward(roles, config, batch, stage, seen, n))
            else:
                stages.append(stage)
        metrics["critic_grad"] = _descend(roles, "critic", config.critic.clip, optimizers, processes)

        if last and not share:
            for batch, stage in zip(batches, stages, strict=True):
                told.append(_student_backward(roles, config, batch, stage, None, n))
        if last:
            metrics["student_grad"] = _descend(roles, "student", config.student.clip, optimizers, processes)
        metrics |= _mean(told)
    return metrics


def _student_backward(
    roles: Roles, config: DistillConfig, batch: Batch, stage: Stage, seen: Seen | None, parts: int
) -> Metrics:
    """Gradients of the student for one of ``parts`` micro batches; its step is made again if its graph was not kept.

    Args:
        seen: what the critic learned from, if the student shares it.
    """
    if not stage.x0.requires_grad:
        x0, eps = student_step(roles, batch, stage.x)
        stage = stage._replace(x0=x0, eps=eps)
    if config.objective.gradient == "sid":
        assert batch.student is not None  # as asked of draw
        loss, told = sid_objective(roles, config.objective, batch, stage, batch.student)
    else:
        if seen is None:
            assert batch.student is not None
            seen = look(roles, batch, stage.x_m, batch.student, grad=False)
        loss, told = student_objective(roles, config.objective, batch, stage, seen)
    (loss / parts).backward()
    return told


def _descend(roles: Roles, role: Role, clip: float, optimizers: dict[Role, Optimizer], processes: Processes) -> Tensor:
    """Mean of the gradients over the processes, clip, step; returns the gradient's norm before clipping."""
    weights = roles.parameters(role)
    processes.mean_([weight.grad for weight in weights if weight.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(weights, clip)
    optimizers[role].step()
    optimizers[role].zero_grad(set_to_none=True)
    return norm


def _mean(parts: Sequence[Metrics]) -> Metrics:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([part[name] for part in parts if name in part]).nanmean() for name in names}
