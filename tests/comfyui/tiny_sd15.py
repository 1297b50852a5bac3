"""A real SD1.5 denoiser, as small as ComfyUI still takes it for one, in both layouts.

ComfyUI tells SD1.5 by its width, 320, and by the width of its prompts, 768; one level with one block is enough.
"""

from __future__ import annotations

import re

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

# diffusers' names and those of the original code, in which ComfyUI's files are
_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def build() -> UNet2DConditionModel:
    """The same weights each time, on the CPU in float32: 26 million."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(320,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    return unet.eval().requires_grad_(False)


def original_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of ComfyUI's files."""

    def renamed(name: str) -> str:
        block = next(block for block in _BLOCKS if name.startswith(f"{block}."))
        layer = name.removeprefix(f"{block}.")
        if ".resnets." in block:
            layer = re.sub(r"^\w+", lambda found: _IN_A_RESNET[found[0]], layer)
        return f"{_BLOCKS[block]}.{layer}"

    return {renamed(name): tensor.contiguous() for name, tensor in state_dict.items()}
