"""What a run shows from fixed seeds, and how the student's samples compare with the teacher's."""

from __future__ import annotations

import math
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .metrics import colour_ratios, diversity, power_ratios

SIDE = 64  # pixels at which colours and diversity are compared, the least metrics.features takes


class Preview(NamedTuple):
    """What a task shows from fixed seeds."""

    image: Image.Image | None  # rows of teacher, student and the critic's prediction
    ratios: dict[str, float]  # the student's over the teacher's: diversity, and of pictures all of picture_ratios


def picture_ratios(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """The student's ``colour_ratios``, ``diversity`` and ``power_ratios`` over the teacher's.

    The last are of the full size. A ratio to nothing is left out, and so are the bands that pictures are too small for.

    Args:
        student, teacher: uint8 (prompts, seeds, 3, H, W), of any size.
    """
    pictures, reference = (
        F.interpolate(p.flatten(0, 1).float(), (SIDE, SIDE), mode="bilinear", antialias=True).round().byte()
        for p in (student, teacher)
    )
    ratios = colour_ratios(pictures, reference)
    shape = (*teacher.shape[:3], SIDE, SIDE)
    spread = diversity(reference.view(shape))
    ratios["diversity"] = diversity(pictures.view(shape)) / spread if spread else math.nan
    ratios |= power_ratios(student.flatten(0, 1), teacher.flatten(0, 1))
    return {name: value for name, value in ratios.items() if math.isfinite(value)}  # a ratio to nothing says nothing
