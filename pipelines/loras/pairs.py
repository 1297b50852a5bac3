"""LoRA tensors in the layout of diffusers, the one our own files have: paired by layer and checked.

Keys are `<component>.<layer>.lora_A.weight` (rank, in, ...) and `.lora_B.weight` (out, rank, ...). Other layouts are
read by `layouts.py`.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import PartialLoraError, TDMError

_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")


class Lora(NamedTuple):
    """The two halves of one layer's update ``W + B @ A``: A (rank, in, ...), B (out, rank, ...)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return not bool(self.A.any()) or not bool(self.B.any())

    def scaled(self, scale: float) -> Lora:
        """The update times a number, which goes into B, in float32 or better."""
        if scale == 1:
            return self
        return Lora(self.A, self.B.to(torch.promote_types(self.B.dtype, torch.float32)) * scale)

    @property
    def widths(self) -> tuple[int, int]:
        """(in, out) of the layer that it updates."""
        return self.A.shape[1], self.B.shape[0]


class LayerShape(NamedTuple):
    """What a LoRA must fit: A (rank, inputs, *kernel), B (outputs, rank, 1 per kernel axis)."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()


Layers = Mapping[str, Mapping[str, Lora]]
"""A LoRA at strength 1.0: component of a pipeline -> layer -> its two halves."""


def pair_layers(state_dict: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Lora]:
    """The LoRA of each layer at strength 1.0, by layer name.

    Args:
        state_dict: by key.
        alpha: that the LoRA was trained with; ``alpha / rank`` goes into B. None: it is the rank.

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
    loras = {layer: pair(layer, half) for layer, half in halves.items()}
    return {layer: lora if alpha is None else lora.scaled(alpha / lora.rank) for layer, lora in loras.items()}


def check_layers(layers: Layers) -> None:
    """Check a LoRA in memory as `pair` checks one from a file.

    Raises:
        TDMError: the halves of a layer do not fit together, have rank 0, or hold NaN or infinite values.
    """
    for component, loras in layers.items():
        for layer, lora in loras.items():
            pair(f"{component}.{layer}", lora._asdict())


def stored(layers: Layers, dtype: torch.dtype | None) -> Layers:
    """Layers as they go into a file: on the CPU, contiguous, in the dtype to store (None: their own), finite in it.

    Raises:
        TDMError: values that the dtype cannot hold.
    """
    ready = {
        component: {
            layer: Lora(
                *(
                    half.detach().to("cpu", dtype or half.dtype).clone(memory_format=torch.contiguous_format)
                    for half in lora
                )
            )
            for layer, lora in loras.items()
        }
        for component, loras in layers.items()
    }
    check_layers(ready)
    return ready


def pair(layer: str, half: Mapping[str, Tensor]) -> Lora:
    """The LoRA of one layer from its halves, {"A": (rank, in, ...), "B": (out, rank, ...)}. 8-bit floats are widened.

    Raises:
        TDMError: a half is missing, the two do not fit together, have rank 0, or hold NaN or infinite values, or whole
            numbers.
    """
    if len(half) < 2:
        raise TDMError(f"layer {layer!r} has only one half of its LoRA, lora_{next(iter(half))}")
    a, b = half["A"].shape, half["B"].shape
    if min(len(a), len(b)) < 2 or a[0] != b[1]:
        raise TDMError(f"layer {layer!r}: lora_A {tuple(a)} and lora_B {tuple(b)} do not fit together")
    if a[0] == 0:
        raise TDMError(f"layer {layer!r}: its LoRA has rank 0; leave the layer out of the file")
    half = {name: wide_float(tensor) for name, tensor in half.items()}
    for name, tensor in half.items():
        if not tensor.is_floating_point():
            raise TDMError(f"layer {layer!r}: lora_{name} is stored as {tensor.dtype}, which is no LoRA of floats")
        if not bool(torch.isfinite(tensor).all()):
            raise TDMError(f"layer {layer!r}: lora_{name} ({tensor.dtype}) holds NaN or infinite values")
    return Lora(**half)


def wide_float(tensor: Tensor) -> Tensor:
    """A tensor of 8-bit floats as float32, which torch can compute with; any other as it is."""
    narrow = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.to(torch.float32) if narrow else tensor


