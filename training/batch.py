"""What an update starts from: all of its randomness, drawn before anything runs.

The whole batch is drawn from the run's one generator, in every process alike; processes and micro batches then take
their parts of it. So a run on several devices, or in small portions, is the run of one device, up to the order of
sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..pipelines.families import Condition
from ..pipelines.families.base import on_device
from .config import Band
from .trajectory import Trajectory


class Renoise(NamedTuple):
    """Where and with what noise a state is diffused further: tau ``[B]`` float64 on the CPU, ``xi`` ``[B, ...]``."""

    tau: Tensor
    xi: Tensor


class Batch(NamedTuple):
    """The trajectory that is trained on, conditions with their unconditional counterpart (``{}`` without guidance),
    start noise ``[B, ...]``, the stage of each sample ``[B]`` (CPU), latest first, and the re-noising for the critic
    and for the student (None: the student is not trained on it, or shares the critic's).

    Three are there only where they are asked for: the re-noising of a decoupled guidance term, the noise ``[B, K,
    ...]`` of a stochastic sampler's steps, and a guidance scale for each sample ``[B]`` (float64, CPU).
    """

    trajectory: Trajectory
    cond: Condition
    null: Condition
    noise: Tensor
    stages: Tensor
    critic: Renoise
    student: Renoise | None
    guidance: Renoise | None = None
    fresh: Tensor | None = None
    scale: Tensor | None = None

    def part(self, i: int, n: int) -> Batch:
        """Every n-th sample from the i-th on, so that all parts have about the same stages, latest first."""
        every_nth = slice(i, None, n)

        def of(renoise: Renoise) -> Renoise:
            return Renoise(*(value[every_nth] for value in renoise))

        return Batch(
            trajectory=self.trajectory,
            cond={key: value[every_nth] for key, value in self.cond.items()},
            null={key: value[every_nth] for key, value in self.null.items()},
            noise=self.noise[every_nth],
            stages=self.stages[every_nth],
            critic=of(self.critic),
            student=self.student and of(self.student),
            guidance=self.guidance and of(self.guidance),
            fresh=None if self.fresh is None else self.fresh[every_nth],
            scale=None if self.scale is None else self.scale[every_nth],
        )

    def to(self, device: torch.device) -> Batch:
        """Conditions and noise on the device; levels stay on the CPU (training/trajectory.py)."""

        def move(renoise: Renoise) -> Renoise:
            return renoise._replace(xi=renoise.xi.to(device, non_blocking=True))

        return self._replace(
            cond=on_device(self.cond, device),
            null=on_device(self.null, device),
            noise=self.noise.to(device, non_blocking=True),
            critic=move(self.critic),
            student=self.student and move(self.student),
            guidance=self.guidance and move(self.guidance),
            fresh=None if self.fresh is None else self.fresh.to(device, non_blocking=True),
        )


def draw_batch(
    trajectory: Trajectory,
    cond: Condition,
    null: Condition,
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    student: bool,
    guidance_band: Band | None = None,
    guidance_range: tuple[float, float] | None = None,
) -> Batch:
    """Draw noise of ``shape`` ``(B, ...)``, stages and re-noisings for ``B`` conditions from the run's CPU generator. A
    seed is the same noise on every device.

    Args:
        student: draw a re-noising for the student as well.
        guidance_band: that of tau in a decoupled guidance term; None if there is none.
        guidance_range: from which each sample draws its guidance scale; None if there is none.
    """
    noise = torch.randn(shape, generator=generator)
    stages = trajectory.draw_stages(shape[0], generator)

    def renoise(band: Band | None = None) -> Renoise:
        return Renoise(trajectory.draw_tau(stages, generator, band), torch.randn(shape, generator=generator))

    critic = renoise()
    student_renoise = renoise() if student else None
    guidance = renoise(guidance_band) if student and guidance_band else None
    fresh = None
    if trajectory.config.sampler == "stochastic":
        fresh = torch.randn(shape[0], len(trajectory), *shape[1:], generator=generator)
    scale = None
    if guidance_range is not None:
        low, high = guidance_range
        scale = low + (high - low) * torch.rand(shape[0], generator=generator, dtype=torch.float64)
    return Batch(trajectory, cond, null, noise, stages, critic, student_renoise, guidance, fresh, scale)
