"""The formula, called by ComfyUI in the server and by diffusers' scheduler in the test."""

from __future__ import annotations

import torch
from torch import Tensor


def network(x: Tensor, timestep: float | Tensor, context: float | Tensor = 0.0) -> Tensor:
    """A network's output: bounded, and it depends on the sample, its neighbours, the timestep and the prompt.

    Args:
        x: (B, C, ..., H, W), of about unit variance.
        timestep: a number, or broadcasts against x.
        context: stands for the prompt.
    """
    t = torch.as_tensor(timestep, dtype=torch.float32) / 1000
    return torch.tanh((0.7 + 0.5 * t) * x - 0.4 * x.roll(1, -1) + 0.2 * t + context)
