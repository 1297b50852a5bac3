"""What is distilled, as the loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from ..pipelines.prediction_types import PredictionType
from ..pipelines.schedule import NoiseSchedule
from ..pipelines.students.recipe import StudentRecipe
from .best import Metric
from .preview import Preview
from .roles import GuidedOutput
from .trajectory import Condition, Trajectory

Sample = Callable[[Tensor, Condition], Tensor]
"""``(noise [B, ...], cond) -> x0``: the student on its own grid with its mean weights, the guided teacher on many
steps, or the critic's prediction of the student's sample.
"""


@dataclass(frozen=True)
class Teacher:
    """The guided teacher: a `Sample`, and in ``identity``, as JSON, what its samples depend on other than base, noise
    and prompts. A task can use it as the key of pictures that it keeps for later runs.
    """

    draw: Sample
    identity: Mapping[str, Any]

    def __call__(self, noise: Tensor, cond: Condition) -> Tensor:
        """Samples of the teacher, ``[B, ...]``."""
        return self.draw(noise, cond)


class Task(Protocol):
    """What is distilled: everything that differs between a mixture of Gaussians and a text-to-image model."""

    base: nn.Module  # the pretrained network, on its device; it is frozen
    schedule: NoiseSchedule
    prediction_type: PredictionType
    targets: Sequence[str] | str  # the layers that get adapters, as in peft
    guided_output: GuidedOutput | None  # how the base's guidance is normalised; None: not at all
    time_embedder: str  # the base's module whose output [B, D] is the time embedding

    @property
    def device(self) -> torch.device:
        """Where the base runs."""
        ...

    @property
    def measure(self) -> Metric | None:
        """The measure of :meth:`evaluate` by which the best student is kept; None keeps none."""
        ...

    def call(self, base: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        """The network's output for ``x`` ``[B, ...]``, ``timesteps`` ``[B]`` float32. Keep bf16-unsafe
        parts in float32.
        """
        ...

    def conditions(self, n: int, generator: torch.Generator) -> tuple[Condition, tuple[int, ...]]:
        """``n`` prompts drawn with ``generator`` (CPU) and nothing else, encoded (``{}`` if there are none), and the
        shape of one sample, which may differ from batch to batch. On any device: the loop moves what it needs.
        """
        ...

    def null(self, cond: Condition) -> Condition:
        """The unconditional counterpart of ``cond``, in the same shapes, on the same device."""
        ...

    def identity(self) -> Mapping[str, str]:
        """Hashes of what the run learns from ("the prompts", "the base"): it is resumed with the same content."""
        ...

    def preview(self, student: Sample, teacher: Teacher, critic: Sample) -> Preview:
        """What the three draw from fixed seeds, and how the student's samples compare with the teacher's."""
        ...

    def evaluate(self, student: Sample, teacher: Teacher) -> dict[str, float]:
        """The task's own measures, from fixed seeds."""
        ...

    def show(self, sampler: Sample) -> Image.Image:
        """A small picture of what a sampler draws from fixed seeds, to compare with that of another."""
        ...

    def recipe(self, trajectories: Mapping[int, Trajectory]) -> StudentRecipe | None:
        """How a student with a trajectory for each of its step counts is sampled, for its file; None for a task that is
        no pipeline.
        """
        ...
