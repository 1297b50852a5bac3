"""Krea 2 (Raw, and Turbo, which is itself a TDM student)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import Condition, Size, TeacherCall, longest_text, text_options, zeros
from .patched import VideoVaeFamily, from_patches, patches


class Krea2(VideoVaeFamily):
    """A single-stream transformer on 2 x 2 patches of a video VAE's latents; Qwen3-VL text of twelve layers at once."""

    name = "krea2"
    # Raw's own: the pipeline counts guidance from 0, where it is 4.5
    teacher_call = TeacherCall(28, 5.5)
    time_embedder = "time_embed"
    # The picture's blocks, not those that fuse the layers of the text encoder.
    lora_targets = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))"
    no_guidance = 0.0
    guidance_halves = "two calls"

    def teacher_call_of(self, config: Mapping[str, Any]) -> TeacherCall:
        return TeacherCall(8, 1.0) if config.get("is_distilled") else self.teacher_call

    def default_size(self, pipe: Any) -> Size:
        return Size(*text_options(pipe, {}, "height", "width").values())

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        """The pipeline pads in the middle of its template. The network has no place for text, so padding goes last."""
        text, mask = pipe.encode_prompt(prompts, **text_options(pipe, options, "max_sequence_length"))
        order = mask.long().argsort(dim=1, descending=True, stable=True)
        length = int(mask.sum(1).max())
        text = text.gather(1, order[:, :, None, None].expand_as(text))[:, :length]
        mask = mask.gather(1, order)[:, :length]
        return {"text": text * mask[:, :, None, None], "mask": mask}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        start, suffix = pipe.prompt_template_encode_start_idx, pipe.prompt_template_encode_num_suffix_tokens
        return pipe.tokenizer, longest_text(pipe) + start - suffix

    def text_as_read(self, pipe: Any, prompt: str) -> str:
        return pipe.prompt_template_encode_prefix + prompt

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        config = pipe.transformer.config
        text = zeros(pipe, self.denoiser, n, longest_text(pipe), config.num_text_layers, config.text_hidden_dim)
        return {"text": text, "mask": text.new_zeros(text.shape[:2], dtype=torch.bool)}

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        height, width = x.shape[-2:]
        rows, columns = torch.arange(height // 2), torch.arange(width // 2)
        places = nn.functional.pad(torch.cartesian_prod(rows, columns), (1, 0))
        output = network(
            hidden_states=patches(x),
            encoder_hidden_states=cond["text"],
            timestep=timesteps / 1000,
            position_ids=nn.functional.pad(places, (0, 0, cond["text"].shape[1], 0)).to(x.device, torch.float32),
            encoder_attention_mask=cond["mask"].bool(),
            return_dict=False,
        )[0]
        return from_patches(output, height, width)
