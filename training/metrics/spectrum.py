"""How much of a picture is coarse and how much is fine: a few-step student that blurs lacks power in the fine octaves,
one that oversharpens has too much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bootstrap import ratio

# Octaves of `sharpness`: 2 to 16 pixels. A VAE that stores 8 x 8 pixels in one place shows in the coarsest of them what
# is too sharp in its latents, and in the finest what its decoder cannot draw.
FINE = 3
CHUNK = 2**21  # pixels at a time


def octaves(height: int, width: int) -> list[str]:
    """Names of the bands of `power_spectrum`, the finest first: wavelengths in pixels."""
    return [f"{2**i}-{2 ** (i + 1)} px" for i in range(1, min(height, width).bit_length() - 1)]


def power_spectrum(pictures: Tensor) -> Tensor:
    """Radially averaged power of each picture in octaves of the wavelength, 2 to 4 pixels first.

    The mean of a channel is taken off, and a Hann window keeps the seam between opposite edges out. White noise has its
    variance in each band.

    Args:
        pictures: (N, 3, H, W), uint8 or numbers, of any size.

    Returns:
        float64 (N, bands), of all channels together, in squares of the pictures' unit. Pictures with a side below 4
        pixels have no band.
    """
    height, width = pictures.shape[2:]
    at_once = max(1, CHUNK // (height * width))
    return torch.cat([_power(part.double()) for part in pictures.split(at_once)])


def sharpness(power: Tensor) -> Tensor:
    """Power at wavelengths of 2 to 16 pixels over the reference's: 1 is equal, a blurred picture is below.

    It is the geometric mean of the ratios of three octaves, since the coarsest has most of the power.

    Args:
        power: (N, 2, bands), the `power_spectrum` of N pictures and of N pictures of a reference.

    Returns:
        A 0-dim tensor; NaN without a band, or where the pictures and the reference have no power in one.
    """
    return ratio(power[..., :FINE]).log().mean().exp()


def power_ratios(pictures: Tensor, reference: Tensor) -> dict[str, float]:
    """``sharpness`` of uint8 pictures (N, 3, H, W) over a reference (N, 3, H, W), and their power in its three finest
    octaves: ``power_2-4px``, ``power_4-8px``, ``power_8-16px``. 1 is equal. What has no power gives NaN or infinity.
    """
    power = torch.stack([power_spectrum(pictures), power_spectrum(reference)], 1)
    names = [f"power_{name.replace(' ', '')}" for name in octaves(*pictures.shape[2:])[:FINE]]
    return {"sharpness": float(sharpness(power)), **dict(zip(names, ratio(power).tolist(), strict=False))}


def _power(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    window = torch.outer(*(torch.hann_window(n, periodic=True, dtype=torch.float64) for n in (height, width)))
    x = (x - x.mean((2, 3), keepdim=True)) * window
    power = torch.fft.fft2(x).abs().square().mean(1) / window.square().sum()
    down, across = torch.meshgrid(*(torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width)), indexing="ij")
    band = -(down.square() + across.square()).sqrt().log2()  # of a wavelength w: log2 w; of the mean: infinite
    bands = range(1, len(octaves(height, width)) + 1)
    means = [power[:, (band >= i) & (band < i + 1)].mean(1, keepdim=True) for i in bands]
    return torch.cat([power.new_empty(len(power), 0), *means], 1)
