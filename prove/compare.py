"""Two checkpoints of the same update: whether they are equal, and how far apart their students are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# How far two students may be from each other, over the size of one, where sums were made in another order. A GPU rounds
# to 16 bits. Students that have nothing in common are 1.4 apart.
FAR = {"cpu": 0.05, "cuda": 0.5}


def equal(one: Any, other: Any) -> bool:
    """Whether two values of checkpoints are the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, Tensor) and hasattr(one, "__tensor_flatten__"):  # 8-bit moments: several tensors in one
        return all(equal(getattr(one, name), getattr(other, name)) for name in one.__tensor_flatten__()[0])
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """How far two students are from each other, over the size of the second. Only what begins at 0 counts (lora_B):
    all of it is learned.
    """
    names = [name for name in other if "lora_B" in name]
    size = sum(float(other[name].double().square().sum()) for name in names)
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in names)
    return (apart / size) ** 0.5 if size else float(apart > 0)