def state_dict_of(layers: Mapping[str, Lora]) -> dict[str, Tensor]:
    """The inverse of `pair_layers`."""
    return {f"{layer}.lora_{half}.weight": lora._asdict()[half] for layer, lora in layers.items() for half in "AB"}


_KOHYA = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
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


def lay_out(
    named: Sequence[tuple[str, str, Sequence[str], Lora]],
    shapes: Mapping[str, Mapping[str, LayerShape]],
    network: str,
    scale: float = 1.0,
    *,
    strict: bool = True,
) -> Layers:
    """LoRAs on the layers of a pipeline, in the shapes that these have; every one finds its place.

    Args:
        named: (component, name in the source, names of our layers, LoRA); of several layers the LoRA is of their stack.
        shapes: of the layers, by component and name.
        network: what errors call the denoiser.
        scale: strength to multiply in.
        strict: False: LoRAs without a place are left out, with a warning. Those that are 0 always are, without one.

    Raises:
        TDMError: no LoRA has its layer in its shape, or two are for one layer.
        PartialLoraError: with `strict`, some have not.
    """
    placed: dict[str, dict[str, Lora]] = {}
    wrong: list[str] = []
    idle = 0  # of those, LoRAs of 0 for layers that are not there
    for component, name, targets, lora in named:
        stack = [shapes[component][target] for target in targets]
        loras = split(Lora(*map(wide_float, lora)).scaled(scale), stack)
        if not loras:
            widths = stacked_widths(stack)
            why = f"{widths} wide, not {lora.widths}" if widths not in (None, lora.widths) else "another kernel"
            wrong.append(f"{name} ({why if targets else 'no such layer'})")
            idle += not targets and lora.is_zero
        for target, part in zip(targets, loras, strict=False):
            if target in placed.setdefault(component, {}):
                raise TDMError(f"the file has two LoRAs for the layer {target!r}; the second as {name!r}")
            placed[component][target] = part
    require_places(
        wrong,
        f"the student does not fit this base: {len(named) - len(wrong)} of its {len(named)} LoRA layers match the "
        f"{network}",
        others=bool(placed),
        idle=idle == len(wrong),
        strict=strict,
    )
    return placed


def require_places(wrong: Sequence[str], problem: str, *, others: bool, idle: bool, strict: bool) -> None:
    """Check that every layer of a LoRA has a place; without `strict` warn of those that have none.

    Args:
        wrong: the layers without a place, with why they have none.
        problem: how the text begins.
        others: whether any layer has a place.
        idle: these layers change nothing; they are left out without a word if there are others.
        strict: whether they may not be left out.

    Raises:
        TDMError: no layer has a place.
        PartialLoraError: with `strict`, some have none.
    """
    if not wrong or (idle and others):
        return
    text = f"{problem}, {len(wrong)} do not: {', '.join(wrong[:3])}" + (", ..." if len(wrong) > 3 else "")
    if not others:
        raise TDMError(text)
    if strict:
        raise PartialLoraError(text)
    warnings.warn(f"{text}; these are left out", stacklevel=3)


def stacked_widths(stack: Sequence[LayerShape]) -> tuple[int, int] | None:
    """(in, out) of our layers as one native layer; None if there are none."""
    return (stack[0].inputs, sum(layer.outputs for layer in stack)) if stack else None


def split(lora: Lora, stack: Sequence[LayerShape]) -> list[Lora]:
    """The LoRA of each layer of a stack: A for all, B by rows. Empty if it does not fit."""
    if stacked_widths(stack) != lora.widths:
        return []
    loras, row = [], 0
    for inputs, outputs, kernel in stack:
        A = _reshaped(lora.A, (lora.rank, inputs, *kernel))
        B = _reshaped(lora.B[row : row + outputs], (outputs, lora.rank, *[1] * len(kernel)))
        if A is None or B is None:
            return []
        loras.append(Lora(A.clone(), B.clone()))
        row += outputs
    return loras


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor in that shape, if the two differ by kernel axes of length 1 at most; else None."""

    def essence(sizes: Sequence[int]) -> list[int]:
        return [*sizes[:2], *(size for size in sizes[2:] if size != 1)]

    return tensor.reshape(shape) if essence(tensor.shape) == essence(shape) else None
