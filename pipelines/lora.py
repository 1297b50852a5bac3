"""LoRA tensors in the layout of diffusers: paired by layer, checked, and matched to a denoiser.

Keys are `<unet|transformer>.<layer>.lora_A.weight` (rank, in, ...) and `.lora_B.weight` (out, rank, ...).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TDMError

_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


class Lora(NamedTuple):
    """The two halves of one layer's update ``W + B @ A``: A (rank, in, ...), B (out, rank, ...)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """(in, out) of the layer that it updates."""
        return self.A.shape[1], self.B.shape[0]


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
        if not bool(torch.isfinite(tensor).all()):
            raise TDMError(f"{key!r} ({tensor.dtype}) holds NaN or infinite values")
        halves.setdefault(match["layer"], {})[match["half"]] = tensor
    if not halves:
        raise TDMError("there are no LoRA tensors")
    for layer, half in halves.items():
        if len(half) < 2:
            raise TDMError(f"layer {layer!r} has only one half of its LoRA, lora_{next(iter(half))}")
        a, b = half["A"].shape, half["B"].shape
        if min(len(a), len(b)) < 2 or a[0] != b[1]:
            raise TDMError(f"layer {layer!r}: lora_A {tuple(a)} and lora_B {tuple(b)} do not fit together")
    return {layer: Lora(**half) for layer, half in halves.items()}


def state_dict_of(layers: Mapping[str, Lora]) -> dict[str, Tensor]:
    """The inverse of `pair_layers`."""
    return {f"{layer}.lora_{half}.weight": lora._asdict()[half] for layer, lora in layers.items() for half in "AB"}


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


def match_layers(layers: Mapping[str, Lora], denoiser: nn.Module, prefix: str) -> dict[str, Lora]:
    """The layers without their prefix, after a check that every one of them fits the denoiser.

    Args:
        layers: from `pair_layers`, by `<prefix>.<layer>`.
        denoiser: the network the LoRA is for; adapters may be attached to it already.
        prefix: "unet" or "transformer".

    Raises:
        TDMError: a layer does not exist in the denoiser or has other widths; counts and the first names are given.
    """
    widths = _layer_widths(denoiser)
    matched: dict[str, Lora] = {}
    unmatched: list[str] = []
    for name, lora in layers.items():
        layer = name.removeprefix(f"{prefix}.")
        own = widths.get(layer) if name.startswith(f"{prefix}.") else None
        if own == lora.widths:
            matched[layer] = lora
        else:
            unmatched.append(f"{name} ({f'{own} wide, not {lora.widths}' if own else 'no such layer'})")
    if unmatched:
        raise TDMError(
            f"the student does not fit this base: {len(matched)} of its {len(layers)} LoRA layers match the "
            f"{type(denoiser).__name__}, {len(unmatched)} do not: {', '.join(unmatched[:3])}"
            + (", ..." if len(unmatched) > 3 else "")
        )
    return matched


def _layer_widths(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear or convolution layer by name; a layer that peft wrapped counts under its own name."""
    widths = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            widths[name] = (module.in_channels, module.out_channels)
        elif "in_features" in vars(module):  # nn.Linear and its quantised relatives
            widths[name] = (module.in_features, module.out_features)
    return {name.removesuffix(".base_layer"): width for name, width in widths.items()}
