"""What a run shows from fixed seeds, and how the student's samples compare with the teacher's."""

from __future__ import annotations

import math
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .metrics import colour_ratios, diversity

SIDE = 64  # pixels of the previews that are compared, the least metrics.features takes: no alarm is about fine detail


class Preview(NamedTuple):
    """What a task shows from fixed seeds."""

    image: Image.Image | None  # rows of teacher, student and the critic's prediction
    ratios: dict[str, float]  # the student's over the teacher's: diversity, and of pictures what colour_ratios says


def picture_ratios(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """The student's ``colour_ratios`` and ``diversity`` over the teacher's, for uint8 pictures (prompts, seeds, 3, H,
    W) of any size.
    """
    pictures, reference = (
        F.interpolate(p.flatten(0, 1).float(), (SIDE, SIDE), mode="bilinear", antialias=True).round().byte()
        for p in (student, teacher)
    )
    ratios = colour_ratios(pictures, reference)
    shape = (*teacher.shape[:3], SIDE, SIDE)
    spread = diversity(reference.view(shape))
    ratios["diversity"] = diversity(pictures.view(shape)) / spread if spread else math.nan
    return {name: value for name, value in ratios.items() if math.isfinite(value)}  # a ratio to nothing says nothing
