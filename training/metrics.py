"""Measures of pictures that need no downloaded weights. All are pure functions of tensors.

Pictures are seen through random filters with a fixed seed on a Laplacian pyramid: how much of each pattern, at each
scale, a picture holds. Good for ranking samplers of one model against each other, not comparable with FID.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 4
FILTERS = 48
FILTER_SIZE = 5


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
        pictures: uint8 (N, 3, H, W), H and W at least 64.

    Returns:
        float32 (N, 2 * LEVELS * FILTERS * cells ** 2).
    """
    blur, random = _filters()
    x = pictures.float() / 127.5 - 1.0
    seen = []
    for level in range(LEVELS):
        low = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), blur, groups=3)
        answer = F.conv2d(x - low if level < LEVELS - 1 else x, random)
        seen.append(F.adaptive_avg_pool2d(answer.abs(), cells).flatten(1))
        seen.append(F.adaptive_avg_pool2d(answer.square(), cells).sqrt().flatten(1))
        x = low[..., ::2, ::2]
    return torch.cat(seen, 1)


def energy_distance(x: Tensor, y: Tensor, block: int = 500) -> float:
    """Unbiased ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` (Szekely and Rizzo) of ``[n, D]`` and ``[m, D]``; 0 only for
    equal laws.

    May be slightly negative for equal ones. Pairs are made ``block`` rows at a time.
    """

    def total(a: Tensor, b: Tensor) -> float:
        return sum(float(torch.cdist(part, b).sum(dtype=torch.float64)) for part in a.split(block))

    n, m = len(x), len(y)
    return 2 * total(x, y) / (n * m) - total(x, x) / (n * (n - 1)) - total(y, y) / (m * (m - 1))


def distance(pictures: Tensor, reference: Tensor) -> tuple[float, float]:
    """Mean over prompts of the energy distance between two samplers' pictures of that prompt.

    Prompt by prompt it sees wrong contents as well as wrong looks, and differences between prompts, which would drown
    both, cancel. Features are standardised by the reference's and the result is per root of a dimension.

    Args:
        pictures, reference: uint8 (prompts, seeds, 3, H, W), the same prompts, other seeds; at least 2 of each.

    Returns:
        The distance, about 0 for equal samplers (it may be slightly negative), and its standard error over prompts.
    """
    prompts = len(reference)
    x, y = (features(p.flatten(0, 1)) for p in (pictures, reference))
    mean, std = y.mean(0), y.std(0).clamp_min(1e-6)
    x, y = (((f - mean) / std).view(prompts, -1, f.shape[1]) for f in (x, y))
    each = torch.tensor([energy_distance(a, b) for a, b in zip(x, y, strict=True)]) / x.shape[2] ** 0.5
    return float(each.mean()), float(each.std() / prompts**0.5)


def diversity(pictures: Tensor) -> float:
    """Mean feature distance of pictures of one prompt, place included: uint8 (prompts, seeds, 3, H, W)."""
    prompts, seeds = pictures.shape[:2]
    seen = features(pictures.flatten(0, 1), cells=4).view(prompts, seeds, -1)
    return float(torch.cdist(seen, seen).sum() / (prompts * seeds * (seeds - 1)))


def colour_ratios(pictures: Tensor, reference: Tensor) -> dict[str, float]:
    """Brightness, contrast and saturation of ``pictures`` over those of ``reference`` (uint8): 1 is equal.

    Oversaturation and darkening, the usual ways in which a distilled student collapses, show here first.
    """

    def statistics(p: Tensor) -> Tensor:
        x = p.float()
        saturation = (x.amax(1) - x.amin(1)).mean()
        return torch.stack([x.mean(), x.std((0, 2, 3)).mean(), saturation])

    ratios = statistics(pictures) / statistics(reference)
    return dict(zip(("brightness", "contrast", "saturation"), ratios.tolist(), strict=True))
