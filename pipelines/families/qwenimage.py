"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import JOINT_ATTENTION, Condition, Size, TeacherCall, longest_text, text_options, zeros
from .patched import VideoVaeFamily, from_patches, patches


class QwenImage(VideoVaeFamily):
    """A joint transformer on 2 x 2 patches of a video VAE's latents, Qwen2.5-VL text."""

    name = "qwenimage"
    teacher_call = TeacherCall(50, 4.0)
    time_embedder = "time_text_embed.timestep_embedder"
    lora_targets = (*JOINT_ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    guidance_argument = "true_cfg_scale"
    published_negative_prompt = " "  # in the model card's example
    own_guidance_norm = "token_norm"
    home = "..fixes.batches"

    def negative_prompt(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The stock pipeline guides only with a negative prompt. The empty one is what training leads away from."""
        named = any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
        if named or (call.get(self.guidance_argument) or 1.0) <= 1.0:
            return {}
        prompts = call["prompt_embeds"] if call.get("prompt") is None else call["prompt"]
        return {"negative_prompt": [""] * (1 if isinstance(prompts, str) else len(prompts))}

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        arguments = text_options(pipe, options, "max_sequence_length")
        text, mask = pipe.encode_prompt(prompts, **arguments)
        if mask is None:  # nothing to mask in this batch; the next may have something
            mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        return {"text": text, "mask": mask}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        return pipe.tokenizer, pipe.prompt_template_encode_start_idx + longest_text(pipe)

    def text_as_read(self, pipe: Any, prompt: str) -> str:
        return pipe.prompt_template_encode.format(prompt)

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        text = zeros(pipe, self.denoiser, n, longest_text(pipe), pipe.transformer.config.joint_attention_dim)
        return {"text": text, "mask": text.new_zeros(text.shape[:2], dtype=torch.long)}

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        height, width = x.shape[-2:]
        output = network(
            hidden_states=patches(x),
            timestep=timesteps / 1000,
            encoder_hidden_states_mask=cond["mask"],
            encoder_hidden_states=cond["text"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return from_patches(output, height, width)
