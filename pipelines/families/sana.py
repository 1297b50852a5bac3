"""Sana."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import ATTENTION, Condition, Family, text_options, without_variance


class Sana(Family):
    """A linear transformer on the deeply compressed latents of DC-AE, Gemma text."""

    name = "sana"
    lora_targets = ATTENTION
    binned_sample_sizes = frozenset({16, 32, 64, 128})
    home = "..mended.batches"
    pixel_multiple = 32
    float32_latents = True

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        given = text_options(pipe, options, "max_sequence_length", "complex_human_instruction")
        text, mask, _, _ = pipe.encode_prompt(prompts, False, clean_caption=False, **given)
        return {"text": text, "mask": mask}

    def encode_null(self, pipe: Any, **options: Any) -> Condition:
        """The empty prompt, which the pipeline encodes without its instruction to the language model."""
        return super().encode_null(pipe, **{**options, "complex_human_instruction": None})

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
