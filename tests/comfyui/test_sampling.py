"""Our nodes in ComfyUI's real sampling path against `TDMScheduler` in diffusers: the same network and the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tdm import TDMScheduler
from torch import Tensor

from .graphs import SEED, node, sampling
from .networks_pack.network import network
from .server import Graph, Server

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCALE = 0.18215  # of SD1.5's latents: ComfyUI saves latents as its VAE takes them
GRIDS = ([999, 749, 499, 249], [899, 674, 449, 224], [999, 856, 665, 399])
SHAPE = (2, 4, 8, 8)


def shifted(shift: float) -> list[float]:
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25)]


CASES = [
    *((kind, grid, 1.0) for kind in ("epsilon", "v_prediction", "flow_prediction") for grid in GRIDS),
    *(("flow_prediction", shifted(shift), shift) for shift in (1.0, 3.0, 6.0)),
]


def scheduler(kind: str, grid: list[float], order: int = 1) -> TDMScheduler:
    own = {} if kind == "flow_prediction" else SD
    made = TDMScheduler(prediction_type=kind, trained_timesteps=grid, solver_order=order, **own)
    made.set_timesteps(len(grid))
    return made


def noise(shape: tuple[int, ...] = SHAPE, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def diffused(scheduler: TDMScheduler, x: Tensor, context: float = 0.0, first: int = 0) -> tuple[Tensor, list[Tensor]]:
    """What diffusers samples from x, and every clean sample that it predicts on the way."""
    clean = []
    scheduler.set_begin_index(first)
    for t in scheduler.timesteps[first:]:
        x, x0 = scheduler.step(network(x, t, context), t, x, return_dict=False)
        clean.append(x0)
    return x, clean


def model(kind: str, shift: float = 1.0, context: float = 0.0) -> Graph:
    return {"model": node("TestModel", kind=kind, shift=shift, context=context)}


def graph(kind: str, grid: list[float], shift: float = 1.0, **options: Any) -> Graph:
    return {**model(kind, shift), **sampling(["model", 0], ["model", 1], timesteps=grid, **options)}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("kind", "grid", "shift"), CASES)
def test_the_nodes_sample_what_diffusers_samples(
    server: Server, kind: str, grid: list[float], shift: float, order: int
) -> None:
    expected, _ = diffused(scheduler(kind, grid, order), noise())
    (found,) = server.latents(graph(kind, grid, shift, order=order), ["samples", 0])
    assert error(found * SCALE, expected) <= 1e-5
