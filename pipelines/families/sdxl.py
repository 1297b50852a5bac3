"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Condition, Size, TeacherCall, clip_tokens, text_options, zeros
from .sd15 import SD15


class SDXL(SD15):
    """A UNet conditioned on the text of two CLIP encoders, a pooled prompt and the picture's size."""

    name = "sdxl"
    teacher_call = TeacherCall(50, 8.0)

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        arguments = text_options(pipe, options, "clip_skip")
        text, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, **arguments)
        return {"text": text, "pooled": pooled}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        return pipe.tokenizer, clip_tokens(pipe)

    def encode_null(self, pipe: Any, negative_prompt: str = "", **options: Any) -> Condition:
        """Zeros for the empty prompt where the model's own configuration says so, else the prompt."""
        null = super().encode_null(pipe, negative_prompt, **options)
        zeros = pipe.config.force_zeros_for_empty_prompt and not negative_prompt
        return {key: torch.zeros_like(value) for key, value in null.items()} if zeros else null

    def facts(self, pipe: Any, text: Condition, size: Size, **options: Any) -> Condition:  # noqa: ARG002
        pooled, sides = text["pooled"], (size.height, size.width)
        # Original size, crop and target size, as the pipeline has them when nothing is said.
        sizes = pipe._get_add_time_ids(sides, (0, 0), sides, pooled.dtype, pooled.shape[-1]).to(pooled.device)
        return {"sizes": sizes.expand(len(pooled), -1)}

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:
        config = pipe.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"pooled": zeros(pipe, self.denoiser, n, pooled), "sizes": zeros(pipe, self.denoiser, n, 6)}
        return super().blank(pipe, n, size) | added

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["sizes"]}
        text = cond["text"]
        return network(x, timesteps, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    def pixels(self, pipe: Any, latents: Tensor, size: Size) -> Tensor:
        """See `Family.pixels`. A VAE that would overflow in half precision runs in float32 for the call."""
        overflows = pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast
        if overflows:
            pipe.vae.to(dtype=torch.float32)
        try:
            return super().pixels(pipe, latents, size)
        finally:
            if overflows:
                pipe.vae.to(dtype=torch.float16)
