"""Sana."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import ATTENTION, Condition, Family, Size, TeacherCall, longest_text, text_options, without_variance, zeros


class Sana(Family):
    """A linear transformer on the deeply compressed latents of DC-AE, Gemma text."""

    name = "sana"
    teacher_call = TeacherCall(20, 4.5)
    guidance_halves = "negative first"
    time_embedder = "time_embed.emb.timestep_embedder"
    lora_targets = ATTENTION
    binned_sample_sizes = frozenset({16, 32, 64, 128})
    home = "..fixes.batches"
    pixel_multiple = 32
    float32_latents = True

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        arguments = text_options(pipe, options, "max_sequence_length", "complex_human_instruction")
        text, mask, _, _ = pipe.encode_prompt(prompts, False, clean_caption=False, **arguments)
        return {"text": text, "mask": mask}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        instruction = pipe.tokenizer.encode(self.text_as_read(pipe, ""))
        return pipe.tokenizer, len(instruction) + longest_text(pipe) - 2  # as the pipeline counts

    def text_as_read(self, pipe: Any, prompt: str) -> str:
        (instruction,) = text_options(pipe, {}, "complex_human_instruction").values()
        return "\n".join(instruction) + prompt

    def encode_null(self, pipe: Any, negative_prompt: str = "", **options: Any) -> Condition:
        """The empty or negative prompt, which the pipeline encodes without its instruction to the language model."""
        return super().encode_null(pipe, negative_prompt, **{**options, "complex_human_instruction": None})

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        text = zeros(pipe, self.denoiser, n, longest_text(pipe), pipe.transformer.config.caption_channels)
        return {"text": text, "mask": text.new_zeros(text.shape[:2], dtype=torch.long)}

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        output = network(
            x,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            timestep=timesteps * network.config.timestep_scale,  # type: ignore[union-attr, operator]
            return_dict=False,
        )[0]
        return without_variance(output, x.shape[1])

    def _vae_latents(self, vae: Any, pictures: Tensor) -> Tensor:
        return vae.encode(pictures).latent
