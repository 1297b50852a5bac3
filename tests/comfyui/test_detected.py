"""The fixes on models that ComfyUI has detected from a file itself, against diffusers with the same weights."""

from __future__ import annotations

import diffusers
import torch
from diffusers import CogVideoXTransformer3DModel, PixArtTransformer2DModel
from safetensors.torch import save_file
from tdm import TDMScheduler
from tdm.pipelines.families import family_of_name
from torch import Tensor, nn

from .graphs import node, sampling
from .server import Graph, Server
from .test_fixes import COGVIDEOX_2B, COGVIDEOX_SCALE
from .test_sampling import error, noise

# diffusers' names and ComfyUI's
_COGVIDEOX = {
    "transformer_blocks": "blocks",
    "time_embedding.linear_": "time_embedding_linear_",
    "attn1.to_out.0": "attn_out",
    "attn1.to_": "",
    "attn1.norm_": "norm_",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}


def detected(server: Server, name: str, weights: dict[str, Tensor], width: int) -> Graph:
    """The loader of these weights and a prompt."""
    folder = server.models / "diffusion_models"
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / f"{name}.safetensors")
    loader = node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype="default")
    return {"loader": loader, "prompt": node("TestPrompt", width=width)}


def diffused(network: nn.Module, family: str, reference: TDMScheduler, x: Tensor, width: int) -> Tensor:
    """What `TDMScheduler` samples, with the prompt of TestPrompt."""
    prompt = {"text": torch.linspace(-1, 1, 7 * width).reshape(1, 7, width)}
    prompt["mask"] = torch.ones(1, 7)
    with torch.no_grad():
        for t in reference.timesteps:
            output = family_of_name(family).denoise(network, x, t[None], prompt)
            x = reference.step(output, t, x).prev_sample
    return x


def test_cogvideox_2b(server: Server) -> None:
    """The file holds the position table. Without one ComfyUI detects a 5B model, which has no such table."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CogVideoXTransformer3DModel(
            num_attention_heads=3, num_layers=2, text_embed_dim=32, time_embed_dim=32, max_text_seq_length=7
        ).eval()
    table = network.patch_embed.pos_embedding  # ComfyUI expects that of 226 tokens before the video's
    weights = {"patch_embed.pos_embedding": torch.cat([table.new_zeros(1, 226 - 7, table.shape[2]), table], dim=1)}
    for name, tensor in network.state_dict().items():
        for ours, theirs in _COGVIDEOX.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor.contiguous()
    graph = detected(server, "small_cogvideox", weights, 32)
    graph["fixed"] = node("TDMCogVideoXSampling", model=["loader", 0], snr_shift_scale=3.0)
    graph |= sampling(["fixed", 0], ["prompt", 0], student=COGVIDEOX_2B, order=["sigmas", 2])
    graph["latent"] = node("EmptyHunyuanLatentVideo", width=720, height=480, length=5, batch_size=1)
    (actual,) = server.latents(graph, ["samples", 0])

    stock = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0
    )
    reference = TDMScheduler.from_config(stock.config, trained_timesteps=[999, 856, 665, 399])
    reference.set_timesteps(4)
    x = noise((1, 16, 2, 60, 90)).transpose(1, 2)
    expected = diffused(network, "cogvideox", reference, x, 32).transpose(1, 2)
    assert error(actual * COGVIDEOX_SCALE, expected) <= 1e-5


def test_pixart_alpha_512(server: Server) -> None:
    """The network is one block of the released width, 150 MB, because ComfyUI assumes that width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PixArtTransformer2DModel(
            num_layers=1, sample_size=64, caption_channels=4096, use_additional_conditions=False
        ).eval()
    graph = detected(server, "small_pixart", network.state_dict(), 4096)
    graph["fixed"] = node("TDMPixArtAlphaLatents", model=["loader", 0])
    graph |= sampling(["fixed", 0], ["prompt", 0], timesteps=[999, 749, 499, 249], order=2)
    graph["latent"] = node("EmptyLatentImage", width=512, height=512, batch_size=1)
    (actual,) = server.latents(graph, ["samples", 0])

    reference = TDMScheduler(trained_timesteps=[999, 749, 499, 249], solver_order=2)
    reference.set_timesteps(4)
    expected = diffused(network, "pixart", reference, noise((1, 4, 64, 64)), 4096)
    assert error(actual * 0.18215, expected) <= 1e-5
