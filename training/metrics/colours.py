"""Brightness, contrast and saturation. Oversaturation and darkening, the usual ways in which a distilled student
collapses, show here first.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLOURS = ("brightness", "contrast", "saturation")


def colour_statistics(moments: Tensor) -> Tensor:
    """``COLOURS`` of a set of pictures by their `moments` (N, 7), as (3,): the mean, the standard deviation over all
    pictures and pixels of a channel, and the mean difference between a pixel's largest and smallest channel.
    """
    mean = moments.mean(0)
    # The unbiased variance of a channel: N H W values less one, which is all the same here.
    contrast = (mean[3:6] - mean[:3].square()).clamp_min(0).sqrt().mean()
    return torch.stack([mean[:3].mean(), contrast, mean[6]])


def moments(pictures: Tensor) -> Tensor:
    """What `colour_statistics` needs of each picture, so that any choice of them can be asked about.

    Args:
        pictures: uint8 (N, 3, H, W).

    Returns:
        float64 (N, 7): mean and mean square of each channel, mean saturation; of values from 0 to 255.
    """
    x = pictures.double()
    saturation = (x.amax(1) - x.amin(1)).mean((1, 2))
    return torch.cat([x.mean((2, 3)), x.square().mean((2, 3)), saturation[:, None]], 1)


def colour_ratios(pictures: Tensor, reference: Tensor) -> dict[str, float]:
    """``COLOURS`` of uint8 ``pictures`` (N, 3, H, W) over those of ``reference`` (M, 3, H, W): 1 is equal."""
    ratios = colour_statistics(moments(pictures)) / colour_statistics(moments(reference))
    return dict(zip(COLOURS, ratios.tolist(), strict=True))
