"""Networks of the original codes, as far as a LoRA sees them: their layers by native name, without weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tdm.pipelines.loras.layer_names import LayerShape, Names, layer_shapes, names_of
from torch import nn


def native_parts(network: nn.Module, family: str) -> Names:
    """Native layer -> the diffusers layers that are its rows; a layer without a native name keeps its own."""
    shapes = layer_shapes(network)
    names = names_of(network, family)
    alike = shapes.keys() | {name.replace(".", "_") for name in names if "." in name}
    left, stacks = set(shapes), {}
    for name, layers in reversed(names.items()):  # ComfyUI's names of CogVideoX come after the original ones
        if name not in alike and ".processor." not in name and left.issuperset(layers):  # those are of LoRAs alone
            stacks[name] = layers
            left -= set(layers)
    return stacks | {name: (name,) for name in shapes if name in left}


def native_network(shapes: Mapping[str, LayerShape]) -> nn.Module:
    """A network with these layers, on the meta device."""
    root = nn.Module()
    for name, (inputs, outputs, kernel) in shapes.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(len(kernel))
        with torch.device("meta"):
            parent.add_module(last, conv(inputs, outputs, kernel) if conv else nn.Linear(inputs, outputs))
    return root


def native_of(network: nn.Module, family: str) -> tuple[nn.Module, Names]:
    """(the original network of one of diffusers, its layers as rows of diffusers layers)."""
    diffusers_shapes, stacks = layer_shapes(network), native_parts(network, family)
    shapes = {
        native: diffusers_shapes[layers[0]]._replace(outputs=sum(diffusers_shapes[layer].outputs for layer in layers))
        for native, layers in stacks.items()
    }
    return native_network(shapes), stacks
