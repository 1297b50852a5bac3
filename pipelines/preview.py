"""A cheap look at latents in the middle of a run: shrunk, then decoded by the pipeline's own VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from .tdm_pipeline import TDMPipeline

SIDE = 32  # the longest side of what is decoded, in latent pixels


@torch.no_grad()
def preview(pipe: TDMPipeline, latents: Tensor, height: int, width: int) -> list[Image.Image]:
    """Latents as small pictures, one per sample; of a video its first frame.

    Args:
        pipe: decodes them. Pictures of at most 32 latent pixels a side look as the pipeline itself would show them.
        latents: in the layout and scale of the pipeline's loop, (B, ...).
        height, width: of the call, in pixels.
    """
    z = unpacked(pipe, latents, height, width).float()
    longest = max(z.shape[-2:])
    if longest > SIDE:
        small = [max(1, round(side * SIDE / longest)) for side in z.shape[-2:]]
        z = interpolate(z, size=[*z.shape[2:-2], *small], mode="area")
    return VaeImageProcessor().postprocess(decode_latents(pipe, z), output_type="pil")


def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Latents of a pipeline's loop as (B, C, h, w), or (B, C, 1, h, w) where the VAE is one of videos (first frame)."""
    if hasattr(pipe, "_unpack_latents"):  # Flux and Qwen-Image keep 2 x 2 patches in a row
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    if pipe._family.name == "cogvideox":  # frames before channels
        latents = latents.transpose(1, 2)
    return latents[:, :, :1] if latents.ndim == 5 else latents


def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of unpacked latents, in the scale of the pipeline's loop.

    The formula covers every family: a VAE has means and deviations per channel, or a shift, or neither.
    """
    vae = pipe.vae
    z = latents / (vae.config.get("scaling_factor") or 1.0)
    if vae.config.get("latents_mean") is not None:
        mean, std = (z.new_tensor(vae.config[f"latents_{name}"]) for name in ("mean", "std"))
        per_channel = (-1, *[1] * (z.ndim - 2))
        z = z * std.view(per_channel) + mean.view(per_channel)
    else:
        z = z + (vae.config.get("shift_factor") or 0.0)
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if overflows:  # as SDXL's pipeline does; the way back is exact
        vae.to(dtype=torch.float32)
    try:
        images = vae.decode(z.to(get_module_execution_device(vae), vae.dtype), return_dict=False)[0]
    finally:
        if overflows:
            vae.to(dtype=torch.float16)
    return images[:, :, 0] if images.ndim == 5 else images
