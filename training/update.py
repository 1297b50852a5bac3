"""One update of Trajectory Distribution Matching: the critic follows the student, then the student follows the scores.

Passes at K = 4 with guidance and one critic update: 1.5 of prefix (mean), student 1, critic 1, teacher 2 (conditional
and unconditional in one batch), critic again 1 = 6.5 forwards, and 2 backwards. Critic and student share the
student's sample, and each draws its own tau and noise. No value is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .config import CriticConfig, DistillConfig
from .losses import critic_loss, critic_weight, generator_loss, sample_mean, subinterval_target
from .roles import AdapterRoles, Role
from .trajectory import Condition, Noised, Trajectory


class Batch(NamedTuple):
    """What an update starts from: conditions with their unconditional counterpart, and noise ``[B, ...]``."""

    cond: Condition
    null: Condition
    noise: Tensor


class Stage(NamedTuple):
    """The student's step of each sample: its stage ``[B]`` (CPU), its prediction, and the state ``x_m`` it ends in."""

    cond: Condition
    stages: Tensor
    x0: Tensor
    x_m: Tensor


def randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Noise from the run's one (CPU) generator, on the device of ``x``: a seed is the same noise on every device."""
    return torch.randn(x.shape, generator=generator).to(x.device, non_blocking=True)


def student_stage(
    roles: AdapterRoles, trajectory: Trajectory, batch: Batch, generator: torch.Generator, *, grad: bool
) -> Stage:
    """Draw stages, roll the student to where they start (no gradient) and make its one step, with gradient if
    ``grad``.
    """
    stages = trajectory.draw_stages(len(batch.noise), generator)
    x = trajectory.roll(roles.student, batch.noise, stages, batch.cond)
    with torch.set_grad_enabled(grad):
        x0, eps = roles.student(x, trajectory.timesteps[stages], batch.cond)
    return Stage(batch.cond, stages, x0, trajectory.step(x0.detach(), eps.detach(), stages))


def _noised(trajectory: Trajectory, stage: Stage, generator: torch.Generator) -> tuple[Noised, Tensor]:
    tau = trajectory.draw_tau(stage.stages, generator)
    return trajectory.renoise(stage.x_m, stage.stages, tau, randn_like(stage.x_m, generator)), tau


def _descend(roles: AdapterRoles, role: Role, loss: Tensor, clip: float, optimizer: Optimizer) -> Tensor:
    """Backward, clip, step; returns the gradient's norm before clipping."""
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(roles.parameters(role), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def critic_step(
    roles: AdapterRoles,
    trajectory: Trajectory,
    config: CriticConfig,
    stage: Stage,
    optimizer: Optimizer,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One critic update on the student's states."""
    noised, tau = _noised(trajectory, stage, generator)
    weight = critic_weight(noised.alpha, noised.sigma, config.weight, config.weight_limit)
    target = stage.x0.detach()
    if config.target == "subinterval":
        target, factor = subinterval_target(*noised)
        weight = weight * factor
    loss = critic_loss(roles.critic(noised.x_tau, tau, stage.cond)[0], target, weight.to(target))
    return {"critic_loss": loss.detach(), "critic_grad": _descend(roles, "critic", loss, config.clip, optimizer)}


def student_step(
    roles: AdapterRoles,
    trajectory: Trajectory,
    config: DistillConfig,
    batch: Batch,
    stage: Stage,
    optimizer: Optimizer,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One student update: its x0 moves along the teacher's minus the critic's prediction at a re-noised state."""
    objective = config.objective
    noised, tau = _noised(trajectory, stage, generator)
    x0_teacher, _ = roles.guided_teacher(noised.x_tau, tau, batch.cond, batch.null, objective.guidance_scale)
    with torch.no_grad():
        x0_critic, _ = roles.critic(noised.x_tau, tau, batch.cond)
    loss = generator_loss(
        stage.x0,
        x0_teacher,
        x0_critic,
        kind=objective.rho,
        c=objective.huber_c,
        normalise=objective.normalise,
        norm_min=objective.norm_min,
    )
    metrics = {
        "student_loss": loss.detach(),
        "student_grad": _descend(roles, "student", loss, config.student.clip, optimizer),
    }
    x0 = stage.x0.detach()
    metrics["std_ratio"] = x0.std() / x0_teacher.std()
    gap = sample_mean((x0_teacher - x0_critic).abs()) / sample_mean((x0 - x0_teacher).abs()).clamp_min(1e-8)
    for i in range(len(trajectory)):  # how far the scores are apart, per stage; NaN where this batch has no such stage
        here = (stage.stages == i).nonzero()[:, 0].to(gap.device)
        metrics[f"gap_{i}"] = gap[here].mean()
    return metrics


def tdm_update(
    roles: AdapterRoles,
    trajectory: Trajectory,
    config: DistillConfig,
    draw: Callable[[], Batch],
    optimizers: dict[Role, Optimizer],
    generator: torch.Generator,
    *,
    train_student: bool = True,
) -> dict[str, Tensor]:
    """``critic.per_student`` critic updates, the last on the sample that the student update then uses.

    Args:
        draw: a fresh batch; called once per critic update, since a critic step on the same sample again teaches little.
        train_student: False trains the critic only (``critic.head_start``).

    Returns:
        0-dim tensors on the device: losses, gradient norms, ``std_ratio`` (student's over teacher's x0) and
        ``gap_<stage>`` ``= mean |teacher - critic| / |x0 - teacher|``.
    """
    metrics: dict[str, Tensor] = {}
    for i in range(config.critic.per_student):
        batch = draw()
        last = train_student and i == config.critic.per_student - 1
        stage = student_stage(roles, trajectory, batch, generator, grad=last)
        metrics |= critic_step(roles, trajectory, config.critic, stage, optimizers["critic"], generator)
        if last:
            metrics |= student_step(roles, trajectory, config, batch, stage, optimizers["student"], generator)
    return metrics
