"""How far two laws are apart, of which there are samples: points ``[n, D]``, or pictures through their features.

Sources: energy distance (Szekely and Rizzo, 2013), sliced Wasserstein (Rabin et al., 2011), Frechet distance of two
Gaussians (Dowson and Landau, 1982), the one that FID takes on the features of a trained network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .features import standardised

PROJECTIONS = 256  # directions of sliced Wasserstein
DIMENSIONS = 32  # that Frechet sees of pictures: the covariance of more would want more pictures than there are


def energy_distance(x: Tensor, y: Tensor, block: int = 500) -> float:
    """Unbiased ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` (Szekely and Rizzo) of ``[n, D]`` and ``[m, D]``; 0 only for
    equal laws.

    May be slightly negative for equal ones. Pairs are made ``block`` rows at a time.
    """

    def total(a: Tensor, b: Tensor) -> float:
        return sum(float(torch.cdist(part, b).sum(dtype=torch.float64)) for part in a.split(block))

    n, m = len(x), len(y)
    return 2 * total(x, y) / (n * m) - total(x, x) / (n * (n - 1)) - total(y, y) / (m * (m - 1))


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = PROJECTIONS) -> float:
    """The 2-Wasserstein distance of points ``[n, D]`` and ``[m, D]``, in the root mean square over random directions.

    Exact on each direction, also where n and m differ. The directions are the same each time. Of equal laws it is not
    0 but falls with the number of points; compare it with that of the reference against itself.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    a, b = ((p.double().cpu() @ directions).sort(0).values for p in (x, y))
    n, m = len(a), len(b)
    # Both quantile functions are steps: they are constant between these marks, in units of 1 / (n m).
    marks = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    width = torch.diff(marks, prepend=marks.new_zeros(1)).double() / (n * m)
    apart = a[(marks - 1) // m] - b[(marks - 1) // n]
    return float((width[:, None] * apart.square()).sum(0).mean().sqrt())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians with the means and covariances of points ``[n, D]`` and ``[m, D]``, in float64:
    ``|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))``.

    It is squared, as FID is, and above 0 for equal laws unless n and m are far above D.

    Raises:
        ValueError: no more points than dimensions.
    """
    if min(len(x), len(y)) <= x.shape[1]:
        raise ValueError(f"a covariance in {x.shape[1]} dimensions needs more points than {min(len(x), len(y))}")
    x, y = x.double().cpu(), y.double().cpu()
    cov_x, cov_y = (torch.cov(p.T).reshape(p.shape[1], -1) for p in (x, y))
    # The eigenvalues of S_x S_y are those of the symmetric S_x^(1/2) S_y S_x^(1/2).
    values, vectors = torch.linalg.eigh(cov_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
    moved = (x.mean(0) - y.mean(0)).square().sum()
    return float((moved + cov_x.trace() + cov_y.trace() - 2 * cross).clamp_min(0))  # below it by rounding, if at all


# ---------------------------------------------------------------------- of pictures


def distances_by_prompt(pictures: Tensor, reference: Tensor) -> Tensor:
    """The energy distance between two samplers' pictures of each prompt.

    Prompt by prompt it sees wrong contents as well as wrong looks, and differences between prompts, which would drown
    both, cancel. Features are standardised by the reference's and the result is per root of a dimension.

    Args:
        pictures, reference: uint8 (prompts, seeds, 3, H, W), the same prompts, other seeds; at least 2 of each.

    Returns:
        float32 (prompts,), with mean about 0 for equal samplers (it may be slightly negative).
    """
    prompts = len(reference)
    x, y = (f.view(prompts, -1, f.shape[1]) for f in standardised(pictures.flatten(0, 1), reference.flatten(0, 1)))
    return torch.tensor([energy_distance(a, b) for a, b in zip(x, y, strict=True)]) / x.shape[2] ** 0.5


def distance(pictures: Tensor, reference: Tensor) -> tuple[float, float]:
    """The mean of `distances_by_prompt` and its standard error over prompts; pictures as there."""
    each = distances_by_prompt(pictures, reference)
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def picture_sliced_wasserstein(pictures: Tensor, reference: Tensor) -> float:
    """`sliced_wasserstein` of the standardised features of uint8 pictures (N, 3, H, W) and (M, 3, H, W)."""
    return sliced_wasserstein(*standardised(pictures, reference))


def picture_frechet(pictures: Tensor, reference: Tensor) -> float:
    """`frechet_distance` of uint8 pictures (N, 3, H, W) and (M, 3, H, W) on fixed-seed random features: `DIMENSIONS` of
    the standardised ones, turned at random. It is not FID and not comparable with it.

    Raises:
        ValueError: there are not more pictures than dimensions.
    """
    x, y = standardised(pictures, reference)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(x.shape[1], DIMENSIONS, generator=generator, dtype=torch.float64)).Q
    return frechet_distance(x.double() @ turn, y.double() @ turn)
