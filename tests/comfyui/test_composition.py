"""A student among what artists have already, on a real denoiser: what ComfyUI samples against what diffusers does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from tdm.pipelines.loras.merge import merge
from torch import Tensor

from . import tiny_sd15
from .conftest import Checkpoint
from .graphs import node, sampling
from .server import Graph, Server
from .test_sampling import SCALE, error, noise, scheduler

GRID = [899.0, 674.0, 449.0, 224.0]
PROMPT = torch.linspace(-1, 1, 7 * 768).reshape(1, 7, 768)  # what TestPrompt gives


def workflow(checkpoint: Checkpoint, **options: Any) -> Graph:
    """The student of `checkpoint` on it; node "samples" has the latents."""
    file = checkpoint.student("composed.safetensors")
    return {
        "base": node("CheckpointLoaderSimple", ckpt_name=checkpoint.file),
        "student": node(
            "TDMLoadStudent", model=["base", 0], file=file, released_as="by its header or name", strength=1.0
        ),
        "prompt": node("TestPrompt", width=768),
        **sampling(["student", 0], ["prompt", 0], timesteps=GRID, order=2, **options),
    }


def picture(graph: Graph) -> Graph:
    """Add the nodes "picture" and "encoded" to a workflow: a picture, and its latent as an artist makes it."""
    alone = {"noise": ["other noise", 0], "latent_image": ["latent", 0]}
    return {
        **graph,
        "other noise": node("RandomNoise", noise_seed=3),
        "first sigmas": node("TDMSigmas", **{**graph["sigmas"]["inputs"], "denoise": 1.0}),
        "first guider": node("BasicGuider", model=["first sigmas", 0], conditioning=["prompt", 0]),
        "first": node(
            "SamplerCustomAdvanced",
            **alone,
            guider=["first guider", 0],
            sampler=["sampler", 0],
            sigmas=["first sigmas", 1],
        ),
        "picture": node("VAEDecode", samples=["first", 0], vae=["base", 2]),
        "encoded": node("VAEEncode", pixels=["picture", 0], vae=["base", 2]),
    }


def sampled(
    checkpoint: Checkpoint,
    x: Tensor,
    *,
    first: int = 0,
    style: float = 0.0,
    strength: float = 1.0,
    control: Callable[..., dict[str, Any]] | None = None,
) -> Tensor:
    """What diffusers samples from x with the student and so much of the style; `control` is what a ControlNet adds."""
    unet, reference = checkpoint.unet, scheduler("epsilon", GRID, 2)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    prompt = PROMPT.expand(len(x), -1, -1)
    try:
        for seed, scale in ((1, strength), (2, style)):
            merge(unet, {name: pair.scaled(scale) for name, pair in tiny_sd15.lora(unet, seed).items()})
        reference.set_begin_index(first)
        with torch.no_grad():
            for t in reference.timesteps[first:]:
                extra = control(x, t, prompt) if control else {}
                x = reference.step(unet(x, t, prompt, **extra).sample, t, x).prev_sample
    finally:
        unet.load_state_dict(before)
    return x


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_lora_of_the_artist_goes_before_or_behind_it(server: Server, checkpoint: Checkpoint, place: str) -> None:
    graph = workflow(checkpoint)
    style = {"lora_name": checkpoint.style, "strength_model": 0.8}
    if place == "before":
        graph["style"] = node("LoraLoaderModelOnly", model=["base", 0], **style)
        graph["student"]["inputs"]["model"] = ["style", 0]
    else:
        graph["style"] = node("LoraLoaderModelOnly", model=["student", 0], **style)
        graph["sigmas"]["inputs"]["model"] = ["style", 0]
    (latents,) = server.latents(graph, ["samples", 0])
    assert error(latents * SCALE, sampled(checkpoint, noise(), style=0.8)) <= 1e-5
    (without,) = server.latents(workflow(checkpoint), ["samples", 0])  # the same MODEL in memory, not patched by it
    alone = sampled(checkpoint, noise())
    assert error(without * SCALE, alone) <= 1e-5
    assert error(latents * SCALE, alone) > 0.1


def test_image_to_image(server: Server, checkpoint: Checkpoint) -> None:
    graph = picture(workflow(checkpoint, denoise=0.5, latent=["encoded", 0]))
    latents, encoded = server.latents(graph, ["samples", 0], ["encoded", 0])
    reference = scheduler("epsilon", GRID, 2)
    x = reference.add_noise(encoded * SCALE, noise(), reference.timesteps[2:3])
    assert error(latents * SCALE, sampled(checkpoint, x, first=2)) <= 1e-5


def test_inpainting_leaves_the_rest_as_it_was(server: Server, checkpoint: Checkpoint) -> None:
    graph = picture(workflow(checkpoint, latent=["masked", 0]))
    graph["left"] = node("SolidMask", value=1.0, width=32, height=64)
    graph["nothing"] = node("SolidMask", value=0.0, width=64, height=64)
    graph["mask"] = node("MaskComposite", destination=["nothing", 0], source=["left", 0], x=0, y=0, operation="add")
    graph["masked"] = node("SetLatentNoiseMask", samples=["encoded", 0], mask=["mask", 0])
    latents, encoded = server.latents(graph, ["samples", 0], ["encoded", 0])
    torch.testing.assert_close(latents[..., 4:], encoded[..., 4:])
    assert error(latents[..., :4], encoded[..., :4]) > 0.1


def test_each_picture_of_a_batch_can_be_drawn_alone(server: Server, checkpoint: Checkpoint) -> None:
    graph = workflow(checkpoint)
    graph["latent"]["inputs"]["batch_size"] = 3
    graph["second"] = node("LatentFromBatch", samples=["latent", 0], batch_index=1, length=1)
    alone = {**graph["samples"]["inputs"], "latent_image": ["second", 0]}
    graph["alone"] = node("SamplerCustomAdvanced", **alone)
    all_three, second = server.latents(graph, ["samples", 0], ["alone", 0])
    assert len(all_three) == 3
    assert error(second, all_three[1:2]) <= 1e-5
    assert error(second, all_three[:1]) > 0.1


def test_a_controlnet_steers_the_student(server: Server, checkpoint: Checkpoint) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ControlNetModel.from_unet(checkpoint.unet).eval().requires_grad_(False)
        for parameter in (*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()):
            parameter.normal_(std=0.02)  # a new one has zeros there
        for parameter in net.controlnet_cond_embedding.conv_out.parameters():
            parameter.normal_(std=0.1)
    folder = server.models / "controlnet"
    folder.mkdir(exist_ok=True)
    save_file(tiny_sd15.original_names(net.state_dict()), folder / "small_control.safetensors")
    graph = picture(workflow(checkpoint))
    graph["net"] = node("ControlNetLoader", control_net_name="small_control.safetensors")
    graph["controlled"] = node(
        "ControlNetApplyAdvanced",
        positive=["prompt", 0],
        negative=["prompt", 0],
        control_net=["net", 0],
        image=["white left", 0],
        strength=0.8,
        start_percent=0.0,
        end_percent=1.0,
    )
    graph["left"] = node("SolidMask", value=1.0, width=32, height=64)
    graph["nothing"] = node("SolidMask", value=0.0, width=64, height=64)
    graph["mask"] = node("MaskComposite", destination=["nothing", 0], source=["left", 0], x=0, y=0, operation="add")
    graph["white left"] = node("MaskToImage", mask=["mask", 0])
    graph["guider"]["inputs"]["conditioning"] = ["controlled", 0]
    (latents,) = server.latents(graph, ["samples", 0])

    hint = torch.zeros(2, 3, 64, 64)
    hint[..., :32] = 1

    def control(x: Tensor, t: Tensor, prompt: Tensor) -> dict[str, Any]:
        down, mid = net(x, t, prompt, hint, conditioning_scale=0.8, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    assert error(latents * SCALE, sampled(checkpoint, noise(), control=control)) <= 1e-5
    assert error(latents * SCALE, sampled(checkpoint, noise())) > 0.05


def test_a_base_in_eight_bits_takes_the_student(server: Server, checkpoint: Checkpoint) -> None:
    """Core rounds the patched weights to float8 again: near to what the exact weights sample."""
    folder = server.models / "diffusion_models"
    folder.mkdir(exist_ok=True)
    save_file(tiny_sd15.original_names(checkpoint.unet.state_dict()), folder / "for_fp8.safetensors")
    graph = workflow(checkpoint)
    graph["base"] = node("UNETLoader", unet_name="for_fp8.safetensors", weight_dtype="fp8_e4m3fn")
    plain = {**graph, **sampling(["base", 0], ["prompt", 0], timesteps=GRID, order=2)}
    (latents,), (base,) = server.latents(graph, ["samples", 0]), server.latents(plain, ["samples", 0])
    exact = sampled(checkpoint, noise())
    assert 1e-4 < error(latents * SCALE, exact) < error(base * SCALE, exact) / 3
