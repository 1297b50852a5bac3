"""Stable Diffusion 1.x and its fine-tunes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import ATTENTION, FEED_FORWARD, Condition, Family, Size, TeacherCall, clip_tokens, text_options, zeros


class SD15(Family):
    """A UNet on 4-channel latents, CLIP text."""

    name = "sd15"
    kohya_in_comfyui = True
    teacher_call = TeacherCall(50, 3.5)
    time_embedder = "time_embedding"
    denoiser = "unet"
    lora_targets = (*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out")

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        arguments = text_options(pipe, options, "clip_skip")
        return {"text": pipe.encode_prompt(prompts, pipe._execution_device, 1, False, **arguments)[0]}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        return pipe.tokenizer, clip_tokens(pipe)

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        return {"text": zeros(pipe, self.denoiser, n, clip_tokens(pipe), pipe.unet.config.cross_attention_dim)}

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        return network(x, timesteps, encoder_hidden_states=cond["text"], return_dict=False)[0]
