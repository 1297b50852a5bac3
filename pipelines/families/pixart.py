"""PixArt-alpha (512 and 1024) and PixArt-Sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import (
    ATTENTION,
    FEED_FORWARD,
    Condition,
    Family,
    Size,
    TeacherCall,
    longest_text,
    text_options,
    without_variance,
    zeros,
)


class PixArt(Family):
    """A transformer on 4-channel latents with a learned-variance head, T5 text."""

    name = "pixart"
    teacher_call = TeacherCall(20, 3.5)
    time_embedder = "adaln_single.emb.timestep_embedder"
    lora_targets = (*ATTENTION, *FEED_FORWARD)
    # Caption cleaning needs two optional packages and is skipped without them: off, so that no picture depends on that.
    call_kwargs: ClassVar[Mapping[str, Any]] = {"clean_caption": False}
    binned_sample_sizes = frozenset({32, 64, 128})
    guidance_halves = "negative first"
    home = "..fixes.pixart"

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        length = text_options(pipe, options, "max_sequence_length")["max_sequence_length"]
        length = min(length, pipe.tokenizer.model_max_length)  # what is behind a prompt is masked: padding is only cost
        text, mask, _, _ = pipe.encode_prompt(prompts, False, clean_caption=False, max_sequence_length=length)
        return {"text": text, "mask": mask}

    def text_limit(self, pipe: Any) -> tuple[Any, int]:
        return pipe.tokenizer, min(longest_text(pipe), pipe.tokenizer.model_max_length)

    def facts(self, pipe: Any, text: Condition, size: Size, **options: Any) -> Condition:  # noqa: ARG002
        if not pipe.transformer.use_additional_conditions:  # those are of the 1024 model of PixArt-alpha
            return {}
        conditions = {"resolution": [size.height, size.width], "aspect_ratio": [size.height / size.width]}
        like = text["text"]
        return {key: torch.tensor(value).to(like).expand(len(like), -1) for key, value in conditions.items()}

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        tokens = longest_text(pipe)
        if pipe.tokenizer is not None:
            tokens = min(tokens, pipe.tokenizer.model_max_length)
        text = zeros(pipe, self.denoiser, n, tokens, pipe.transformer.config.caption_channels)
        cond = {"text": text, "mask": torch.zeros(n, tokens, device=text.device, dtype=torch.long)}
        if pipe.transformer.use_additional_conditions:
            cond |= {"resolution": text.new_zeros(n, 2), "aspect_ratio": text.new_zeros(n, 1)}
        return cond

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        output = network(
            x,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            timestep=timesteps,
            added_cond_kwargs={key: cond.get(key) for key in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return without_variance(output, x.shape[1])
