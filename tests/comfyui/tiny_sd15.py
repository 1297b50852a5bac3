"""A real SD1.5 denoiser, as small as ComfyUI still takes it for one, in both layouts.

ComfyUI tells SD1.5 by its width, 320, and by the width of its prompts, 768; one level with one block is enough.
"""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from tdm.pipelines.loras.layer_names import layer_shapes
from tdm.pipelines.loras.pairs import Lora
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

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
    # of a ControlNet
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    **{f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 + 2 * i}" for i in range(6)},
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    **{f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(2)},
    "controlnet_mid_block": "middle_block_out.0",
}
_IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_out", "linear_1")


def build() -> UNet2DConditionModel:
    """Build the network: 26 million weights, the same each time, on the CPU in float32."""
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


def original_name(name: str) -> str:
    """A tensor's name in ComfyUI's files."""
    block = next(block for block in _BLOCKS if name.startswith(f"{block}."))
    layer = name.removeprefix(f"{block}.")
    if ".resnets." in block:
        layer = re.sub(r"^\w+", lambda match: _IN_A_RESNET[match[0]], layer)
    return f"{_BLOCKS[block]}.{layer}"


def original_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of ComfyUI's files."""
    return {original_name(name): tensor.contiguous() for name, tensor in state_dict.items()}


def lora(unet: UNet2DConditionModel, seed: int = 1) -> dict[str, Lora]:
    """Random pairs of rank 4 for layers of every kind, large enough to change the picture."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Lora(
            torch.randn(4, inputs, *kernel, generator=generator) * 0.05,
            torch.randn(outputs, 4, *[1] * len(kernel), generator=generator) * 0.05,
        )
        for name, (inputs, outputs, kernel) in layer_shapes(unet).items()
        if f".{name}".endswith(tuple(f".{end}" for end in _TARGETS))
    }


def checkpoint(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """What a file in models/checkpoints holds: the denoiser, a text encoder in half precision, and a small VAE.

    The text encoder is of full size, 123 million random weights: ComfyUI knows no other for SD1.5.
    """
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**shape, vocab_size=49408))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderTiny()
    file = {f"model.diffusion_model.{k}": tensor for k, tensor in original_names(unet.state_dict()).items()}
    for name, meta in encoder.state_dict().items():
        weight = torch.randn(meta.shape, generator=generator).mul_(0.02).half()
        file[f"cond_stage_model.transformer.{name}"] = weight
    return file | {f"first_stage_model.{_in_taesd(k)}": tensor for k, tensor in vae.state_dict().items()}


def _in_taesd(name: str) -> str:
    """A name of AutoencoderTiny in ComfyUI's, whose decoder counts the clamp before it as a layer."""
    network, _, layer, rest = name.split(".", 3)
    return f"taesd_{network}.{int(layer) + (network == 'decoder')}.{rest}"
