"""The student's trajectory: its trained grid, the roll-out to a stage, and re-noising from the state a stage ends in.

Stage ``i = 0 .. K - 1`` is the student's step from grid level ``i`` to level ``i + 1``; level ``K`` is the clean end
``(1, 0)``. In the paper's ``k = K - i`` the stage starts at ``t_k`` and ends at ``m = t_{k-1}``. Every sample of a
batch has its own stage.

Levels, stages and tau are tiny CPU tensors (float64, int64), states are on the device: nothing here waits for the
device.
"""

from __future__ import annotations

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
    renoise_coefficients,
    shift_sigma,
    uniform_grid,
    unshift_sigma,
)
from .config import TrajectoryConfig

Predict = Callable[[Tensor, Tensor, Condition], tuple[Tensor, Tensor]]  # (x [B, ...], timesteps [B], cond) -> (x0, eps)


class Noised(NamedTuple):
    """``x_tau = r x_m + b xi`` at ``(alpha, sigma)`` of tau; the coefficients are ``[B]`` float64 on the CPU."""

    x_tau: Tensor
    xi: Tensor
    b: Tensor
    alpha: Tensor
    sigma: Tensor


@torch.no_grad()
def sample(
    predict: Predict, schedule: NoiseSchedule, timesteps: Sequence[float], noise: Tensor, cond: Condition
) -> Tensor:
    """Deterministic steps from ``noise`` ``[B, ...]`` down the grid to the clean end: DDIM / Euler with its own
    noise.
    """
    alphas, sigmas = grid_pairs(schedule, timesteps)
    x = noise
    for i, t in enumerate(timesteps):
        x0, eps = predict(x, torch.full((len(x),), float(t), dtype=torch.float64), cond)
        x = ddim_step(x0, eps, float(alphas[i + 1]), float(sigmas[i + 1]))
    return x


class Trajectory:
    """The trained grid of a student and the tau band of each of its stages.

    Attributes:
        timesteps: (K,) float64, strictly decreasing. alphas, sigmas: (K + 1,) float64, ending in (1, 0).
        bands: (K, 2) float64, the lowest and highest tau of each stage, in unshifted time (0 clean, 1 noise).

    Raises:
        TDMError: a grid the schedule does not have, a shift on a model without one, or a stage without room for tau.
    """

    def __init__(self, config: TrajectoryConfig, schedule: NoiseSchedule) -> None:
        if schedule.kind != "flow" and config.shift != 1:
            raise TDMError(f"trajectory.shift is {config.shift}, but only flow models have a time shift; set it to 1")
        self.config, self.schedule = config, schedule
        grid = config.timesteps or uniform_grid(config.steps, schedule, config.shift)
        self.alphas, self.sigmas = grid_pairs(schedule, grid)
        self.timesteps = torch.tensor(grid, dtype=torch.float64)
        if self.alphas[1] <= 0:
            raise TDMError(f"only the first timestep may be pure noise, not the second of {list(grid)}")

        start = self._time(self.timesteps)
        end = torch.cat([start[1:], start.new_zeros(1)])
        low = (end + config.margin).clamp_min(config.tau_min)
        high = (start if config.bands == "separate" else torch.ones_like(start)).clamp_max(config.tau_max)
        self.bands = torch.stack([low, high], 1)
        for t, (a, b) in zip(grid, self.bands.tolist(), strict=True):
            if a >= b:
                raise TDMError(
                    f"the stage from timestep {t:g} leaves tau no room ({a:.3f} to {b:.3f}); lower trajectory.margin"
                )

    def __len__(self) -> int:
        return len(self.timesteps)

    def _time(self, timesteps: Tensor) -> Tensor:
        time = timesteps / self.schedule.num_train_timesteps
        return unshift_sigma(time, self.config.shift)

    def draw_stages(self, n: int, generator: torch.Generator) -> Tensor:
        """Stages of ``n`` samples, latest first: even over the batch (``sample``) or one for all (``update``).

        Latest first, so that the samples that still have to roll are always the head of the batch. Samples are
        exchangeable.
        """
        order = torch.randperm(len(self), generator=generator)
        stages = order[:1].expand(n) if self.config.stages == "update" else order[torch.arange(n) % len(self)]
        return stages.sort(descending=True).values

    def draw_tau(self, stages: Tensor, generator: torch.Generator) -> Tensor:
        """Timesteps tau ``[B]``: uniform over each stage's band in unshifted time, whole numbers on a vp model."""
        low, high = self.bands[stages].unbind(1)
        time = low + (high - low) * torch.rand(len(stages), generator=generator, dtype=torch.float64)
        timesteps = shift_sigma(time, self.config.shift) * self.schedule.num_train_timesteps
        return timesteps if self.schedule.kind == "flow" else timesteps.round().clamp_max(self.schedule.last_timestep)

    def step(self, x0: Tensor, eps: Tensor, stages: Tensor) -> Tensor:
        """The state a stage ends in: one deterministic step with the model's own noise."""
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

    def renoise(self, x_m: Tensor, stages: Tensor, tau: Tensor, xi: Tensor) -> Noised:
        """Diffuse the state a stage ended in up to tau: ``x_tau = r x_m + b xi`` (method: from the noisy state, not
        from x0).
        """
        alpha, sigma = self.schedule.alpha_sigma(tau)
        r, b = renoise_coefficients(self.alphas[stages + 1], self.sigmas[stages + 1], alpha, sigma)
        return Noised(expand(r, x_m) * x_m + expand(b, xi) * xi, xi, b, alpha, sigma)
