"""A real denoiser, loaded from its file by each side: ComfyUI's loader and network, and diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from . import tiny_sd15
from .graphs import node, sampling
from .server import Graph, Server
from .test_sampling import SCALE, error, noise, scheduler

FILE = "tiny_sd15.safetensors"


@pytest.fixture(scope="module")
def unet(server: Server) -> UNet2DConditionModel:
    """The denoiser, whose file the server has among its diffusion models."""
    unet = tiny_sd15.build()
    folder = server.models / "diffusion_models"
    folder.mkdir(exist_ok=True)
    save_file(tiny_sd15.original_names(unet.state_dict()), folder / FILE)
    return unet


def workflow(grid: list[float], order: int) -> Graph:
    return {
        "model": node("UNETLoader", unet_name=FILE, weight_dtype="default"),
        "prompt": node("TestPrompt", width=768),
        **sampling(["model", 0], ["prompt", 0], timesteps=grid, order=order),
    }


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("grid", [[999, 749, 499, 249], [899, 674, 449, 224]])
def test_a_real_denoiser_gives_the_same_latents(
    server: Server, unet: UNet2DConditionModel, grid: list[float], order: int
) -> None:
    (latents,) = server.latents(workflow(grid, order), ["samples", 0])
    prompt = torch.linspace(-1, 1, 7 * 768).reshape(1, 7, 768).expand(2, -1, -1)
    reference, x = scheduler("epsilon", grid, order), noise()
    with torch.no_grad():
        for t in reference.timesteps:
            x = reference.step(unet(x, t, prompt).sample, t, x).prev_sample
    assert error(latents * SCALE, x) <= 1e-5
