"""FLUX.1 (dev, schnell)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Condition, Size, TeacherCall, longest_text, text_options, zeros
from .patched import PatchedFamily, from_patches, patches


class Flux(PatchedFamily):
    """A joint transformer on 2 x 2 patches of 16-channel latents; T5 text and a pooled CLIP prompt.

    The dev model is guidance-distilled: its network takes a guidance scale, which a student's recipe then names.
    """

    name = "flux"
    kohya_in_comfyui = True
    # the scale that the dev model's network takes as an input; the preset adds none
    teacher_call = TeacherCall(28, 3.5)
    time_embedder = "time_text_embed.timestep_embedder"
    lora_targets = (
        r".*(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
        r"|single_transformer_blocks\.\d+\.proj_(mlp|out))"
    )

    def embeds_guidance(self, pipe: Any) -> bool:
        return pipe.transformer.config.guidance_embeds

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        arguments = text_options(pipe, options, "max_sequence_length")
        text, pooled, _ = pipe.encode_prompt(prompts, None, **arguments)
        return {"text": text, "pooled": pooled}

    def facts(self, pipe: Any, text: Condition, size: Size, **options: Any) -> Condition:  # noqa: ARG002
        if not self.embeds_guidance(pipe):
            return {}
        scale = text_options(pipe, options, "guidance_scale")["guidance_scale"]
        pooled = text["pooled"]
        return {"guidance": torch.full((len(pooled),), scale, device=pooled.device, dtype=torch.float32)}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        return pipe.tokenizer_2, longest_text(pipe)

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        config = pipe.transformer.config
        text = zeros(pipe, self.denoiser, n, longest_text(pipe), config.joint_attention_dim)
        cond = {"text": text, "pooled": text.new_zeros(n, config.pooled_projection_dim)}
        return cond | ({"guidance": text.new_zeros(n, dtype=torch.float32)} if self.embeds_guidance(pipe) else {})

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        height, width = x.shape[-2:]
        rows, columns = torch.arange(height // 2), torch.arange(width // 2)
        places = torch.cartesian_prod(rows, columns).to(x.device, x.dtype)
        output = network(
            hidden_states=patches(x),
            timestep=timesteps / 1000,
            guidance=cond.get("guidance"),
            pooled_projections=cond["pooled"],
            encoder_hidden_states=cond["text"],
            txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=torch.nn.functional.pad(places, (1, 0)),
            return_dict=False,
        )[0]
        return from_patches(output, height, width)
