"""One update of the run's objective: its critic if it trains one, then the student.

Passes of Trajectory Distribution Matching at K = 4 with guidance and one critic update: 1.5 of prefix (mean), student
1, critic 1, teacher 2 (conditional and unconditional in one batch), the critic for the student 1 = 6.5 forwards, and 2
backwards. Critic and student share the student's sample, and each draws its own tau and noise. With
``critic.share_noise`` they share those too, and the critic's prediction before its own step: 5.5 forwards. In micro
batches without sharing, the student's one step is repeated for its gradient once the critic has learned from all of
them: 7.5. No value is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from .batch import Batch
from .config import DistillConfig
from .objectives import objective_of
from .objectives.matching import CriticForward, Metrics, StudentStep, critic_forward, student_prediction, student_step
from .objectives.variety import variety_loss
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
    """One update of the run's objective.

    With a critic it is ``critic.per_student`` critic updates, each on a fresh batch (a second critic step on the same
    sample teaches little), the last on the sample that the student update then uses.

    Args:
        train_student: False is one update of the critic alone (``critic.head_start``).

    Returns:
        0-dim tensors on the device: losses, gradient norms, ``std_ratio`` (student's over teacher's x0) and, for
        matching, ``gap_<stage>`` ``= mean |teacher - critic| / |x0 - teacher|``; with ``critic.skip_above`` the share
        of critic steps that were skipped. All but the norms are of this process's share.
    """
    objective = objective_of(config.objective)
    critic_loss = objective.critic_loss
    rounds = config.critic.per_student if critic_loss is not None and train_student else 1
    metrics: Metrics = {}
    for i in range(rounds):
        last = train_student and i == rounds - 1
        share = last and config.critic.share_noise
        batches = draw(last and not share)
        n = len(batches)
        # Without a critic of its own to wait for, the student's backward follows each micro batch at once. Otherwise
        # the graph of a single micro batch is kept for the student's update; of several only the states are.
        at_once = share or critic_loss is None
        graph = objective.through_step and (at_once or (last and n == 1))
        terms: list[Metrics] = []
        waiting: list[tuple[Batch, StudentStep]] = []
        for batch in batches:
            step, forward = student_step(roles, batch, grad=graph), None
            if critic_loss is not None:
                forward = critic_forward(roles, config.objective, batch, step.x_m, batch.critic, grad=True)
                loss = critic_loss(roles, config.critic, batch, step, forward)
                (loss / n).backward()
                terms.append({"critic_loss": loss.detach()})
            if at_once:
                terms.append(_student_backward(roles, config, batch, step, forward, n))
            else:
                waiting.append((batch, step))
        if critic_loss is not None:
            losses = [term["critic_loss"] for term in terms if "critic_loss" in term]
            skipped = _above(config.critic.skip_above, losses, processes)
            metrics["critic_grad"] = _descend(roles, "critic", config.critic.clip, optimizers, processes, skipped)
            if config.critic.skip_above is not None:
                metrics["critic_skipped"] = metrics["critic_grad"].new_tensor(float(skipped))
        if last:
            for batch, step in waiting:
                terms.append(_student_backward(roles, config, batch, step, None, n))
            metrics["student_grad"] = _descend(roles, "student", config.student.clip, optimizers, processes)
        metrics |= _mean(terms)
    return metrics


def _student_backward(
    roles: Roles, config: DistillConfig, batch: Batch, step: StudentStep, forward: CriticForward | None, n: int
) -> Metrics:
    """Gradients of the student for one of ``n`` micro batches. Its step is repeated if its graph was not kept.

    Args:
        forward: the critic's, if the student shares it.
    """
    objective = objective_of(config.objective)
    if objective.through_step and not step.x0.requires_grad:
        x0, eps = student_prediction(roles, batch, step.x)
        step = step._replace(x0=x0, eps=eps)
    loss, metrics = objective.student_loss(roles, config.objective, batch, step, forward)
    variety = variety_loss(roles, config, batch, step)
    if variety is not None:
        loss, metrics = loss + variety, {**metrics, "variety_loss": variety.detach()}
    (loss / n).backward()
    return metrics


def _above(limit: float | None, losses: Sequence[Tensor], processes: Processes) -> bool:
    """Whether the mean loss of the micro batches is above a limit, in any process. Waits for the device if there is
    one.
    """
    if limit is None:
        return False
    mean = torch.stack(list(losses)).mean()
    return processes.any(bool(mean > limit), mean.device)


def _descend(
    roles: Roles,
    role: Role,
    clip: float,
    optimizers: dict[Role, Optimizer],
    processes: Processes,
    skipped: bool = False,
) -> Tensor:
    """Mean of the gradients over the processes, clip, step unless it is skipped; returns the gradient's norm before
    clipping.
    """
    weights = roles.parameters(role)
    processes.mean_([weight.grad for weight in weights if weight.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(weights, clip)
    if not skipped:
        optimizers[role].step()
    optimizers[role].zero_grad(set_to_none=True)
    return norm


def _mean(terms: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over the micro batches that have it."""
    names = dict.fromkeys(name for term in terms for name in term)
    return {name: torch.stack([term[name] for term in terms if name in term]).nanmean() for name in names}
