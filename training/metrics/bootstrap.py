"""How sure a number is: percentile intervals by resampling what it was measured on (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
CHUNK = 250  # of them at a time
LEVEL = 0.95

Statistic = Callable[[Tensor], Tensor]
"""``[n, ...]`` values to one number, by tensor operations alone: many resamples are taken at once (torch.vmap)."""


class Value(NamedTuple):
    """A measure and its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def ratio(values: Tensor) -> Tensor:
    """A `Statistic` of pairs ``[n, 2]`` or ``[n, 2, ...]``: the mean of the first over that of the second."""
    first, second = values.mean(0)
    return first / second


def bootstrap_interval(
    values: Tensor, statistic: Statistic = torch.mean, seed: int = 0, *, level: float = LEVEL
) -> tuple[float, float]:
    """The interval of a statistic of independent values: prompts, or whole training runs.

    The same each time. Of very few values, such as three training seeds, it cannot be wider than they are apart: it
    then says what was seen, not with 95 % where another run will be. Nor has it any width where all values are equal.

    Args:
        values: ``[n, ...]``, one row for each thing that was drawn independently.
        statistic: of ``[n, ...]``; the mean if not given.
        level: of the interval.

    Raises:
        ValueError: there are no values, or some are not finite.
    """
    if not len(values) or not bool(values.isfinite().all()):
        raise ValueError("an interval needs values, all of them finite")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    resampled = torch.vmap(lambda rows: statistic(values[rows]), chunk_size=CHUNK)(drawn).double()
    low, high = resampled.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(low), float(high)


def measured(values: Tensor, statistic: Statistic = torch.mean) -> Value:
    """A statistic of ``[n, ...]`` values with its `bootstrap_interval`."""
    values = values.double()
    return Value(float(statistic(values)), *bootstrap_interval(values, statistic))
