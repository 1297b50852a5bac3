"""The mean of LoRAs as functions of the weights: of the products ``B @ A``, not of the halves.

The halves themselves have no mean: ``(B R^-1)(R A)`` is the same LoRA for every R, and each training ends in its own.
The sum of products is exact where the ranks are stacked; what is above the wanted rank is cut off by SVD, which loses
the least that any LoRA of that rank can lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import TDMError
from .pairs import Layers, Lora


class Mean(NamedTuple):
    """The mean of several LoRAs: its layers, and the share of the exact mean's Frobenius norm that they keep."""

    layers: Layers
    kept: float


def mean(loras: Sequence[Layers], weights: Sequence[float], rank: int | None = None) -> Mean:
    """The weighted mean of LoRAs of the same layers, at a rank.

    Args:
        loras: at strength 1.0; ranks may differ.
        weights: one each, above 0; only their ratios matter.
        rank: of the mean, at most; None is the largest rank of each layer among the loras.

    Raises:
        TDMError: weights or rank out of range, or layers that are not in all of them or have other widths.
    """
    if len(weights) != len(loras) or not all(0 < weight < float("inf") for weight in weights):
        raise TDMError(f"{len(loras)} students need as many weights above 0, got {list(weights)}")
    if rank is not None and rank < 1:
        raise TDMError(f"the rank must be at least 1, not {rank}")
    shares = [weight / sum(weights) for weight in weights]
    layers: dict[str, dict[str, Lora]] = {}
    total, kept = 0.0, 0.0
    for component, name in dict.fromkeys((c, name) for lora in loras for c, names in lora.items() for name in names):
        same = [lora[component][name] for lora in loras if name in lora.get(component, {})]
        if len(same) < len(loras) or len({(one.widths, one.A.shape[2:]) for one in same}) > 1:
            raise TDMError(
                f"the students cannot be averaged: layer '{component}.{name}' is not in all of them with one shape"
            )
        averaged, singular = reduce(stack(same, shares), rank or max(one.rank for one in same))
        layers.setdefault(component, {})[name] = averaged
        total += float(singular.square().sum())
        kept += float(singular[: averaged.rank].square().sum())
    return Mean(layers, (kept / total) ** 0.5 if total else 1.0)


def stack(loras: Sequence[Lora], weights: Sequence[float]) -> Lora:
    """``sum_i weights_i B_i A_i`` of one layer, exactly: the ranks one after the other."""
    scaled = [lora.scaled(weight) for lora, weight in zip(loras, weights, strict=True)]
    return Lora(torch.cat([lora.A for lora in scaled], 0), torch.cat([lora.B for lora in scaled], 1))


def reduce(lora: Lora, rank: int) -> tuple[Lora, Tensor]:
    """(the nearest LoRA of at most this rank, the singular values of the whole, descending, in float64).

    A singular value goes in equal parts into both halves. The SVD is of a small matrix: both halves are first written
    in orthonormal bases of what they span.
    """
    A, B = lora.A.double().flatten(1), lora.B.double().flatten(1)
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.T)
    u, singular, v = torch.linalg.svd(r_b @ r_a.T)
    rank = min(rank, len(singular))
    root = singular[:rank].sqrt()
    new_A, new_B = root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    A = new_A.reshape(rank, *lora.A.shape[1:]).to(lora.A.dtype)
    return Lora(A, new_B.reshape(len(new_B), rank, *lora.B.shape[2:]).to(lora.B.dtype)), singular
