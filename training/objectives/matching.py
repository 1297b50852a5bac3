"""Distribution matching: the critic learns the student's scores, the student follows the teacher's minus the critic's.

The student's one step of a stage is diffused up to tau, where both are asked (TDM, arXiv 2503.06674). By settings the
same code is DMD2 without GAN (clean, full band, stochastic sampler, several critic updates; arXiv 2405.14867) and
Phased DMD's critic (``critic.target=subinterval``). Two more objectives share its critic: Decoupled DMD (a guidance
term with its own tau; arXiv 2511.22677) and few-step SiD (a gradient through both networks; arXiv 2404.04057).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...pipelines.schedule import mixed_noise
from ..batch import Batch, Renoise
from ..config import CriticConfig, DistillConfig, ObjectiveConfig
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
from ..trajectory import BANDS_BELOW_THE_STATE, Noised, Predict, with_fresh_noise
from .guidance import guidance_at
from .passes import Passes, prefix_passes, teacher_passes

Metrics = dict[str, Tensor]
"""0-dim tensors on the device, by their names in metrics.jsonl."""


class StudentStep(NamedTuple):
    """The student's step of each sample's stage, all ``[B, ...]``: the state ``x`` where the stage starts, the
    prediction ``x0`` and noise ``eps`` there, and ``x_m``, what is diffused further, without gradient: the state that
    the stage ends in, or x0 (``trajectory.renoise``).
    """

    x: Tensor
    x0: Tensor
    eps: Tensor
    x_m: Tensor


class CriticForward(NamedTuple):
    """A re-noised state, its tau ``[B]`` and the critic's prediction there, ``x0_critic`` ``[B, ...]``."""

    noised: Noised
    tau: Tensor
    x0_critic: Tensor


