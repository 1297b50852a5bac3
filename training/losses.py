"""The losses of Trajectory Distribution Matching: pure functions, tensors in, scalar out.

Everything is written on clean predictions ``x0``, so one code serves epsilon-, v-, x0- and flow-models. ``x0`` and
``x_tau`` are ``[B, ...]``; ``alpha``, ``sigma``, ``b`` and weights are per sample, ``[B]``. Notation: ``x_tau = alpha
x0 + sigma n``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..pipelines.schedule import expand

Rho = Literal["pseudo_huber", "vector_huber", "mse"]
CriticWeight = Literal["min_snr", "v"]


def sample_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: ``[B, ...] -> [B]``."""
    return x.flatten(1).mean(1)


def rho(residual: Tensor, kind: Rho, c: float | None = None) -> Tensor:
    """The penalty of a residual ``[B, ...]``, per sample ``[B]``.

    - ``pseudo_huber``: ``mean(sqrt(r^2 + c^2) - c)``, elementwise, ``c = 1e-3`` (the authors' PixArt demo).
    - ``vector_huber``: ``sqrt(|r|^2 + c^2) - c`` of the whole vector, ``c = 0.00054 sqrt(d)`` (the paper).
    - ``mse``: ``mean(r^2) / 2``, whose gradient is the residual itself (as DMD); ``c`` is not used.
    """
    if kind == "pseudo_huber":
        c = 1e-3 if c is None else c
        return sample_mean((residual.square() + c * c).sqrt() - c)
    if kind == "vector_huber":
        flat = residual.flatten(1)
        c = 0.00054 * flat.shape[1] ** 0.5 if c is None else c
        return (flat.square().sum(1) + c * c).sqrt() - c
    if kind == "mse":
        return sample_mean(residual.square()) / 2
    raise ValueError(f"rho must be 'pseudo_huber', 'vector_huber' or 'mse', not {kind!r}")


def generator_loss(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_critic: Tensor,
    *,
    kind: Rho = "pseudo_huber",
    c: float | None = None,
    normalise: bool = True,
    norm_min: float = 1e-2,
    norm_max: float | None = None,
) -> Tensor:
    """Move the student's ``x0`` along the difference of the two scores at ``x_tau`` (TDM, arXiv 2503.06674).

        direction = x0_teacher - x0_critic          (the teacher's with guidance)
        target    = stop_grad(x0 + direction)
        norm      = mean |x0 - x0_teacher|, kept in [norm_min, norm_max]      per sample, no gradient
        loss      = mean( rho(x0 - target) / norm )

    The value is that of ``rho(direction)``; only its gradient, through ``x0`` alone, means anything. ``norm`` evens
    out the noise levels (DMD); ``norm_min`` keeps a state that already agrees with the teacher from taking a huge
    step.

    Args: ``x0`` the student's prediction, with gradient; ``x0_teacher``, ``x0_critic`` ``[B, ...]`` predictions at
        ``x_tau``.
    """
    with torch.no_grad():
        norm = _norm(x0, x0_teacher, norm_min, norm_max) if normalise else x0.new_ones(len(x0))
    return _move(x0, x0_teacher - x0_critic, norm, kind, c)


def guidance_loss(
    x0: Tensor,
    x0_cond: Tensor,
    x0_guided: Tensor,
    *,
    kind: Rho = "pseudo_huber",
    c: float | None = None,
    normalise: bool = True,
    norm_min: float = 1e-2,
    norm_max: float | None = None,
) -> Tensor:
    """The guidance of :func:`generator_loss` as a separate term (Decoupled DMD, arXiv 2511.22677): ``x0`` moves along
    ``x0_guided - x0_cond``, which without a normalisation is ``(w - 1)(x0_cond - x0_uncond)``. ``norm`` is
    ``mean |x0 - x0_guided|``, as in the coupled form.

    Args:
        x0: the student's prediction ``[B, ...]``, with gradient.
        x0_cond, x0_guided: the teacher's predictions ``[B, ...]`` at the term's own tau, without guidance and with it.

    Returns:
        A scalar.
    """
    direction = x0_guided - x0_cond
    with torch.no_grad():
        norm = _norm(x0, x0_guided, norm_min, norm_max) if normalise else x0.new_ones(len(x0))
    return _move(x0, direction, norm, kind, c)


