"""Every name under which a LoRA file may address a layer of a network.

A layer has its own name (diffusers), the name in the original checkpoint of its family (native), and either with
underscores for dots (kohya). A native layer can be several of ours, stacked: its rows are theirs, in a fixed order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from diffusers.models.normalization import AdaLayerNormContinuous
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .native_names import NATIVE

Names = dict[str, tuple[str, ...]]


class LayerShape(NamedTuple):
    """What a LoRA must fit: A (rank, inputs, *kernel), B (outputs, rank, 1 per kernel axis)."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()


def layer_shapes(network: nn.Module) -> dict[str, LayerShape]:
    """Every linear and (ungrouped) convolution layer by its own name, in the module order of the network.

    A layer that peft wrapped counts under its own name, and the adapter's layers do not count.
    """
    return dict(_layer_shapes(network, ""))


def _layer_shapes(module: nn.Module, prefix: str) -> Iterator[tuple[str, LayerShape]]:
    for name, child in module.named_children():
        layer: Any = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if layer.groups == 1:
                yield prefix + name, LayerShape(layer.in_channels, layer.out_channels, tuple(layer.kernel_size))
        elif "in_features" in vars(layer):  # nn.Linear and its quantised relatives
            yield prefix + name, LayerShape(layer.in_features, layer.out_features)
        else:
            yield from _layer_shapes(layer, f"{prefix}{name}.")


def names_of(network: nn.Module, family: str) -> Names:
    """name -> the layers that it stands for: one, or the parts of a stacked native layer in the order of their rows.

    A name that could mean two things is left out, and so are native layers whose rows have another order than ours
    (the final modulation of SD3 and Flux).

    Args:
        network: a denoiser of that family, or a text encoder of any.
        family: a name of `families`.
    """
    own = list(layer_shapes(network))
    names: Names = {name: (name,) for name in own}
    found = list(names.items())
    if hasattr(network, "down_blocks"):
        found += _sgm_names(network, own)
    elif any(name.startswith(("encoder.layers.", "text_model.")) for name in own):
        found += [(_other_clip_name(name), (name,)) for name in own]
    else:
        found += _native_names(NATIVE.get(family, {}), own, _swapped(network))
    found += [(name.replace(".", "_"), layers) for name, layers in found]
    ambiguous = set()
    for name, layers in found:
        if names.setdefault(name, layers) != layers:
            ambiguous.add(name)
    return {name: layers for name, layers in names.items() if name not in ambiguous}


def _other_clip_name(name: str) -> str:
    """CLIPTextModel dropped the `text_model.` of its names in transformers 5; files have either."""
    return name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"


def _swapped(network: nn.Module) -> set[str]:
    """Modulations whose halves, scale and shift, the original checkpoint has the other way round."""
    return {f"{name}.linear" for name, module in network.named_modules() if isinstance(module, AdaLayerNormContinuous)}


def _native_names(rules: Mapping[str, str], own: list[str], skip: set[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The native names of a table: native pattern -> our patterns, parted by blanks, with `*` for a block's number."""
    known = set(own) - skip
    for native, ours in rules.items():
        patterns = ours.split()
        first = re.compile(re.escape(patterns[0]).replace(r"\*", r"(\d+)"))
        for match in filter(None, map(first.fullmatch, own)):
            layers = tuple(_numbered(pattern, match.groups()) for pattern in patterns)
            if known.issuperset(layers):
                yield _numbered(native, match.groups()), layers


def _numbered(pattern: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def _sgm_names(unet: Any, own: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of the original Stable Diffusion UNet (SD1.5, SDXL), whose blocks are counted through."""
    stems = dict(_SGM_STEMS)
    number = 1  # input block 0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            stems[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            stems[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            stems[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            stems[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            stems[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:  # it closes the block's last layer
            place = 2 if hasattr(block, "attentions") else 1
            stems[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{number - 1}.{place}"
    for name in own:
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):
            stem, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
            if stem in stems:
                inner = _SGM_RESNET.get(rest, rest) if ".resnets." in name else rest
                yield ".".join(filter(None, (stems[stem], inner))), (name,)
                break


_SGM_STEMS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_out": "out.2",
}
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
