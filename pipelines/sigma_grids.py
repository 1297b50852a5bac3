"""Grids from noise levels: what `TDMScheduler.set_timesteps` makes of `sigmas`, as the stock schedulers take them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import TDMError
from .schedule import NoiseSchedule, shift_sigma


def noisy_levels(sigmas: Sequence[float]) -> list[float]:
    """The sigmas without the final 0 that some schedulers count and others do not.

    Raises:
        TDMError: nothing is left.
    """
    levels = [float(s) for s in sigmas]
    if levels and levels[-1] == 0:
        levels.pop()
    if not levels:
        raise TDMError("sigmas needs at least one level above 0")
    return levels


def is_pipeline_default(sigmas: Sequence[float], schedule: NoiseSchedule) -> bool:
    """Whether these n levels are what pipelines pass to a flow scheduler for "n steps": ``linspace(1, 1/n, n)``."""
    n = len(sigmas)
    return schedule.kind == "flow" and all(abs(s - (n - i) / n) < 1e-6 for i, s in enumerate(sigmas))


def time_shift(config: Mapping[str, Any], mu: float | None) -> float:
    """The time shift of a flow scheduler's config: `flow_shift`, or the dynamic one that a pipeline passes as `mu`.

    Raises:
        TDMError: the config shifts dynamically, and `mu` is missing or gives no shift.
    """
    if not config["use_dynamic_shifting"]:
        return config["flow_shift"]
    if mu is None:
        raise TDMError("this model shifts its timesteps by image size: pass mu to set_timesteps")
    shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
    if not 0 < shift < math.inf:
        raise TDMError(f"mu = {mu} is no time shift")
    return shift


def timesteps_of_sigmas(
    sigmas: Sequence[float], schedule: NoiseSchedule, shift: float, terminal: float | None
) -> list[float]:
    """Timesteps of noise levels, with the time shift that a stock flow scheduler would apply to them.

    Args:
        sigmas: on a flow model in [0, 1], before the shift; on a vp model sigma / alpha.
        shift: of a flow model.
        terminal: on a flow model, the levels are stretched so that the last one is this; None or 0: they are not.
    """
    levels = list(sigmas)
    if schedule.kind == "flow":
        levels = [shift_sigma(s, shift) for s in levels]
        if terminal and levels[-1] < 1:
            stretch = (1 - terminal) / (1 - levels[-1])
            levels = [1 - (1 - s) * stretch for s in levels]
    return schedule.timestep_from_sigma(torch.tensor(levels, dtype=torch.float64)).tolist()