def sid_loss(
    x0: Tensor,
    x0_teacher: Tensor,
    x0_critic: Tensor,
    *,
    alpha: float = 1.0,
    norm_min: float = 1e-2,
    norm_max: float | None = None,
) -> Tensor:
    """Score identity distillation (SiD, arXiv 2404.04057, equation 23 in x0): the Fisher divergence of the two scores.

        loss = mean( (x0_teacher - x0_critic)(x0_teacher - x0) - alpha (x0_teacher - x0_critic)^2 ) / norm

    Unlike :func:`generator_loss` its gradient goes through both networks' predictions, to the ``x_tau`` that they saw
    and on to the student. ``norm`` is that of :func:`generator_loss`.

    Args:
        x0: the student's prediction ``[B, ...]``, with gradient.
        x0_teacher, x0_critic: predictions ``[B, ...]`` at ``x_tau``, with a graph to it.
        alpha: the weight of the squared term.

    Returns:
        A scalar.
    """
    with torch.no_grad():
        norm = _norm(x0, x0_teacher, norm_min, norm_max)
    apart = x0_teacher - x0_critic
    return (sample_mean(apart * (x0_teacher - x0) - alpha * apart.square()) / norm).mean()


def regression_loss(x0: Tensor, x0_target: Tensor, *, kind: Rho = "pseudo_huber", c: float | None = None) -> Tensor:
    """The mean penalty of ``x0`` ``[B, ...]`` against a target without gradient, for consistency and regression."""
    return rho(x0 - x0_target.detach(), kind, c).mean()


def spread_loss(groups: Tensor) -> Tensor:
    """What pushes the samples of each group apart: minus the mean distance of two of them, over its own value, so that
    the force does not depend on the scale.

    Args:
        groups: ``[G, N, ...]``, G samples of each of N prompts, with gradient.

    Returns:
        A scalar; only its gradient means anything.
    """
    samples = groups.flatten(2).transpose(0, 1)  # [N, G, D]
    g = samples.shape[1]
    i, j = torch.triu_indices(g, g, 1, device=groups.device)
    distance = (samples[:, i] - samples[:, j]).square().mean(2).clamp_min(1e-12).sqrt()  # [N, pairs]
    return -(distance.mean(1) / distance.detach().mean(1)).mean()


def _norm(x0: Tensor, x0_teacher: Tensor, norm_min: float, norm_max: float | None) -> Tensor:
    return sample_mean((x0 - x0_teacher).abs()).clamp(norm_min, norm_max)


def _move(x0: Tensor, direction: Tensor, norm: Tensor, kind: Rho, c: float | None) -> Tensor:
    """A loss whose gradient moves ``x0`` along ``direction`` and goes nowhere else."""
    target = (x0 + direction).detach()
    return (rho(x0 - target, kind, c) / norm).mean()


def critic_weight(alpha: Tensor, sigma: Tensor, kind: CriticWeight, limit: float = 5.0) -> Tensor:
    """What an error in x0 costs at ``(alpha, sigma)``, ``[B] -> [B]``, at most ``limit``.

    ``min_snr``: ``min(alpha^2 / sigma^2, limit)``, the error in epsilon (the demo). ``v``: ``min(1 / sigma^2,
    limit)``, the error in velocity or v; it does not vanish at pure noise. Unweighted x0 errors give noise and blur.
    """
    if kind == "min_snr":
        return (alpha / sigma).square().clamp_max(limit)
    if kind == "v":
        return sigma.square().reciprocal().clamp_max(limit)
    raise ValueError(f"critic weight must be 'min_snr' or 'v', not {kind!r}")


def critic_loss(x0_critic: Tensor, x0_target: Tensor, weight: Tensor) -> Tensor:
    """Weighted regression in x0 space: ``mean_B( weight * mean (x0_critic - x0_target)^2 )``; ``weight`` is ``[B]``.

    Target *clean* is the student's own ``x0`` (the demo, the paper), target *subinterval* is
    :func:`subinterval_target`.
    """
    return (weight.to(x0_critic.dtype) * sample_mean((x0_critic - x0_target).square())).mean()


def subinterval_target(
    x_tau: Tensor, xi: Tensor, b: Tensor, alpha: Tensor, sigma: Tensor, alpha_m: Tensor
) -> tuple[Tensor, Tensor]:
    """The critic's target when ``x_tau = r x_m + b xi`` started from the trajectory's own state ``x_m`` (Phased DMD).

    Given ``x_m`` the score of ``x_tau`` is ``-xi / b``, so the epsilon target is ``sigma xi / b`` and in x0 space
    ``(x_tau - sigma^2 xi / b) / alpha``. Its mean over ``xi`` given ``x_tau`` is the exact score of the student's
    states; the clean target is exact only where ``x_m`` is clean, and leaves intermediate states too wide.

    Args:
        alpha_m: ``[B]``, alpha of ``x_m``.

    Returns:
        ``(x0_target, factor)``: ``factor = (alpha_m b / sigma)^2`` ``[B]`` multiplies the critic's weight, for the
        target's variance grows as its inverse near ``b = 0``, and with noise in ``x_m``. It makes losses of all stages
        alike. At the last stage ``b = sigma`` and ``alpha_m = 1``: target and weight equal the clean ones.
    """
    x0_target = (x_tau - expand(sigma.square() / b, x_tau) * xi) / expand(alpha, x_tau)
    return x0_target, (alpha_m * b / sigma).square()
