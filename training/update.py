"""One update of Trajectory Distribution Matching: the critic follows the student, then the student follows the scores.

Passes at K = 4 with guidance and one critic update: 1.5 of prefix (mean), student 1, critic 1, teacher 2 (conditional
and unconditional in one batch), critic again 1 = 6.5 forwards, and 2 backwards. Critic and student share the
student's sample, and each draws its own tau and noise; with ``critic.share_noise`` they share those too, and the
critic's prediction before its own step: 5.5 forwards. In micro batches without sharing, the student's one step is made
again for its gradient once the critic has learned from all of them: 7.5. No value is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .batch import Batch, Renoise
from .config import CriticConfig, DistillConfig, ObjectiveConfig
from .losses import critic_loss, critic_weight, generator_loss, sample_mean, subinterval_target
from .processes import Processes
from .roles import Role, Roles
from .trajectory import Noised, Trajectory

Metrics = dict[str, Tensor]


class Stage(NamedTuple):
    """The student's step of each sample: the state ``x`` it starts from, its prediction, and the state ``x_m`` it ends
    in.
    """

    x: Tensor
    x0: Tensor
    x_m: Tensor


class Seen(NamedTuple):
    """A re-noised state and the critic's prediction there."""

    noised: Noised
    tau: Tensor
    x0_critic: Tensor


def student_stage(roles: Roles, trajectory: Trajectory, batch: Batch, *, grad: bool) -> Stage:
    """Roll the student to where the stages start (no gradient) and make its one step, with gradient if ``grad``."""
    x = trajectory.roll(roles.student, batch.noise, batch.stages, batch.cond)
    with torch.set_grad_enabled(grad):
        x0, eps = roles.student(x, trajectory.timesteps[batch.stages], batch.cond)
    return Stage(x, x0, trajectory.step(x0.detach(), eps.detach(), batch.stages))


def look(roles: Roles, trajectory: Trajectory, batch: Batch, stage: Stage, renoise: Renoise, *, grad: bool) -> Seen:
    """Diffuse the state that a stage ended in up to tau, and ask the critic about it."""
    noised = trajectory.renoise(stage.x_m, batch.stages, renoise.tau, renoise.xi)
    with torch.set_grad_enabled(grad):
        x0_critic, _ = roles.critic(noised.x_tau, renoise.tau, batch.cond)
    return Seen(noised, renoise.tau, x0_critic)


def critic_objective(config: CriticConfig, stage: Stage, seen: Seen) -> Tensor:
    """The critic's loss on the student's states."""
    weight = critic_weight(seen.noised.alpha, seen.noised.sigma, config.weight, config.weight_limit)
    target = stage.x0.detach()
    if config.target == "subinterval":
        target, factor = subinterval_target(*seen.noised)
        weight = weight * factor
    return critic_loss(seen.x0_critic, target, weight.to(target))


def student_objective(
    roles: Roles, config: ObjectiveConfig, batch: Batch, x0: Tensor, seen: Seen, stages: int
) -> tuple[Tensor, Metrics]:
    """The student's loss, whose x0 moves along the teacher's minus the critic's prediction, and how far those are apart
    in each of ``stages`` stages (NaN where the batch has no such stage).
    """
    x_tau, tau = seen.noised.x_tau, seen.tau
    x0_teacher, _ = roles.guided_teacher(x_tau, tau, batch.cond, batch.null, config.guidance_scale)
    x0_critic = seen.x0_critic.detach()
    loss = generator_loss(
        x0,
        x0_teacher,
        x0_critic,
        kind=config.rho,
        c=config.huber_c,
        normalise=config.normalise,
        norm_min=config.norm_min,
    )
    x0 = x0.detach()
    metrics = {"student_loss": loss.detach(), "std_ratio": x0.std() / x0_teacher.std()}
    gap = sample_mean((x0_teacher - x0_critic).abs()) / sample_mean((x0 - x0_teacher).abs()).clamp_min(1e-8)
    for i in range(stages):
        here = (batch.stages == i).nonzero()[:, 0].to(gap.device)
        metrics[f"gap_{i}"] = gap[here].mean()
    return loss, metrics


def _descend(roles: Roles, role: Role, clip: float, optimizer: Optimizer, processes: Processes) -> Tensor:
    """Mean of the gradients over the processes, clip, step; returns the gradient's norm before clipping."""
    weights = roles.parameters(role)
    processes.mean_([weight.grad for weight in weights if weight.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(weights, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _student_backward(
    roles: Roles, trajectory: Trajectory, config: DistillConfig, batch: Batch, stage: Stage, seen: Seen, parts: int
) -> Metrics:
    """Gradients of the student for one of ``parts`` micro batches; its step is made again if its graph was not kept."""
    x0 = stage.x0
    if not x0.requires_grad:
        x0, _ = roles.student(stage.x, trajectory.timesteps[batch.stages], batch.cond)
    loss, told = student_objective(roles, config.objective, batch, x0, seen, len(trajectory))
    (loss / parts).backward()
    return told


def _mean(parts: Sequence[Metrics]) -> Metrics:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([part[name] for part in parts if name in part]).nanmean() for name in names}


def tdm_update(
    roles: Roles,
    trajectory: Trajectory,
    config: DistillConfig,
    draw: Callable[[bool], Sequence[Batch]],
    optimizers: dict[Role, Optimizer],
    processes: Processes,
    *,
    train_student: bool = True,
) -> Metrics:
    """``critic.per_student`` critic updates, the last on the sample that the student update then uses.

    Args:
        draw: this process's micro batches of a fresh batch, with a re-noising for the student or without; called once
            per critic update, since a critic step on the same sample again teaches little.
        train_student: False trains the critic only (``critic.head_start``).

    Returns:
        0-dim tensors on the device: losses, gradient norms, ``std_ratio`` (student's over teacher's x0) and
        ``gap_<stage>`` ``= mean |teacher - critic| / |x0 - teacher|``; of this process's share, but for the norms.
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
            stage = student_stage(roles, trajectory, batch, grad=share or (last and n == 1))
            seen = look(roles, trajectory, batch, stage, batch.critic, grad=True)
            loss = critic_objective(config.critic, stage, seen)
            (loss / n).backward()
            told.append({"critic_loss": loss.detach()})
            if share:
                told.append(_student_backward(roles, trajectory, config, batch, stage, seen, n))
            else:
                stages.append(stage)
        metrics["critic_grad"] = _descend(roles, "critic", config.critic.clip, optimizers["critic"], processes)

        if last and not share:
            for batch, stage in zip(batches, stages, strict=True):
                assert batch.student is not None  # as asked of draw
                seen = look(roles, trajectory, batch, stage, batch.student, grad=False)
                told.append(_student_backward(roles, trajectory, config, batch, stage, seen, n))
        if last:
            metrics["student_grad"] = _descend(roles, "student", config.student.clip, optimizers["student"], processes)
        metrics |= _mean(told)
    return metrics
