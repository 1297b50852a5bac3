"""LoRA tensors in the layout of diffusers, the one our own files have: paired by layer and checked.

Keys are `<component>.<layer>.lora_A.weight` (rank, in, ...) and `.lora_B.weight` (out, rank, ...). Other layouts are
read by `layouts.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import TDMError

_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


class Lora(NamedTuple):
    """The two halves of one layer's update ``W + B @ A``: A (rank, in, ...), B (out, rank, ...)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def scaled(self, scale: float) -> Lora:
        """The update times a number, which goes into B, in float32 or better."""
        if scale == 1:
            return self
        return Lora(self.A, self.B.to(torch.promote_types(self.B.dtype, torch.float32)) * scale)

    @property
    def widths(self) -> tuple[int, int]:
        """(in, out) of the layer that it updates."""
        return self.A.shape[1], self.B.shape[0]


Layers = Mapping[str, Mapping[str, Lora]]
"""A LoRA at strength 1.0: component of a pipeline -> layer -> its two halves."""


def pair_layers(state_dict: Mapping[str, Tensor]) -> dict[str, Lora]:
    """The LoRA of each layer, by layer name.

    Raises:
        TDMError: no keys, keys of another layout, half a layer, halves that do not fit, or values that are not finite.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise TDMError(f"{key!r} is not a diffusers LoRA key like 'transformer.<layer>.lora_A.weight'")
        halves.setdefault(match["layer"], {})[match["half"]] = tensor
    if not halves:
        raise TDMError("there are no LoRA tensors")
    return {layer: pair(layer, half) for layer, half in halves.items()}


def pair(layer: str, half: Mapping[str, Tensor]) -> Lora:
    """The LoRA of one layer from its halves, {"A": (rank, in, ...), "B": (out, rank, ...)}.

    Raises:
        TDMError: a half is missing, the two do not fit together, have rank 0, or hold NaN or infinite values.
    """
    if len(half) < 2:
        raise TDMError(f"layer {layer!r} has only one half of its LoRA, lora_{next(iter(half))}")
    a, b = half["A"].shape, half["B"].shape
    if min(len(a), len(b)) < 2 or a[0] != b[1]:
        raise TDMError(f"layer {layer!r}: lora_A {tuple(a)} and lora_B {tuple(b)} do not fit together")
    if a[0] == 0:
        raise TDMError(f"layer {layer!r}: its LoRA has rank 0; leave the layer out of the file")
    for name, tensor in half.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TDMError(f"layer {layer!r}: lora_{name} ({tensor.dtype}) holds NaN or infinite values")
    return Lora(**half)


def state_dict_of(layers: Mapping[str, Lora]) -> dict[str, Tensor]:
    """The inverse of `pair_layers`."""
    return {f"{layer}.lora_{half}.weight": lora._asdict()[half] for layer, lora in layers.items() for half in "AB"}


_KOHYA = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
}


def kohya_state_dict_of(component: str, layers: Mapping[str, Lora]) -> dict[str, Tensor]:
    """The layers of one component under kohya's names; alpha is the rank, which is strength 1.0."""
    tensors: dict[str, Tensor] = {}
    for layer, lora in layers.items():
        name = f"{_KOHYA[component]}_{layer.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": lora.A, f"{name}.lora_up.weight": lora.B}
        tensors[f"{name}.alpha"] = torch.tensor(float(lora.rank))
    return tensors


def peft_config(layers: Mapping[str, Lora]) -> dict[str, Any]:
    """Arguments of peft's `LoraConfig` that run these layers at scale 1.0: alpha = rank, layer by layer."""
    rank = Counter(lora.rank for lora in layers.values()).most_common(1)[0][0]
    others = {f"^{layer}": lora.rank for layer, lora in layers.items() if lora.rank != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(layers),
    }
