"""How much of a picture is coarse and how much is fine: a few-step student that blurs lacks power in the fine octaves,
one that oversharpens has too much.
"""

from __future__ import annotations

import torch
from torch import Tensor


def octaves(height: int, width: int) -> list[str]:
    """Names of the bands of `power_spectrum`, the finest first: wavelengths in pixels."""
    return [f"{2**i}-{2 ** (i + 1)} px" for i in range(1, min(height, width).bit_length() - 1)]


def power_spectrum(pictures: Tensor) -> Tensor:
    """Radially averaged power of each picture in octaves of the wavelength, 2 to 4 pixels first.

    The mean of a channel is taken off, and a Hann window keeps the seam between opposite edges out. White noise has its
    variance in each band.

    Args:
        pictures: (N, 3, H, W), uint8 or numbers.

    Returns:
        float64 (N, bands), of all channels together, in squares of the pictures' unit.
    """
    x = pictures.double()
    height, width = x.shape[2:]
    window = torch.outer(*(torch.hann_window(n, periodic=True, dtype=torch.float64) for n in (height, width)))
    x = (x - x.mean((2, 3), keepdim=True)) * window
    power = torch.fft.fft2(x).abs().square().mean(1) / window.square().sum()
    down, across = torch.meshgrid(*(torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width)), indexing="ij")
    band = -(down.square() + across.square()).sqrt().log2()  # of a wavelength w: log2 w; of the mean: infinite
    bands = len(octaves(height, width))
    return torch.stack([power[:, (band >= i) & (band < i + 1)].mean(1) for i in range(1, bands + 1)], 1)
