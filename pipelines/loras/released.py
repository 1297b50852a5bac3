"""The denoisers of the families as they were released: which of them has the layers that a file names."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..families import family_of_name
from .layer_names import layer_shapes, names_of
from .layouts import Address
from .pairs import Lora


@functools.cache
def released(family: str) -> nn.Module:
    """The denoiser of a family as it was released, on the meta device; of several sizes the most used."""
    name, config = _RELEASED[family]
    with torch.device("meta"):
        return getattr(importlib.import_module("diffusers"), name)(**config)


def known_layers(family: str, layers: Mapping[Address, Lora]) -> tuple[int, int]:
    """(how many of these layers the released denoiser of a family has by name, how many of those fit its shapes)."""
    network = released(family)
    names, shapes = names_of(network, family), layer_shapes(network)
    known = fitting = 0
    for address, lora in layers.items():
        if address.component in (None, family_of_name(family).denoiser) and address.name in names:
            stack = [shapes[layer] for layer in names[address.name]]
            known += 1
            fitting += lora.widths == (stack[0].inputs, sum(part.outputs for part in stack))
    return known, fitting


def family_by_names(layers: Mapping[Address, Lora]) -> str | None:
    """The family whose released denoiser knows most of these layers; shapes decide between equals. None: no family."""
    counts = {family: known_layers(family, layers) for family in _RELEASED}
    best = max(counts, key=lambda family: counts[family])
    return best if counts[best][0] else None


_RELEASED: dict[str, tuple[str, dict[str, Any]]] = {  # what differs from the defaults of the class
    "sd15": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "pixart": ("PixArtTransformer2DModel", {"caption_channels": 4096}),
    "sd3": (  # 3.5 medium: every name of 3 medium is in it
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "cogvideox": ("CogVideoXTransformer3DModel", {}),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "sana": ("SanaTransformer2DModel", {}),
    "wan": ("WanTransformer3DModel", {}),
    "zimage": ("ZImageTransformer2DModel", {}),
    "qwenimage": ("QwenImageTransformer2DModel", {}),
    "krea2": ("Krea2Transformer2DModel", {}),
}
