"""Where the layers of a LoRA file belong in a pipeline: names are looked up, never guessed, and all must be found."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import nn

from ...errors import TDMError
from ..families import Family
from .file import LoraFile
from .layer_names import component_of, layer_shapes, look_up, names_of, swapped
from .layouts import NamedLoras, Positional, parse
from .pairs import Layers, Lora, lay_out, pair


def place(
    file: LoraFile,
    family: Family,
    components: Mapping[str, nn.Module],
    *,
    scale: float = 1.0,
    positional: Positional | None = None,
    strict: bool = True,
) -> Layers:
    """The LoRA of a file on the layers of a pipeline; every layer of the file finds its place.

    A LoRA of 0 for a layer that does not exist needs no place.

    Args:
        file: from `read_lora_file`.
        family: of the pipeline.
        components: the networks that can take a LoRA, by name; adapters may be attached to them already.
        scale: strength to multiply in, on top of the file's own alpha / rank.
        positional: what to lay an EMA list on.
        strict: False: what has no place is left out, with a warning, if anything has one.

    Returns:
        The layers at strength 1.0; no two share memory.

    Raises:
        TDMError: as in `parse`; a layer that does not exist, has another shape, or is given twice (counts and the
            first names are given); for an EMA list, a wrong count or shape.
    """
    if file.positional is not None and positional is not None:
        denoiser = components[family.denoiser]
        return {family.denoiser: _place_positional(file, denoiser, positional, scale * positional.scale)}
    names = {component: names_of(network, family.name) for component, network in components.items()}
    other_way = {component: swapped(network) for component, network in components.items()}
    parsed = parse(file, strict=strict)
    warn_of_left_out(file, parsed)
    named = []
    for address, lora in parsed.layers.items():
        component = component_of(address, family.denoiser, names)
        targets = look_up(names.get(component, {}), address.name) or ()
        if other_way.get(component, set()).intersection(targets) and not _is_diffusers_name(address.name, targets[0]):
            lora = Lora(lora.A, lora.B.roll(len(lora.B) // 2, 0))
        named.append((component, ".".join(filter(None, address)), targets, lora))
    shapes = {component: layer_shapes(network) for component, network in components.items()}
    return lay_out(named, shapes, type(components[family.denoiser]).__name__, scale, strict=strict)


def warn_of_left_out(file: LoraFile, parsed: NamedLoras) -> None:
    """Say what of a file is no part of its LoRA."""
    if parsed.left_out:
        keys = ", ".join(parsed.left_out[:3]) + (", ..." if len(parsed.left_out) > 3 else "")
        text = f"{file.path}: {len(parsed.left_out)} tensors next to the LoRA are left out: {keys}"
        warnings.warn(text, stacklevel=2)


def _is_diffusers_name(name: str, layer: str) -> bool:
    """Whether a file calls a layer as diffusers does."""
    return name.replace(".", "_") == layer.replace(".", "_")


def place_layers(layers: Layers, family: Family, components: Mapping[str, nn.Module]) -> Layers:
    """A LoRA in memory on the layers of a pipeline, whose names it has already: a copy of it, every layer checked.

    Args:
        layers: at strength 1.0.
        family, components: as in `place`.

    Raises:
        TDMError: a layer that does not exist or has another shape.
    """
    shapes = {component: layer_shapes(network) for component, network in components.items()}
    return lay_out(
        [
            (component, f"{component}.{name}", (name,) if name in shapes.get(component, {}) else (), lora)
            for component, loras in layers.items()
            for name, lora in loras.items()
        ],
        shapes,
        type(components[family.denoiser]).__name__,
    )


def _place_positional(file: LoraFile, denoiser: nn.Module, positional: Positional, scale: float) -> dict[str, Lora]:
    """An EMA list on the layers of its training: lora_A then lora_B of each target, in the order of the modules."""
    tensors = file.positional or []
    ends = tuple(f".{target}" for target in positional.targets)
    targets = {name: shape for name, shape in layer_shapes(denoiser).items() if f".{name}".endswith(ends)}
    if len(tensors) != 2 * len(targets):
        raise TDMError(
            f"the list has {len(tensors)} tensors, but {len(targets)} layers of the {type(denoiser).__name__} "
            f"({', '.join(positional.targets)}) need {2 * len(targets)}"
        )
    layers = {}
    for i, (name, shape) in enumerate(targets.items()):
        A, B = tensors[2 * i : 2 * i + 2]
        expected = (positional.rank, shape.inputs), (shape.outputs, positional.rank)
        if (tuple(A.shape), tuple(B.shape)) != expected:
            raise TDMError(
                f"the list does not fit at {name!r}: tensors {2 * i} and {2 * i + 1} are {tuple(A.shape)} and "
                f"{tuple(B.shape)}, not {expected[0]} and {expected[1]}"
            )
        layers[name] = pair(name, {"A": A.clone(), "B": B.clone()}).scaled(scale)
    return layers
