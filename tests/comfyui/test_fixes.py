"""What ComfyUI gets wrong, and the nodes that fix it: on the real server, against diffusers."""

from __future__ import annotations

import diffusers
import pytest
import torch
from tdm import TDMScheduler

from .graphs import node, student_graph
from .networks_pack.network import network
from .server import PromptError, Server
from .test_sampling import diffused, error, noise

COGVIDEOX_2B = "Luo-Yihong/TDM_CogVideoX-2B_LoRA"
COGVIDEOX_SCALE = 1.15258426  # of the 2B model's latents
VIDEO = (1, 16, 3, 8, 8)


def cogvideox_graph(snr_shift_scale: float = 3.0, **options: object) -> dict:
    graph = student_graph("cogvideox", **options)  # type: ignore[arg-type]
    graph["fixed"] = node("TDMCogVideoXSampling", model=["model", 0], snr_shift_scale=snr_shift_scale)
    graph["sigmas"]["inputs"]["model"] = ["fixed", 0]
    graph["latent"] = node("TestVideoLatent")
    return graph


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
def test_cogvideox_students_are_sampled_as_in_diffusers(server: Server, snr_shift_scale: float, order: int) -> None:
    """The schedule is that of the stock CogVideoX scheduler. It ends in pure noise."""
    stock = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=snr_shift_scale
    )
    for grid in ([999, 856, 665, 399], [899, 674, 449, 224]):
        reference = TDMScheduler.from_config(stock.config, trained_timesteps=grid, solver_order=order)
        reference.set_timesteps(4)
        expected, _ = diffused(reference, noise(VIDEO))
        (actual,) = server.latents(cogvideox_graph(snr_shift_scale, timesteps=grid, order=order), ["samples", 0])
        assert error(actual * COGVIDEOX_SCALE, expected) <= 1e-5


def test_the_released_cogvideox_student_is_one_choice(server: Server) -> None:
    typed = cogvideox_graph(timesteps=[999, 856, 665, 399])
    named = cogvideox_graph(student=COGVIDEOX_2B, order=["sigmas", 2])
    (a,), (b,) = server.latents(typed, ["samples", 0]), server.latents(named, ["samples", 0])
    assert torch.equal(a, b)


def test_stock_samplers_are_right_on_the_fixed_model(server: Server) -> None:
    """On the fixed CogVideoX model, `euler` with 5 trailing steps equals DDIM in diffusers."""
    grid = [999, 799, 599, 399, 199]
    graph = cogvideox_graph(timesteps=grid)
    graph["sampler"] = node("KSamplerSelect", sampler_name="euler")
    (latents,) = server.latents(graph, ["samples", 0])
    stock = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    stock.set_timesteps(5)
    assert stock.timesteps.tolist() == grid
    x = noise(VIDEO)
    for t in stock.timesteps:
        x = stock.step(network(x, t), t, x).prev_sample
    assert error(latents * COGVIDEOX_SCALE, x) <= 2e-4  # from s = 20000 in float32


def test_pixart_alpha_gets_the_latents_of_its_own_vae(server: Server) -> None:
    graph = student_graph("pixart", timesteps=[999, 749, 499, 249])
    graph["fixed"] = node("TDMPixArtAlphaLatents", model=["model", 0])
    fixed = {**graph, "sigmas": node("TDMSigmas", **{**graph["sigmas"]["inputs"], "model": ["fixed", 0]})}
    (actual,), (stock,) = server.latents(fixed, ["samples", 0]), server.latents(graph, ["samples", 0])
    reference = TDMScheduler(trained_timesteps=[999, 749, 499, 249])  # PixArt's betas are the linear ones
    reference.set_timesteps(4)
    expected, _ = diffused(reference, noise((2, 4, 8, 8)))
    assert error(actual * 0.18215, expected) <= 1e-5
    assert error(stock * 0.13025, expected) <= 1e-5  # what it is without the fix: another size for the VAE


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        (node("TDMCogVideoXSampling", model=["model", 0], snr_shift_scale=3.0), "is for CogVideoX"),
        (node("TDMPixArtAlphaLatents", model=["model", 0]), "is for PixArt"),
    ],
    ids=["cogvideox", "pixart"],
)
def test_a_fix_refuses_other_models(server: Server, fix: dict, message: str) -> None:
    graph = student_graph("epsilon", timesteps=[999])
    graph["sigmas"]["inputs"]["model"] = ["fixed", 0]
    with pytest.raises(PromptError, match=f"this is a BaseModel model; .* {message}"):
        server.latents({**graph, "fixed": fix}, ["samples", 0])
