"""The best K of many timesteps for a network, by dynamic programming (the idea: Watson et al., 2106.03802).

One fine deterministic run from noise gives, with N network calls, the network's prediction at each of N levels. A step
from level i to any later level j follows from the prediction at i alone, so the error of every possible step is known:
its distance from the fine run's own state at j. The cheapest way from noise to clean in K such steps is the grid.

**The cost** of a step is the mean square of that distance over the mean square of the state at j. The rest of the run
carries an error at j on into the picture, and on average scales it as it scales the state, from the state's size at j
to the picture's: so all costs are in one unit, squared shares of the clean sample (exact for a Gaussian). Distances in
the unit of x0 alone, over alpha_j, crowd the grid near pure noise instead, and end further from the fine run than even
spacing does; sums of roots instead of squares end further off at 3 and 4 steps, and nearer at 8 (on the bundled model).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TDMError
from .schedule import NoiseSchedule, ddim_step, grid_pairs, uniform_grid

Predict = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""``(x [B, ...], timestep) -> (x0, epsilon)``, each like x: a network with its prompts, guided or not."""


class Path(NamedTuple):
    """The levels that a run of K steps calls the network at, as indices, and the sum of its steps' costs."""

    levels: list[int]
    cost: float


def fine_levels(schedule: NoiseSchedule, n: int, shift: float, grids: Sequence[Sequence[float]]) -> list[float]:
    """About n timesteps to choose from, evenly spaced before the time shift, and all those of some grids as well.

    Args:
        grids: grids to compare with; all levels begin where the noisiest of them does.
    """
    exact = {float(t) for grid in grids for t in grid}
    even = uniform_grid(n, schedule, shift, max(exact, default=None))
    return sorted(exact | {t for t in even if all(abs(t - other) > 0.01 for other in exact)}, reverse=True)


@torch.no_grad()
def fine_run(
    predict: Predict, schedule: NoiseSchedule, timesteps: Sequence[float], noise: Tensor
) -> tuple[Tensor, Tensor]:
    """(costs of all steps, clean samples [B, ...]) of a deterministic run down N levels; N network calls a sample.

    Args:
        predict: the network.
        schedule: of the network.
        timesteps: N levels, decreasing.
        noise: states at the first level, [B, ...].

    Returns:
        costs: (N, N + 1) float64 on the CPU: from level i to j, where N is clean; infinite unless j > i.
        x0: where the run ends, in float64.

    Raises:
        TDMError: timesteps that are no grid (see `check_grid`), or a network that gives NaN.
    """
    alphas, sigmas = (values.tolist() for values in grid_pairs(schedule, timesteps))
    n, x, predictions = len(timesteps), noise.double(), []
    costs = torch.full((n, n + 1), torch.inf, dtype=torch.float64)
    for j, t in enumerate(timesteps, 1):
        x0, eps = predict(x.to(noise.dtype), float(t))
        predictions.append((x0.double(), eps.double()))
        x = ddim_step(*predictions[-1], alphas[j], sigmas[j])
        steps = torch.stack([(ddim_step(*p, alphas[j], sigmas[j]) - x).square().mean() for p in predictions])
        costs[:j, j] = (steps / x.square().mean()).cpu()
    if bool(costs.isnan().any()):
        raise TDMError("the network gives NaN on its way from noise")
    return costs, x


@torch.no_grad()
def run_error(
    predict: Predict, schedule: NoiseSchedule, timesteps: Sequence[float], noise: Tensor, x0: Tensor
) -> float:
    """The squared distance of a run's end from the fine run's `x0`, over that of `x0` from 0, in the unit of the costs.

    The run goes from `noise` [B, ...] down a grid of K timesteps, with K network calls a sample; `x0` is [B, ...].
    """
    alphas, sigmas = (values.tolist() for values in grid_pairs(schedule, timesteps))
    x = noise.double()
    for j, t in enumerate(timesteps, 1):
        x0_hat, eps = predict(x.to(noise.dtype), float(t))
        x = ddim_step(x0_hat.double(), eps.double(), alphas[j], sigmas[j])
    return float((x - x0).square().mean() / x0.square().mean())


def cheapest_paths(costs: Tensor, steps: Sequence[int]) -> dict[int, Path]:
    """For each step count the cheapest way from the first level to the clean end, by dynamic programming.

    Args:
        costs: (N, N + 1), as from `fine_run`.
        steps: counts K, each from 1 to N.

    Raises:
        TDMError: a K out of range.
    """
    n = len(costs)
    if not steps or not all(1 <= k <= n for k in steps):
        raise TDMError(f"step counts must be from 1 to {n}, the number of levels, got {list(steps)}")
    best = torch.full((n + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    origins: list[list[int]] = []
    paths = {}
    for k in range(1, max(steps) + 1):
        best, origin = (best[:n, None] + costs).min(0)  # to each level in exactly k steps, and from where
        origins.append(origin.tolist())
        if k in steps:
            levels, here = [], n
            for way in reversed(origins):
                here = way[here]
                levels.append(here)
            paths[k] = Path(levels[::-1], float(best[n]))
    return {k: paths[k] for k in steps}


def path_cost(costs: Tensor, levels: Sequence[int]) -> float:
    """The sum of the costs [N, N + 1] of a run through these levels to the clean end."""
    return float(sum(costs[i, j] for i, j in zip(levels, [*levels[1:], len(costs)], strict=True)))
