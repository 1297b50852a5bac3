"""Stock pipelines in which diffusers 0.42 silently gives wrong batches, with that one fault fixed in each."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers import CogVideoXPipeline, QwenImagePipeline, SanaPipeline, ZImagePipeline
from torch import Tensor

_cogvideox_call: Any = CogVideoXPipeline.__call__


class _MasksInOrder:
    """Several images per prompt. The stock pipeline orders embeddings p0 p0 p1 p1, but their masks m0 m1 m0 m1.

    See https://github.com/huggingface/diffusers/pull/14147.
    """

    def encode_prompt(self, *args: Any, num_images_per_prompt: int = 1, **kwargs: Any) -> tuple[Tensor | None, ...]:
        once = super().encode_prompt(*args, num_images_per_prompt=1, **kwargs)  # type: ignore[misc]
        return tuple(None if x is None else x.repeat_interleave(num_images_per_prompt, dim=0) for x in once)


class TDMSanaPipeline(_MasksInOrder, SanaPipeline):
    """Sana; see `_MasksInOrder`."""


class TDMQwenImagePipeline(_MasksInOrder, QwenImagePipeline):
    """Qwen-Image; see `_MasksInOrder`."""


class TDMZImagePipeline(ZImagePipeline):
    """Z-Image. The stock pipeline writes its chat template into the caller's list of prompts."""

    def _encode_prompt(self, prompt: str | list[str], *args: Any, **kwargs: Any) -> list[Tensor]:
        prompts = list(prompt) if isinstance(prompt, list) else prompt
        return super()._encode_prompt(prompts, *args, **kwargs)  # type: ignore[misc]


class TDMCogVideoXPipeline(CogVideoXPipeline):
    """CogVideoX. The stock pipeline ignores `num_videos_per_prompt`."""

    @functools.wraps(_cogvideox_call)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(_cogvideox_call).bind_partial(self, *args, **kwargs)
        arguments = bound.arguments
        count = arguments.pop("num_videos_per_prompt", 1)
        if isinstance(arguments.get("prompt"), str):
            arguments["prompt"] = [arguments["prompt"]]
        for name in ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"):
            value = arguments.get(name)
            if isinstance(value, list):
                arguments[name] = [text for text in value for _ in range(count)]
            elif isinstance(value, Tensor):
                arguments[name] = value.repeat_interleave(count, dim=0)
        return _cogvideox_call(*bound.args, **bound.kwargs)
