"""Pictures seen through random filters with a fixed seed on a Laplacian pyramid: how much of each pattern, at each
scale, a picture holds. Good for ranking samplers of one model against each other, not comparable with FID.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 4
FILTERS = 48
FILTER_SIZE = 5
LEAST_SIDE = 64  # pixels; smaller pictures are enlarged, so that the last level still holds something
CHUNK = 2**21  # pixels at a time


@functools.cache
def _filters() -> tuple[Tensor, Tensor]:
    """The blur of the pyramid (3, 1, 5, 5), and the random filters (FILTERS, 3, 5, 5)."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    random = torch.randn(FILTERS, 3, FILTER_SIZE, FILTER_SIZE, generator=torch.Generator().manual_seed(0))
    return torch.outer(row, row).expand(3, 1, 5, 5), random / (3 * FILTER_SIZE**2) ** 0.5


@torch.no_grad()
def features(pictures: Tensor, cells: int = 1) -> Tensor:
    """Mean and root mean square of every filter's answer in each of ``cells ** 2`` parts of the picture.

    ``cells = 1`` says what a picture shows, wherever it stands; more cells say where.

    Args:
        pictures: uint8 (N, 3, H, W). A side below `LEAST_SIDE` pixels is enlarged a whole number of times.

    Returns:
        float32 (N, 2 * LEVELS * FILTERS * cells ** 2).
    """
    height, width = pictures.shape[2:]
    at_once = max(1, CHUNK // (height * width))
    return torch.cat([_features(part, cells) for part in pictures.split(at_once)])


def _features(pictures: Tensor, cells: int) -> Tensor:
    blur, random = _filters()
    x = pictures.float() / 127.5 - 1.0
    if (side := min(x.shape[2:])) < LEAST_SIDE:
        x = F.interpolate(x, scale_factor=math.ceil(LEAST_SIDE / side), mode="nearest")
    statistics = []
    for level in range(LEVELS):
        low = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), blur, groups=3)
        answer = F.conv2d(x - low if level < LEVELS - 1 else x, random)
        statistics.append(F.adaptive_avg_pool2d(answer.abs(), cells).flatten(1))
        statistics.append(F.adaptive_avg_pool2d(answer.square(), cells).sqrt().flatten(1))
        x = low[..., ::2, ::2]
    return torch.cat(statistics, 1)


def standardised(pictures: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The `features` of uint8 pictures (N, 3, H, W) and of a reference (M, 3, H, W), both by the reference's mean and
    standard deviation.
    """
    x, y = features(pictures), features(reference)
    mean, std = y.mean(0), y.std(0).clamp_min(1e-6)
    return (x - mean) / std, (y - mean) / std
