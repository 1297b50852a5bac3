"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .base import ATTENTION, Condition, Family, Size, TeacherCall, longest_text, text_options, zeros


class ZImage(Family):
    """A transformer in which every sample is a sequence of its own: lists go in and come out. Qwen3 text."""

    name = "zimage"
    # Z-Image-Turbo's, which is distilled: no guidance, and the pipeline's 50 steps are not for it
    teacher_call = TeacherCall(8, 1.0)
    time_embedder = "t_embedder"
    lora_targets = (*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    no_guidance = 0.0
    guidance_halves = "prompt first"
    home = "..fixes.batches"
    float32_latents = True

    def default_size(self, pipe: Any) -> Size:  # noqa: ARG002
        return Size(1024, 1024)  # written into the pipeline's code

    def patch_pixels(self, pipe: Any) -> int:
        return 2 * pipe.vae_scale_factor

    def encode_text(self, pipe: Any, prompts: list[str], **options: Any) -> Condition:
        arguments = text_options(pipe, options, "max_sequence_length")
        # The pipeline writes its chat template into the list that it is given.
        texts, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, **arguments)
        lengths = torch.tensor([len(text) for text in texts])  # on the CPU: they cut, and a cut must not wait
        return {"text": pad_sequence(texts, batch_first=True), "length": lengths}

    def text_as_read(self, pipe: Any, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        return pipe.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def blank(self, pipe: Any, n: int, size: Size) -> Condition:  # noqa: ARG002
        tokens = longest_text(pipe)
        text = zeros(pipe, self.denoiser, n, tokens, pipe.transformer.config.cap_feat_dim)
        return {"text": text, "length": torch.full((n,), tokens)}

    def denoise(self, network: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        texts = [text[:length] for text, length in zip(cond["text"], cond["length"].tolist(), strict=True)]
        clock = (1000 - timesteps) / 1000  # this network's time runs towards the picture
        output = network(list(x.unsqueeze(2)), clock, texts, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)
