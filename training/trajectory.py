"""The student's trajectory: its trained grid, the roll-out to a stage, and re-noising from the state a stage ends in.

A student has one trajectory, a unified one (TDM-unify) one for each step count. Stage ``i = 0 .. K - 1`` is the
student's step from grid level ``i`` to level ``i + 1``; level ``K`` is the clean end ``(1, 0)``. In the paper's
``k = K - i`` the stage starts at ``t_k`` and ends at ``m = t_{k-1}``. Every sample of a batch has its own stage.

Levels, stages and tau are tiny CPU tensors (float64, int64), states are on the device: nothing here waits for the
device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TDMError
from ..pipelines.families import Condition
from ..pipelines.schedule import (
    NoiseSchedule,
    ddim_step,
    expand,
    grid_pairs,
    mixed_noise,
    renoise_coefficients,
    shift_sigma,
    uniform_grid,
    unshift_sigma,
)
from .config import Band, TrajectoryConfig

BANDS_BELOW_THE_STATE = ("full", "below")  # reach below the state that a stage ends in: only x0 can be diffused there
Predict = Callable[[Tensor, Tensor, Condition], tuple[Tensor, Tensor]]  # (x [B, ...], timesteps [B], cond) -> (x0, eps)


class Noised(NamedTuple):
    """``x_tau = r x_m + b xi`` at ``(alpha, sigma)`` of tau, from ``x_m`` at ``alpha_m``; the coefficients are ``[B]``
    float64 on the CPU.
    """

    x_tau: Tensor
    xi: Tensor
    b: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_m: Tensor


def with_fresh_noise(predict: Predict, fresh: Tensor, eta: float = 1.0) -> Predict:
    """``predict`` for a stochastic sampler (consistency models, DMD2), whose next state has fresh noise in the place of
    the predicted one, or mixed with it (`mixed_noise`).

    Args:
        fresh: ``[B, K, ...]``, the noise of the i-th call for each sample; a call takes the head of the batch.
    """
    calls = itertools.count()

    def stochastic(x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        x0, eps = predict(x, timesteps, cond)
        return x0, mixed_noise(eps, fresh[: len(x), next(calls)], eta)

    return stochastic


@torch.no_grad()
def sample(
    predict: Predict, schedule: NoiseSchedule, timesteps: Sequence[float], noise: Tensor, cond: Condition
) -> Tensor:
    """Steps from ``noise`` ``[B, ...]`` down the grid to the clean end, each with the noise that ``predict`` gives:
    DDIM / Euler with its own, unless it is one :func:`with_fresh_noise`.
    """
    alphas, sigmas = grid_pairs(schedule, timesteps)
    x = noise
    for i, t in enumerate(timesteps):
        x0, eps = predict(x, torch.full((len(x),), float(t), dtype=torch.float64), cond)
        x = ddim_step(x0, eps, float(alphas[i + 1]), float(sigmas[i + 1]))
    return x


class Trajectory:
    """The trained grid of a student for one step count, and the tau band of each of its stages.

    Args:
        steps: K; None is that of the configuration.

    Attributes:
        timesteps: (K,) float64, strictly decreasing. alphas, sigmas: (K + 1,) float64, ending in (1, 0).
        bands: (K, 2) float64, the lowest and highest tau of each stage, in unshifted time (0 clean, 1 noise).

    Raises:
        TDMError: a grid the schedule does not have, a shift on a model without one, or a stage without room for tau.
    """

    def __init__(self, config: TrajectoryConfig, schedule: NoiseSchedule, steps: int | None = None) -> None:
        if schedule.kind != "flow" and config.shift != 1:
            raise TDMError(f"trajectory.shift is {config.shift}, but only flow models have a time shift; set it to 1")
        self.config, self.schedule = config, schedule
        grid = config.timesteps or _uniform(config, schedule, steps or config.steps)
        self.alphas, self.sigmas = grid_pairs(schedule, grid)
        self.timesteps = torch.tensor(grid, dtype=torch.float64)
        if self.alphas[1] <= 0:
            raise TDMError(f"only the first timestep may be pure noise, not the second of {list(grid)}")

        self.bands = self._bands(config.bands)
        for t, (a, b) in zip(grid, self.bands.tolist(), strict=True):
            if a >= b:
                raise TDMError(
                    f"the stage from timestep {t:g} leaves tau no room ({a:.3f} to {b:.3f}); lower trajectory.margin"
                )

    def _bands(self, kind: Band) -> Tensor:
        c, start = self.config, self._time(self.timesteps)
        if kind in BANDS_BELOW_THE_STATE:
            high = torch.ones_like(start) if kind == "full" else start
            return torch.stack([torch.full_like(start, c.tau_min), high.clamp_max(c.tau_max)], 1)
        end = torch.cat([start[1:], start.new_zeros(1)])
        low = (end + c.margin).clamp_min(c.tau_min)
        high = (start if kind == "separate" else torch.ones_like(start)).clamp_max(c.tau_max)
        return torch.stack([low, high], 1)

    def require_finite_targets(self) -> None:
        """Check that the subinterval target is finite at every tau (see `losses.subinterval_target`).

        Raises:
            TDMError: rounding can close ``margin``, or the highest tau is pure noise.
        """
        c, n = self.config, self.schedule.num_train_timesteps
        if self.schedule.kind != "flow" and c.margin * n < 1:
            raise TDMError(
                f"trajectory.margin is {c.margin:g}, less than one of {n} timesteps: a tau may round to the end of its "
                f"stage; set it to at least {1 / n:g}"
            )
        highest = self._timesteps(torch.tensor([c.tau_max], dtype=torch.float64))
        if self.schedule.alpha_sigma(highest)[0] <= 0:
            raise TDMError(
                f"trajectory.tau_max is {c.tau_max:g}, which rounds to timestep {float(highest):g}: it is pure noise "
                f"there; set it to at most {1 - 2 / n:g}"
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    def _time(self, timesteps: Tensor) -> Tensor:
        time = timesteps / self.schedule.num_train_timesteps
        return unshift_sigma(time, self.config.shift)

    def draw_stages(self, n: int, generator: torch.Generator) -> Tensor:
        """Stages ``[n]`` of ``n`` samples, latest first: even over the batch (``sample``) or one for all (``update``).

        Latest first, so that the samples that still have to roll are always the head of the batch. Samples are
        exchangeable.
        """
        order = torch.randperm(len(self), generator=generator)
        stages = order[:1].expand(n) if self.config.stages == "update" else order[torch.arange(n) % len(self)]
        return stages.sort(descending=True).values

    def draw_tau(self, stages: Tensor, generator: torch.Generator, band: Band | None = None) -> Tensor:
        """Timesteps tau ``[B]``: by ``tau_law`` over each stage's band in unshifted time, whole numbers on a vp model.

        Args:
            band: another kind than the configuration's.
        """
        low, high = (self.bands if band is None else self._bands(band))[stages].unbind(1)
        share = torch.rand(len(stages), generator=generator, dtype=torch.float64)
        if self.config.tau_law == "logit_normal":
            low, high = (torch.special.ndtr(torch.logit(end)) for end in (low, high))  # shares of the law below them
            time = torch.special.ndtri(low + (high - low) * share).sigmoid()
        else:
            time = low + (high - low) * share
        return self._timesteps(time)

    def _timesteps(self, time: Tensor) -> Tensor:
        """Timesteps of unshifted times in [0, 1]."""
        timesteps = shift_sigma(time, self.config.shift) * self.schedule.num_train_timesteps
        return timesteps if self.schedule.kind == "flow" else timesteps.round().clamp_max(self.schedule.last_timestep)

    def step(self, x0: Tensor, eps: Tensor, stages: Tensor) -> Tensor:
        """The states ``[B, ...]`` that the stages ``[B]`` end in: one deterministic step from ``(x0, eps)``, each ``[B,
        ...]``, with the model's own noise.
        """
        return ddim_step(x0, eps, expand(self.alphas[stages + 1], x0), expand(self.sigmas[stages + 1], x0))

    @torch.no_grad()
    def roll(self, predict: Predict, noise: Tensor, stages: Tensor, cond: Condition) -> Tensor:
        """The states ``[B, ...]`` at which the stages start; pass ``i`` moves only the samples that have to go beyond
        it.
        """
        x = noise.clone()
        for i in range(int(stages[0])):
            n = int((stages > i).sum())
            here = torch.full((n,), i)
            x0, eps = predict(x[:n], self.timesteps[here], {key: value[:n] for key, value in cond.items()})
            x[:n] = self.step(x0, eps, here)
        return x

    def origin(self, x0: Tensor, eps: Tensor, stages: Tensor) -> Tensor:
        """What is diffused up to tau, ``[B, ...]``: the state that a stage ends in, or with ``renoise="clean"`` the
        prediction ``x0`` ``[B, ...]``.
        """
        return x0 if self.config.renoise == "clean" else self.step(x0, eps, stages)

    def renoise(self, x_m: Tensor, stages: Tensor, tau: Tensor, xi: Tensor, *, clean: bool | None = None) -> Noised:
        """Diffuse an :meth:`origin` ``x_m`` up to ``tau``: ``x_tau = r x_m + b xi``. ``x_m`` and ``xi`` are ``[B,
        ...]``, ``stages`` and ``tau`` ``[B]`` on the CPU.

        Args:
            clean: whether ``x_m`` is a clean prediction; None is what the configuration's `renoise` says.
        """
        alpha, sigma = self.schedule.alpha_sigma(tau)
        clean = self.config.renoise == "clean" if clean is None else clean
        m = torch.full_like(stages, len(self)) if clean else stages + 1
        r, b = renoise_coefficients(self.alphas[m], self.sigmas[m], alpha, sigma)
        return Noised(expand(r, x_m) * x_m + expand(b, xi) * xi, xi, b, alpha, sigma, self.alphas[m])


def _uniform(config: TrajectoryConfig, schedule: NoiseSchedule, steps: int) -> list[float]:
    """Uniform steps. Of a unified student whose timesteps tell the step count, the one that it is run with by default
    starts at the last timestep, as stock samplers do, and each other one a little lower: from many steps to one, so
    that neighbours in time predict what is most alike.
    """
    first = None
    if config.unify is not None and config.tell_steps == "timestep":
        counts = sorted(config.unify, key=lambda k: (k != config.steps, -k))
        first = schedule.last_timestep * (1 - config.spread * counts.index(steps))
        first = first if schedule.kind == "flow" else float(round(first))
    return uniform_grid(steps, schedule, config.shift, first)


def build_trajectories(config: TrajectoryConfig, schedule: NoiseSchedule) -> dict[int, Trajectory]:
    """The trajectory of each step count that a student learns; one, unless it is unified.

    Raises:
        TDMError: as :class:`Trajectory`; or two step counts that the timesteps are to tell apart share one.
    """
    trajectories = {k: Trajectory(config, schedule, k) for k in sorted(config.unify or (config.steps,))}
    known: dict[float, int] = {}
    for k, trajectory in trajectories.items():
        for t in trajectory.timesteps.tolist() if config.tell_steps == "timestep" else ():
            near = next((other for other in known if abs(other - t) < 1), None)
            if near is not None:
                raise TDMError(
                    f"{known[near]} and {k} steps share timestep {t:g}, which is to tell them apart; change "
                    "trajectory.spread, or trajectory.tell_steps"
                )
            known[t] = k
    return trajectories
