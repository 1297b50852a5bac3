"""Distribution matching: the critic learns the student's scores, the student follows the teacher's minus the critic's.

The student's one step of a stage is diffused up to tau, where both are asked (TDM, arXiv 2503.06674). By settings the
same code is DMD2 without GAN (clean, full band, stochastic sampler, several critic updates; arXiv 2405.14867), Phased
DMD's critic (``critic.target=subinterval``), Decoupled DMD (a guidance term of its own; arXiv 2511.22677) and few-step
SiD (a gradient through both networks; arXiv 2404.04057).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch import Batch, Renoise
from ..config import CriticConfig, ObjectiveConfig
from ..losses import (
    critic_loss,
    critic_weight,
    generator_loss,
    guidance_loss,
    sample_mean,
    sid_loss,
    subinterval_target,
)
from ..roles import Role, Roles
from ..trajectory import Noised, with_fresh_noise

Metrics = dict[str, Tensor]


class Stage(NamedTuple):
    """The student's step of each sample: the state ``x`` it starts from, its prediction and noise, and what is diffused
    further: ``x_m``, the state it ends in, or x0 (``trajectory.renoise``), without gradient.
    """

    x: Tensor
    x0: Tensor
    eps: Tensor
    x_m: Tensor


class Seen(NamedTuple):
    """A re-noised state and the critic's prediction there."""

    noised: Noised
    tau: Tensor
    x0_critic: Tensor


def student_step(roles: Roles, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """The student's ``(x0, eps)`` where the stages start, at ``x``; with a stochastic sampler eps is fresh."""
    x0, eps = roles.student(x, batch.trajectory.timesteps[batch.stages], batch.cond)
    return x0, eps if batch.fresh is None else batch.fresh[torch.arange(len(x)), batch.stages]


def start_states(roles: Roles, batch: Batch) -> Tensor:
    """Roll the student to where the stages start, without gradient."""
    predict = roles.student if batch.fresh is None else with_fresh_noise(roles.student, batch.fresh)
    return batch.trajectory.roll(predict, batch.noise, batch.stages, batch.cond)


def student_stage(roles: Roles, batch: Batch, *, grad: bool) -> Stage:
    """Roll the student to where the stages start and make its one step, with gradient if ``grad``."""
    x = start_states(roles, batch)
    with torch.set_grad_enabled(grad):
        x0, eps = student_step(roles, batch, x)
    return Stage(x, x0, eps, batch.trajectory.origin(x0.detach(), eps.detach(), batch.stages))


def look(roles: Roles, batch: Batch, x_m: Tensor, renoise: Renoise, *, grad: bool) -> Seen:
    """Diffuse what a stage ended in up to tau, and ask the critic about it."""
    noised = batch.trajectory.renoise(x_m, batch.stages, renoise.tau, renoise.xi)
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


def guidance_of(config: ObjectiveConfig, batch: Batch) -> float | Tensor:
    """The teacher's guidance scale: one for all, or that of each sample's stage ``[B]`` (CPU)."""
    by_stage = config.stage_guidance
    if by_stage is None:
        return config.guidance_scale
    return torch.tensor(by_stage)[batch.stages * len(by_stage) // len(batch.trajectory)]


def student_objective(
    roles: Roles, config: ObjectiveConfig, batch: Batch, stage: Stage, seen: Seen
) -> tuple[Tensor, Metrics]:
    """The student's loss, whose x0 moves along the teacher's minus the critic's prediction.

    Args:
        stage: with the student's graph. seen: without one.
    """
    w = guidance_of(config, batch)
    penalty: dict[str, Any] = {
        "kind": config.rho, "c": config.huber_c, "normalise": config.normalise, "norm_min": config.norm_min
    }  # fmt: skip
    decoupled = batch.guidance is not None
    with torch.no_grad():
        scale = 1.0 if decoupled else w
        x0_teacher, _ = roles.guided_teacher(seen.noised.x_tau, seen.tau, batch.cond, batch.null, scale)
    loss = generator_loss(stage.x0, x0_teacher, seen.x0_critic.detach(), **penalty)
    if batch.guidance is not None:
        loss = loss + config.guidance_weight * _guidance_term(roles, batch, batch.guidance, stage, w, penalty)
    return loss, told(batch, loss, stage.x0, x0_teacher, seen.x0_critic)


def _guidance_term(
    roles: Roles, batch: Batch, renoise: Renoise, stage: Stage, w: float | Tensor, penalty: dict[str, Any]
) -> Tensor:
    with torch.no_grad():
        x_tau = batch.trajectory.renoise(stage.x_m, batch.stages, renoise.tau, renoise.xi).x_tau
        (cond, _), (uncond, _) = roles.teacher_pair(x_tau, renoise.tau, batch.cond, batch.null)
    scale = w.to(cond).reshape(-1, *[1] * (cond.ndim - 1)) if isinstance(w, Tensor) else w
    return guidance_loss(stage.x0, cond, uncond, scale, **penalty)


def sid_objective(
    roles: Roles, config: ObjectiveConfig, batch: Batch, stage: Stage, renoise: Renoise
) -> tuple[Tensor, Metrics]:
    """The student's loss of SiD: the same states, but a gradient through teacher and critic, too.

    Args:
        stage: with the student's graph.
    """
    x_m = batch.trajectory.origin(stage.x0, stage.eps, batch.stages)
    with frozen(roles, "critic"):
        seen = look(roles, batch, x_m, renoise, grad=True)
        w = guidance_of(config, batch)
        x0_teacher, _ = roles.guided_teacher(seen.noised.x_tau, seen.tau, batch.cond, batch.null, w)
        loss = sid_loss(stage.x0, x0_teacher, seen.x0_critic, alpha=config.sid_alpha, norm_min=config.norm_min)
    return loss, told(batch, loss, stage.x0, x0_teacher, seen.x0_critic)


@contextmanager
def frozen(roles: Roles, role: Role) -> Iterator[None]:
    """What is computed inside gives no gradient to a role's weights, whenever the backward pass runs."""
    weights = roles.parameters(role)
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@torch.no_grad()
def told(batch: Batch, loss: Tensor, x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor) -> Metrics:
    """The loss, the spread of the student's x0 over the teacher's, and how far teacher and critic are apart in each
    stage (NaN where the batch has no such stage).
    """
    metrics = {"student_loss": loss.detach(), "std_ratio": x0.std() / x0_teacher.std()}
    gap = sample_mean((x0_teacher - x0_critic).abs()) / sample_mean((x0 - x0_teacher).abs()).clamp_min(1e-8)
    trajectory = batch.trajectory
    prefix = "gap_" if trajectory.config.unify is None else f"gap_{len(trajectory)}_"
    for i in range(len(trajectory)):
        here = (batch.stages == i).nonzero()[:, 0].to(gap.device)
        metrics[f"{prefix}{i}"] = gap[here].mean()
    return metrics