def student_prediction(roles: Roles, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """The student's ``(x0, eps)`` where the stages start, at ``x``; all ``[B, ...]``. With a stochastic sampler eps is
    fresh noise, or has a share of it (``trajectory.eta``).
    """
    x0, eps = roles.student(x, batch.trajectory.timesteps[batch.stages], batch.cond)
    if batch.fresh is None:
        return x0, eps
    return x0, mixed_noise(eps, batch.fresh[torch.arange(len(x)), batch.stages], batch.trajectory.config.eta)


def start_states(roles: Roles, batch: Batch) -> Tensor:
    """The states ``[B, ...]`` where the stages start: the student is rolled there, without gradient."""
    predict: Predict = roles.student
    if batch.fresh is not None:
        predict = with_fresh_noise(predict, batch.fresh, batch.trajectory.config.eta)
    return batch.trajectory.roll(predict, batch.noise, batch.stages, batch.cond)


def student_step(roles: Roles, batch: Batch, *, grad: bool) -> StudentStep:
    """Roll the student to where the stages start and take its one step, with a graph if ``grad``."""
    x = start_states(roles, batch)
    with torch.set_grad_enabled(grad):
        x0, eps = student_prediction(roles, batch, x)
    return StudentStep(x, x0, eps, batch.trajectory.origin(x0.detach(), eps.detach(), batch.stages))


def critic_forward(
    roles: Roles, config: ObjectiveConfig, batch: Batch, x_m: Tensor, renoise: Renoise, *, grad: bool
) -> CriticForward:
    """Diffuse what the stages end in, ``x_m`` ``[B, ...]``, up to tau, and call the critic there, with a graph if
    ``grad``. With ``guided_critic`` it has the teacher's guidance.
    """
    noised = batch.trajectory.renoise(x_m, batch.stages, renoise.tau, renoise.xi)
    w = guidance_at(config, batch.trajectory, renoise.tau, batch.scale) if config.guided_critic else 1.0
    with torch.set_grad_enabled(grad):
        x0_critic, _ = roles.guided(roles.critic, noised.x_tau, renoise.tau, batch.cond, batch.null, w)
    return CriticForward(noised, renoise.tau, x0_critic)


def critic_objective(
    roles: Roles, config: CriticConfig, batch: Batch, step: StudentStep, forward: CriticForward
) -> Tensor:
    """The critic's loss, a scalar, on the student's states; ``forward`` carries the critic's graph."""
    noised = forward.noised
    weight = critic_weight(noised.alpha, noised.sigma, config.weight, config.weight_limit)
    leash = config.leash and critic_leash(roles, batch, forward, weight * config.leash)
    target = step.x0.detach()
    if config.target == "subinterval":
        target, factor = subinterval_target(*noised)
        weight = weight * factor
    return critic_loss(forward.x0_critic, target, weight.to(target)) + leash


def critic_leash(roles: Roles, batch: Batch, forward: CriticForward, weight: Tensor) -> Tensor:
    """What holds the critic near the unguided teacher (TDM-R1, BLADE): ``weight`` ``[B]`` times the mean square of
    their difference in x0.
    """
    with torch.no_grad():
        x0_teacher, _ = roles.teacher(forward.noised.x_tau, forward.tau, batch.cond)
    return critic_loss(forward.x0_critic, x0_teacher, weight.to(x0_teacher))


def matching_objective(
    roles: Roles, config: ObjectiveConfig, batch: Batch, step: StudentStep, forward: CriticForward | None
) -> tuple[Tensor, Metrics]:
    """The student's loss of TDM and DMD: x0 moves along the guided teacher's minus the critic's prediction.

    Args:
        step: carries the student's graph.
        forward: the critic's, if the student shares it; None calls the critic at ``batch.student``.
    """
    forward = forward or _student_forward(roles, config, batch, step)
    w = guidance_at(config, batch.trajectory, forward.tau, batch.scale)
    loss, x0_teacher = _matching_term(roles, config, batch, step, forward, w)
    return loss, matching_metrics(batch, loss, step.x0, x0_teacher, forward.x0_critic)


def decoupled_objective(
    roles: Roles, config: ObjectiveConfig, batch: Batch, step: StudentStep, forward: CriticForward | None
) -> tuple[Tensor, Metrics]:
    """The student's loss of Decoupled DMD (arXiv 2511.22677): matching without guidance, and the guidance as a term of
    its own, at ``batch.guidance`` and with the weight ``guidance_weight``. Arguments as of `matching_objective`.
    """
    assert batch.guidance is not None  # the table asks for it
    forward = forward or _student_forward(roles, config, batch, step)
    loss, x0_teacher = _matching_term(roles, config, batch, step, forward, 1.0)
    loss = loss + config.guidance_weight * _guidance_term(roles, config, batch, batch.guidance, step)
    return loss, matching_metrics(batch, loss, step.x0, x0_teacher, forward.x0_critic)


def _student_forward(roles: Roles, config: ObjectiveConfig, batch: Batch, step: StudentStep) -> CriticForward:
    """The critic's forward at the student's own tau and noise, without a graph."""
    assert batch.student is not None  # as asked of draw
    return critic_forward(roles, config, batch, step.x_m, batch.student, grad=False)


def _matching_term(
    roles: Roles,
    config: ObjectiveConfig,
    batch: Batch,
    step: StudentStep,
    forward: CriticForward,
    guidance_scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss and the teacher's prediction ``[B, ...]`` that it used."""
    with torch.no_grad():
        x0_teacher, _ = roles.guided_teacher(forward.noised.x_tau, forward.tau, batch.cond, batch.null, guidance_scale)
    return generator_loss(step.x0, x0_teacher, forward.x0_critic.detach(), **_penalty(config)), x0_teacher


def _guidance_term(roles: Roles, config: ObjectiveConfig, batch: Batch, renoise: Renoise, step: StudentStep) -> Tensor:
    with torch.no_grad():
        below = config.guidance_band in BANDS_BELOW_THE_STATE
        x_m = step.x0.detach() if below else step.x_m
        noised = batch.trajectory.renoise(x_m, batch.stages, *renoise, clean=True if below else None)
        w = guidance_at(config, batch.trajectory, renoise.tau, batch.scale)
        (x0_guided, _), (x0_cond, _) = roles.with_and_without_guidance(
            roles.teacher, noised.x_tau, renoise.tau, batch.cond, batch.null, w
        )
    return guidance_loss(step.x0, x0_cond, x0_guided, **_penalty(config))


def _penalty(config: ObjectiveConfig) -> dict[str, Any]:
    return {"kind": config.rho, "c": config.huber_c, "normalise": config.normalise, **_limits(config)}


def _limits(config: ObjectiveConfig) -> dict[str, Any]:
    return {"norm_min": config.norm_min, "norm_max": config.norm_max}


def sid_objective(
    roles: Roles, config: ObjectiveConfig, batch: Batch, step: StudentStep, _forward: CriticForward | None
) -> tuple[Tensor, Metrics]:
    """The student's loss of SiD (arXiv 2404.04057): the same states, but a gradient through teacher and critic, too.

    Args:
        step: carries the student's graph.
    """
    assert batch.student is not None  # as asked of draw
    x_m = batch.trajectory.origin(step.x0, step.eps, batch.stages)
    with frozen(roles, "critic"):
        forward = critic_forward(roles, config, batch, x_m, batch.student, grad=True)
        w = guidance_at(config, batch.trajectory, forward.tau, batch.scale)
        x0_teacher, _ = roles.guided_teacher(forward.noised.x_tau, forward.tau, batch.cond, batch.null, w)
        loss = sid_loss(step.x0, x0_teacher, forward.x0_critic, alpha=config.sid_alpha, **_limits(config))
    return loss, matching_metrics(batch, loss, step.x0, x0_teacher, forward.x0_critic)


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
def matching_metrics(batch: Batch, loss: Tensor, x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor) -> Metrics:
    """The loss, the spread of the student's x0 over the teacher's, and how far teacher and critic are apart in each
    stage (NaN where the batch has no such stage). Predictions are ``[B, ...]``.
    """
    metrics = {"student_loss": loss.detach(), "std_ratio": x0.std() / x0_teacher.std()}
    gap = sample_mean((x0_teacher - x0_critic).abs()) / sample_mean((x0 - x0_teacher).abs()).clamp_min(1e-8)
    trajectory = batch.trajectory
    prefix = "gap_" if trajectory.config.unify is None else f"gap_{len(trajectory)}_"
    for i in range(len(trajectory)):
        here = (batch.stages == i).nonzero()[:, 0].to(gap.device)
        metrics[f"{prefix}{i}"] = gap[here].mean()
    return metrics


def matching_method(config: DistillConfig) -> str:
    """What matching is called with these settings, with its source."""
    if config.trajectory.renoise == "clean" and config.trajectory.bands == "full":
        return "distribution matching without a GAN (DMD2, arXiv 2405.14867)"
    return "Trajectory Distribution Matching (arXiv 2503.06674)"


def matching_passes(config: DistillConfig, split: bool) -> Passes:
    """6.5 forwards and 2 backwards at K = 4 with guidance. ``critic.share_noise`` saves the critic's second forward
    (5.5). Without it a ``split`` batch repeats the student's one step (7.5), since its gradient has to wait until the
    critic has learned from all micro batches.
    """
    n, share = config.critic.per_student, config.critic.share_noise
    return Passes(
        prefix=n * prefix_passes(config),
        student=n + (split and not share),
        critic=n,
        teacher=teacher_passes(config) + n * (config.critic.leash > 0),
        score=0 if share else 1,
        student_backward=1,
        critic_backward=n,
    )


def decoupled_passes(config: DistillConfig, split: bool) -> Passes:
    """One pass of the teacher more than matching: its own term's conditional one."""
    coupled = matching_passes(config, split)
    return replace(coupled, teacher=coupled.teacher + 1)


def sid_passes(config: DistillConfig, split: bool) -> Passes:
    """As matching; its backward goes through the teacher's passes and the critic's. A guided critic's passes are as
    many as the guided teacher's.
    """
    kl, times = matching_passes(config, split), teacher_passes(config) if config.objective.guided_critic else 1
    return replace(
        kl,
        critic=kl.critic * times,
        score=kl.score * times,
        critic_backward=kl.critic_backward * times,
        looked_through=teacher_passes(config) + times,
    )
