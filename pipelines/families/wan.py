"""Wan 2.1 text-to-video."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import TDMError
from .base import (
    ATTENTION,
    Condition,
    Family,
    Size,
    TeacherCall,
    for_vae,
    longest_text,
    num_frames,
    text_options,
    zeros,
)


class Wan(Family):
    """A video transformer on latents [C, F, h, w], UMT5 text."""

    name = "wan"
    teacher_call = TeacherCall(50, 5.0)
    # In English, as the documentation of diffusers' WanPipeline has it.
    published_negative_prompt = (
        "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, "
        "overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly "
        "drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy "
        "background, three legs, many people in the background, walking backwards"
    )
    time_embedder = "condition_embedder.time_embedder"
    lora_targets = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")
    guidance_halves = "two calls"
    video = True
    frames_per_second = 16
    pixel_multiple = 16
    float32_latents = True

    def default_size(self, pipe: Any) -> Size:
        return Size(*text_options(pipe, {}, "height", "width", "num_frames").values())

    def patch_pixels(self, pipe: Any) -> int:
        return pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]

    def latent_shape(self, pipe: Any, size: Size) -> tuple[int, ...]:
        self.check_size(pipe, size)
        factor, step, frames = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal, num_frames(size)
        if (frames - 1) % step:  # the pipeline rounds, and would draw another number than training sees
            near = frames - (frames - 1) % step
            raise TDMError(
                f"{frames} frames do not fit wan: take 1 more than a multiple of {step}, {near} or {near + step}"
            )
        return (self.latent_channels(pipe), (frames - 1) // step + 1, size.height // factor, size.width // factor)

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        arguments = text_options(pipe, options, "max_sequence_length")
        return {"text": pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **arguments)[0]}

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        return {"text": zeros(pipe, self.denoiser, n, longest_text(pipe), pipe.transformer.config.text_dim)}

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        text = cond["text"]
        return network(hidden_states=x, timestep=timesteps, encoder_hidden_states=text, return_dict=False)[0]

    def pixels(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:  # noqa: ARG002
        frames = pipe.vae.decode(self.unscale(pipe.vae, for_vae(pipe.vae, latents)), return_dict=False)[0]
        return frames.permute(0, 2, 1, 3, 4)

    def first_frame(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:  # noqa: ARG002
        return latents[:, :, :1]
