"""Core's own LoRA loaders on the MODEL and CLIP of Load Diffusers Pipeline.

They look layers up by the names of ComfyUI's networks, leave out what they do not find, and only log that. For a
pipeline of diffusers this module reads the file as Load TDM Student does: any layout, each layer in its place or one
line that says which has none. Core has no hook for that, so three functions of `comfy.lora` are wrapped; for every
other MODEL and CLIP they stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
from torch import Tensor, nn

from ..errors import TDMError
from ..pipelines.families import Family
from ..pipelines.loras.file import LoraFile
from ..pipelines.loras.pairs import state_dict_of
from .bridge import DiffusersModel, TextEncoders
from .faces import warn
from .loader import collecting_left_out, denoiser_of, encoders_of

_UNET_KEYS, _CLIP_KEYS, _LOAD = (
    comfy.lora.model_lora_keys_unet,
    comfy.lora.model_lora_keys_clip,
    comfy.lora.load_lora,
)
_OF_TEXT_ENCODERS = ("text_encoder", "lora_te")


class _Names(dict[str, Any]):
    """Core's table of names, which knows the networks of diffusers that it is for."""

    def __init__(self, names: dict[str, Any], family: Family, model: DiffusersModel | None, encoders: Any) -> None:
        super().__init__(names)
        self.family, self.model, self.encoders = family, model, encoders

    def renamed(self, lora: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a LoRA under the names of this table, without those of a network that is not loaded onto.

        Raises:
            TDMError: as Load TDM Student.
        """
        from ..pipelines.loras.places import place  # imports diffusers

        networks = encoders_of(self.encoders)
        networks[self.family.denoiser] = ("", nn.Module()) if self.model is None else denoiser_of(self.model)
        of_text = {key for key in lora if key.startswith(_OF_TEXT_ENCODERS)}
        left_out: set[str] = of_text if self.encoders is None else set()
        if self.model is None:
            left_out = left_out | (lora.keys() - of_text)
        lora = {key: tensor for key, tensor in lora.items() if key not in left_out}
        if not lora:
            return {}
        file = LoraFile(Path("the LoRA"), "safetensors", lora)
        with collecting_left_out() as lines:
            placed = place(file, self.family, {name: network for name, (_, network) in networks.items()})
        for text in lines:
            warn(text)
        return {
            f"{networks[component][0]}.{key}": tensor
            for component, layers in placed.items()
            for key, tensor in state_dict_of(layers).items()
        }


def _model_lora_keys_unet(model: Any, key_map: dict[str, Any] | None = None) -> dict[str, Any]:
    names = _UNET_KEYS(model, {} if key_map is None else key_map)
    return _Names(names, model.family, model, None) if isinstance(model, DiffusersModel) else names


def _model_lora_keys_clip(model: Any, key_map: dict[str, Any] | None = None) -> dict[str, Any]:
    names = _CLIP_KEYS(model, {} if key_map is None else key_map)
    if isinstance(names, _Names):
        names.encoders = model
    elif isinstance(model, TextEncoders) and not key_map:  # of a CLIP alone
        return _Names(names, model.family, None, model)
    return names


def _load_lora(lora: dict[str, Tensor], to_load: dict[str, Any], log_missing: bool = True) -> dict[str, Any]:
    if not isinstance(to_load, _Names):
        return _LOAD(lora, to_load, log_missing)
    renamed = to_load.renamed(lora)
    loaded = _LOAD(renamed, to_load, log_missing)
    if 2 * len(loaded) != len(renamed):
        raise TDMError(f"this ComfyUI takes {len(loaded)} of the {len(renamed) // 2} LoRA layers")
    return loaded


def serve_core_loaders() -> None:
    """Have core's LoRA loaders read files for networks of diffusers, from now on."""
    comfy.lora.model_lora_keys_unet = _model_lora_keys_unet
    comfy.lora.model_lora_keys_clip = _model_lora_keys_clip
    comfy.lora.load_lora = _load_lora
