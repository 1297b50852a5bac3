"""Stable Diffusion 3 and 3.5 (medium, large)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import TDMError
from .base import FEED_FORWARD, JOINT_ATTENTION, Condition, Family, Size, TeacherCall, longest_text, text_options, zeros


class SD3(Family):
    """A joint transformer on 16-channel latents; text of two CLIP encoders and T5, and a pooled prompt."""

    name = "sd3"
    kohya_in_comfyui = True
    teacher_call = TeacherCall(28, 4.5)
    guidance_halves = "negative first"
    time_embedder = "time_text_embed.timestep_embedder"
    lora_targets = (*JOINT_ATTENTION, *FEED_FORWARD, "ff_context.net.0.proj", "ff_context.net.2")

    def default_size(self, pipe: Any) -> Size:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return Size(side, side)

    def check_size(self, pipe: Any, size: Size) -> None:
        """Also raise TDMError if the base's table of positions is too small."""
        super().check_size(pipe, size)
        most = pipe.transformer.config.pos_embed_max_size * self.patch_pixels(pipe)
        if max(size.height, size.width) > most:
            raise TDMError(
                f"{size.height}x{size.width} is more than this base has positions for: at most {most} pixels a side"
            )

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        arguments = text_options(pipe, options, "clip_skip", "max_sequence_length")
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **arguments)
        return {"text": text, "pooled": pooled}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        if pipe.text_encoder_3 is None:  # CLIP alone
            return pipe.tokenizer, pipe.tokenizer_max_length
        return pipe.tokenizer_3, longest_text(pipe)

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        config, tokens = pipe.transformer.config, pipe.tokenizer_max_length + longest_text(pipe)
        text = zeros(pipe, self.denoiser, n, tokens, config.joint_attention_dim)
        return {"text": text, "pooled": zeros(pipe, self.denoiser, n, config.pooled_projection_dim)}

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        return network(
            hidden_states=x,
            timestep=timesteps,
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]
