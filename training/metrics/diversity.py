"""How different the samples of one condition are from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import features


def spread(points: Tensor) -> Tensor:
    """Mean distance between two of the points ``[..., n, D]`` of each group, ``[...]``."""
    n = points.shape[-2]
    return torch.cdist(points, points).sum((-2, -1)) / (n * (n - 1))


def diversity_by_prompt(pictures: Tensor) -> Tensor:
    """Feature distance of pictures of one prompt, place included: uint8 (prompts, seeds, 3, H, W) to (prompts,)."""
    return spread(features(pictures.flatten(0, 1), cells=4).view(*pictures.shape[:2], -1))


def diversity(pictures: Tensor) -> float:
    """The mean of `diversity_by_prompt`."""
    return float(diversity_by_prompt(pictures).mean())
