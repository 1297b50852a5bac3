"""LoRAs as part of the weights: a network that has learned them for good."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .pairs import Lora


@torch.no_grad()
def merge(network: nn.Module, layers: Mapping[str, Lora]) -> None:
    """Add ``B @ A`` of each layer to its weight, in float32 or better; the weight keeps its dtype and device.

    Args:
        network: without adapters, its weights in 16 bits or more.
        layers: from `place`, at strength 1.0.
    """
    for name, lora in layers.items():
        weight = network.get_parameter(f"{name}.weight")
        weight.copy_(merged(weight, lora))


def merged(weight: Tensor, lora: Lora) -> Tensor:
    """A layer's weight ``[out, in, ...]`` with ``B @ A`` of its LoRA, in float32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    A, B = (half.to(weight.device, wide).flatten(1) for half in lora)
    return weight.to(wide) + (B @ A).reshape(weight.shape)
