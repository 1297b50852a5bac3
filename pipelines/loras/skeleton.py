"""Networks without weights: the names and shapes of a base's layers, from its configs alone, in no memory."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from ...errors import TDMError
from ..families import Family, family_of_name
from ..locate import base_folder, family_of_base
from .layer_names import layer_shapes, names_of
from .layouts import Address
from .pairs import Lora


def skeletons(base: str, **hub: Any) -> tuple[Family, dict[str, nn.Module]]:
    """(family, networks that can take a LoRA by component) of a base, on the meta device.

    Args:
        base: folder, hub id, or "bundled".
        hub: options of `hf_hub_download`, such as `cache_dir` and `local_files_only`.

    Raises:
        TDMError: there is no such base, its family is not supported, or a config cannot be read.
    """
    folder = base_folder(base)
    family = family_of_base(folder, **hub)
    index: Any = DiffusionPipeline.load_config(folder, **hub)
    adaptable: list[str] = getattr(family.pipeline_class(), "_lora_loadable_modules", [])
    encoders = [name for name in adaptable if name.startswith("text_encoder")]
    networks = {}
    for component in (family.denoiser, *encoders):
        library, name = index.get(component) or (None, None)
        if library is None or name is None:  # a base may leave an encoder out
            continue
        try:
            networks[component] = network_without_weights(library, name, folder, component, hub)
        except (OSError, ValueError) as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise TDMError(f"cannot read the config of {component} of the base {base} ({line})") from None
    return family, networks


def network_without_weights(library: str, name: str, folder: str, component: str, hub: dict[str, Any]) -> nn.Module:
    """A component of a base on the meta device, from its config: class `name` of `library` ("diffusers" or
    "transformers").
    """
    network_class = getattr(importlib.import_module(library), name)
    if library == "diffusers":
        config = network_class.load_config(folder, subfolder=component, **hub)
        with torch.device("meta"):
            return network_class.from_config(config)
    config = network_class.config_class.from_pretrained(folder, subfolder=component, **hub)
    with torch.device("meta"):
        return network_class(config)


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
            parts = [shapes[layer] for layer in names[address.name]]
            known += 1
            fitting += lora.widths == (parts[0].inputs, sum(part.outputs for part in parts))
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
}
