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
from .trajectory import Trajectory


class Renoise(NamedTuple):
    """Where and with what noise a state is diffused further: tau ``[B]`` float64 on the CPU, ``xi`` ``[B, ...]``."""

    tau: Tensor
    xi: Tensor


class Batch(NamedTuple):
    """Conditions with their unconditional counterpart (``{}`` without guidance), start noise ``[B, ...]``, the stage of
    each sample ``[B]`` (CPU), latest first, and the re-noising for the critic and for the student (None: the student is
    not trained on it, or shares the critic's).
    """

    cond: Condition
    null: Condition
    noise: Tensor
    stages: Tensor
    critic: Renoise
    student: Renoise | None

    def part(self, i: int, n: int) -> Batch:
        """Every n-th sample from the i-th on, so that all parts have about the same stages, latest first."""
        here = slice(i, None, n)

        def of(renoise: Renoise) -> Renoise:
            return Renoise(*(value[here] for value in renoise))

        return Batch(
            cond={key: value[here] for key, value in self.cond.items()},
            null={key: value[here] for key, value in self.null.items()},
            noise=self.noise[here],
            stages=self.stages[here],
            critic=of(self.critic),
            student=None if self.student is None else of(self.student),
        )

    def to(self, device: torch.device) -> Batch:
        """Conditions and noise on the device; levels stay on the CPU (training/trajectory.py)."""

        def move(renoise: Renoise) -> Renoise:
            return renoise._replace(xi=renoise.xi.to(device, non_blocking=True))

        return self._replace(
            cond={key: value.to(device, non_blocking=True) for key, value in self.cond.items()},
            null={key: value.to(device, non_blocking=True) for key, value in self.null.items()},
            noise=self.noise.to(device, non_blocking=True),
            critic=move(self.critic),
            student=None if self.student is None else move(self.student),
        )


def draw_batch(
    trajectory: Trajectory,
    cond: Condition,
    null: Condition,
    shape: tuple[int, ...],
    generator: torch.Generator,
    *,
    student: bool,
) -> Batch:
    """Noise ``shape`` ``= (B, ...)``, stages and re-noisings for ``B`` conditions, from the run's CPU generator: a seed
    is the same noise on every device.

    Args:
        student: draw a re-noising for the student as well.
    """
    noise = torch.randn(shape, generator=generator)
    stages = trajectory.draw_stages(shape[0], generator)

    def renoise() -> Renoise:
        return Renoise(trajectory.draw_tau(stages, generator), torch.randn(shape, generator=generator))

    return Batch(cond, null, noise, stages, renoise(), renoise() if student else None)
