"""What Flux, Qwen-Image and Krea 2 share: the pipeline keeps latents as a row of 2 x 2 patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Family, Size, for_vae


class PatchedFamily(Family):
    """A family whose pipeline packs latents [B, C, h, w] into patches [B, h w / 4, 4 C]."""

    def default_size(self, pipe: Any) -> Size:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def patch_pixels(self, pipe: Any) -> int:
        return 2 * pipe.vae_scale_factor

    def latent_channels(self, pipe: Any) -> int:
        return pipe.transformer.config.in_channels // 4

    def token_norms(self, output: Tensor) -> Tensor:
        squares = output.square().sum(1, keepdim=True)
        patch = squares.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).sum((-1, -3))  # [B, 1, h / 2, w / 2]
        return patch.sqrt().repeat_interleave(2, -1).repeat_interleave(2, -2)

    def pack(self, latents: Tensor) -> Tensor:
        return patches(latents)

    def unpack(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:
        return from_patches(latents, size.height // pipe.vae_scale_factor, size.width // pipe.vae_scale_factor)


class VideoVaeFamily(PatchedFamily):
    """What Qwen-Image and Krea 2 share: also a VAE of videos, to which a picture is one frame."""

    def pixels(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:  # noqa: ARG002
        frames = self.unscale(pipe.vae, for_vae(pipe.vae, latents).unsqueeze(2))
        return pipe.vae.decode(frames, return_dict=False)[0][:, :, 0]

    def _vae_latents(self, vae: Any, pictures: Tensor) -> Tensor:
        return vae.encode(pictures.unsqueeze(2)).latent_dist.mode().squeeze(2)


def patches(latents: Tensor) -> Tensor:
    """[B, C, h, w] to [B, h w / 4, 4 C]."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def from_patches(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `patches`: [B, h w / 4, 4 C] to [B, C, h, w], for latents of this height and width."""
    b, _, c = packed.shape
    latents = packed.view(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(b, c // 4, height, width)
