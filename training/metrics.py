"""Measures of pictures that need no downloaded weights. All are pure functions of tensors.

``distance`` is an energy distance on the features of a random network with a fixed seed: good for ranking samplers of
one model against each other, not comparable with FID.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128)


@functools.cache
def _random_network() -> nn.ModuleList:
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleList()
    channels = 3
    for width in WIDTHS:
        layer = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        for parameter, std in ((layer.weight, (2 / (16 * channels)) ** 0.5), (layer.bias, 0.1)):
            assert parameter is not None
            nn.init.normal_(parameter, std=std, generator=generator)
        layers.append(layer)
        channels = width
    return layers.requires_grad_(False)


@torch.no_grad()
def features(pictures: Tensor) -> Tensor:
    """What the random network sees: uint8 pictures (N, 3, H, W) to float32 (N, 4 * sum(WIDTHS)).

    Each layer's activations are averaged over the four quarters of the picture, so that place counts.
    """
    x = pictures.float() / 127.5 - 1.0
    seen = []
    for layer in _random_network():
        x = torch.relu(layer(x))
        seen.append(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
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


def distance(pictures: Tensor, reference: Tensor) -> float:
    """Energy distance of two sets of uint8 pictures on random features, standardised by the reference's."""
    a, b = features(pictures), features(reference)
    mean, std = b.mean(0), b.std(0).clamp_min(1e-6)
    return energy_distance((a - mean) / std, (b - mean) / std) / a.shape[1] ** 0.5


def diversity(pictures: Tensor) -> float:
    """Mean feature distance of pictures of one prompt: uint8 (prompts, seeds, 3, H, W)."""
    prompts, seeds = pictures.shape[:2]
    seen = features(pictures.flatten(0, 1)).view(prompts, seeds, -1)
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
