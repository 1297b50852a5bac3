"""The teacher's guidance scale at a noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from ...pipelines.schedule import uniform_grid
from ..config import ObjectiveConfig
from ..trajectory import Trajectory


def guidance_at(
    config: ObjectiveConfig, trajectory: Trajectory, tau: Tensor, drawn: Tensor | None = None
) -> float | Tensor:
    """The teacher's guidance scale at timesteps ``tau`` ``[B]``: one number for all, or one each ``[B]`` float64 (CPU).

    ``stage_guidance`` belongs to noise levels: a tau takes the scale of the stage of the student's grid that it lies
    in. For a unified student the grid is that of ``trajectory.steps``, whichever step count is trained.

    Args:
        drawn: the scale of each sample ``[B]`` if the batch has drawn one (``guidance_range``).
    """
    if drawn is not None:
        return drawn
    by_stage = config.stage_guidance
    if by_stage is None:
        return config.guidance_scale
    schedule, t = trajectory.schedule, trajectory.config
    grid = t.timesteps or uniform_grid(t.steps, schedule, t.shift)
    ends = torch.tensor(grid[1:], dtype=torch.float64)
    return torch.tensor(by_stage, dtype=torch.float64)[(ends >= tau[:, None]).sum(1)]
