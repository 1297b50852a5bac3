"""A LoRA of any layout on a network in its original code, such as ComfyUI's: native names, stacked layers joined.

The counterpart of `places.py`, which puts it on a network of diffusers. There a native layer is split into ours; here
our layers are rows of a native one, and the LoRAs of a stack become one LoRA with the very same update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from ...errors import TDMError
from ..families import Family
from .file import LoraFile
from .layer_names import (
    LayerShape,
    component_of,
    is_clip,
    layer_shapes,
    layers_of_native,
    look_up,
    native_names,
    other_clip_name,
    unambiguous,
)
from .layouts import Address, Positional, parse
from .pairs import Layers, Lora, require_places, split, stacked_widths
from .places import place, warn_of_left_out
from .released import released


class Rows(NamedTuple):
    """What a name stands for in a native network: rows of one of its layers, all of them or one part of a stack."""

    layer: str
    start: int
    shape: LayerShape


def place_native(
    file: LoraFile,
    family: Family,
    networks: Mapping[str, nn.Module],
    *,
    scale: float = 1.0,
    positional: Positional | None = None,
    strict: bool = True,
) -> Layers:
    """The LoRA of a file on the layers of native networks; every layer of the file finds its place.

    Args:
        file: from `read_lora_file`.
        family: of the denoiser.
        networks: in their original code, by the name of the component in diffusers: the denoiser, and text encoders.
        scale: strength to multiply in, on top of the file's own alpha / rank.
        positional: what to lay an EMA list on; its network is then the family's released one.
        strict: as in `place`.

    Returns:
        {component: {native layer: (A, B)}}, at strength 1.0. A stack's rank is the sum of the ranks of its parts.

    Raises:
        TDMError: as in `parse` and `place`; a layer that does not exist, has another shape, or is given twice; layers
            of a component that is not among the networks.
    """
    if file.positional is not None and positional is not None:
        ours = place(file, family, {family.denoiser: released(family.name)}, scale=scale, positional=positional)
        layers = {Address(family.denoiser, name): lora for name, lora in ours[family.denoiser].items()}
    else:
        parsed = parse(file, strict=strict)
        warn_of_left_out(file, parsed)
        layers = {address: lora.scaled(scale) for address, lora in parsed.layers.items()}
    names = {component: rows_of(network, family.name) for component, network in networks.items()}
    shapes = {component: layer_shapes(network) for component, network in networks.items()}
    stacks: dict[tuple[str, str], list[tuple[Rows, Lora]]] = {}
    wrong: list[str] = []
    idle = 0  # of those, LoRAs of 0 for layers that are not there
    for address, lora in layers.items():
        component = component_of(address, family.denoiser, names)
        rows = look_up(names.get(component, {}), address.name) or ()
        slices = split(lora, [part.shape for part in rows])
        if not slices:
            widths = stacked_widths([part.shape for part in rows])
            absent = "no such layer" if component in networks else f"without a CLIP there is no {component}"
            wrong.append(
                f"{'.'.join(filter(None, address))} ({f'{widths} wide, not {lora.widths}' if widths else absent})"
            )
            idle += not rows and lora.is_zero
        for target, part in zip(rows, slices, strict=False):
            stacks.setdefault((component, target.layer), []).append((target, part))
    require_places(
        wrong,
        f"the student does not fit this model: {len(layers) - len(wrong)} of its {len(layers)} LoRA layers match",
        others=bool(stacks),
        idle=idle == len(wrong),
        strict=strict,
    )
    placed: dict[str, dict[str, Lora]] = {}
    for (component, layer), stack in stacks.items():
        placed.setdefault(component, {})[layer] = _joined(layer, shapes[component][layer].outputs, stack)
    return placed


def _joined(layer: str, outputs: int, stack: list[tuple[Rows, Lora]]) -> Lora:
    """The LoRA of a native layer with `outputs` rows: its parts' A above one another, their B on the diagonal.

    Raises:
        TDMError: two of them are for the same rows.
    """
    if len(stack) == 1 and stack[0][0].shape.outputs == outputs:
        return stack[0][1]
    halves, blocks, end = [], [], 0
    for rows, lora in sorted(stack, key=lambda part: part[0].start):
        if rows.start < end:
            raise TDMError(f"the file has two LoRAs for the layer {layer!r}")
        halves.append(lora.A)
        blocks += [lora.B.new_zeros(rows.start - end, 0), lora.B]  # rows without a LoRA
        end = rows.start + rows.shape.outputs
    return Lora(torch.cat(halves), torch.block_diag(*blocks, lora.B.new_zeros(outputs - end, 0)))


def rows_of(network: nn.Module, family: str) -> dict[str, tuple[Rows, ...]]:
    """name -> what it stands for in a network in its original code, for every name that `names_of` knows.

    Args:
        network: a denoiser of that family, or a text encoder.
        family: a name of `families`.
    """
    shapes = layer_shapes(network)
    native = [(name, (Rows(name, 0, shape),)) for name, shape in shapes.items()]
    if is_clip(shapes):
        return unambiguous([*native, *((other_clip_name(name), rows) for name, rows in native)])
    ours = dict(
        pair
        for name, layers in layers_of_native(shapes, family).items()
        for pair in _rows_of_layers(name, layers, shapes[name])
    )
    # A family can have two original codes: a name of the one can be several layers of the other.
    others = (
        (name, tuple(rows for layer in layers for rows in ours[layer]))
        for name, layers in native_names(family, ours)
        if name not in shapes
    )
    return unambiguous([*native, *ours.items(), *others])


def _rows_of_layers(native: str, layers: tuple[str, ...], shape: LayerShape) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    """Our layers with their rows in a native one."""
    if "adaLN_modulation" in native and shape.outputs == 2 * shape.inputs:
        # The last one, a shift and a scale: AdaLayerNormContinuous has the scale first.
        shift, scale = (Rows(native, start, LayerShape(shape.inputs, shape.inputs)) for start in (0, shape.inputs))
        yield layers[0], (scale, shift)
    elif len(layers) == 1:
        yield layers[0], (Rows(native, 0, shape),)
    else:
        for i, layer in enumerate(layers):  # the projections of a stack are square, and the last has what is left
            start = i * shape.inputs
            end = shape.outputs if layer == layers[-1] else start + shape.inputs
            yield layer, (Rows(native, start, LayerShape(shape.inputs, end - start)),)
