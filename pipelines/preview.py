"""A cheap look at latents in the middle of a run: shrunk, then decoded by the pipeline's own VAE."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .families import Size

SIDE = 32  # the longest side of what is decoded, in latent pixels


@torch.no_grad()
def preview(pipe: Any, latents: Tensor, size: Size) -> list[Image.Image]:
    """Latents as small pictures, one per sample; of a video its first frame.

    Args:
        pipe: the `TDMPipeline` that decodes them. Pictures of at most 32 latent pixels a side look as the pipeline
            itself would show them.
        latents: in the layout and scale of the pipeline's loop, (B, ...).
        size: of the call.
    """
    family = pipe.family
    z = family.first_frame(pipe, family.unpack(pipe, latents, size), size).float()
    longest = max(z.shape[-2:])
    if longest > SIDE:
        small = [max(1, round(side * SIDE / longest)) for side in z.shape[-2:]]
        z = interpolate(z.flatten(0, -4), size=small, mode="area").unflatten(0, z.shape[:-3])
    pixels = family.decode(pipe, z, size._replace(num_frames=1) if family.video else size)
    pictures = pixels[:, 0] if family.video else pixels
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
