"""Where the layers of a LoRA file belong in a pipeline: names are looked up, never guessed, and all must be found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ...errors import TDMError
from ..families import Family
from .file import LoraFile
from .layer_names import LayerShape, layer_shapes, names_of
from .layouts import Positional, parse
from .pairs import Layers, Lora, pair


def place(
    file: LoraFile,
    family: Family,
    components: Mapping[str, nn.Module],
    *,
    scale: float = 1.0,
    positional: Positional | None = None,
) -> Layers:
    """The LoRA of a file on the layers of a pipeline; every layer of the file finds its place.

    Args:
        file: from `read_lora_file`.
        family: of the pipeline.
        components: the networks that can take a LoRA, by name; adapters may be attached to them already.
        scale: strength to multiply in, on top of the file's own alpha / rank.
        positional: what to lay an EMA list on.

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
    return _place(
        [
            (component, ".".join(filter(None, address)), names.get(component, {}).get(address.name, ()), lora)
            for address, lora in parse(file).layers.items()
            for component in (address.component or family.denoiser,)
        ],
        family,
        components,
        scale,
    )


def place_layers(layers: Layers, family: Family, components: Mapping[str, nn.Module]) -> Layers:
    """A LoRA in memory on the layers of a pipeline, whose names it has already: a copy of it, every layer checked.

    Args:
        layers: at strength 1.0.
        family, components: as in `place`.

    Raises:
        TDMError: a layer that does not exist or has another shape.
    """
    shapes = {component: layer_shapes(network) for component, network in components.items()}
    return _place(
        [
            (component, f"{component}.{name}", (name,) if name in shapes.get(component, {}) else (), lora)
            for component, loras in layers.items()
            for name, lora in loras.items()
        ],
        family,
        components,
    )


def _place(
    named: Sequence[tuple[str, str, Sequence[str], Lora]],
    family: Family,
    components: Mapping[str, nn.Module],
    scale: float = 1.0,
) -> Layers:
    """The layers of a pipeline that (component, name in the source, our layers of that name, LoRA) are for."""
    shapes = {component: layer_shapes(network) for component, network in components.items()}
    placed: dict[str, dict[str, Lora]] = {}
    wrong: list[str] = []
    for component, name, targets, lora in named:
        stack = [shapes[component][target] for target in targets]
        loras = split(lora.scaled(scale), stack)
        if not loras:
            own = stacked_widths(stack)
            why = f"{own} wide, not {lora.widths}" if own not in (None, lora.widths) else "another kernel"
            wrong.append(f"{name} ({why if targets else 'no such layer'})")
        for target, part in zip(targets, loras, strict=False):
            if target in placed.setdefault(component, {}):
                raise TDMError(f"the file has two LoRAs for the layer {target!r}; the second as {name!r}")
            placed[component][target] = part
    if wrong:
        raise TDMError(
            f"the student does not fit this base: {len(named) - len(wrong)} of its {len(named)} LoRA layers match "
            f"the {type(components[family.denoiser]).__name__}, {len(wrong)} do not: {', '.join(wrong[:3])}"
            + (", ..." if len(wrong) > 3 else "")
        )
    return placed


def stacked_widths(parts: Sequence[LayerShape]) -> tuple[int, int] | None:
    """(in, out) of our layers as one native layer; None if there are none."""
    return (parts[0].inputs, sum(part.outputs for part in parts)) if parts else None


def split(lora: Lora, parts: Sequence[LayerShape]) -> list[Lora]:
    """The LoRA of each layer of a stack: A for all, B by rows. Empty if it does not fit."""
    if stacked_widths(parts) != lora.widths:
        return []
    found, row = [], 0
    for inputs, outputs, kernel in parts:
        A = _reshaped(lora.A, (lora.rank, inputs, *kernel))
        B = _reshaped(lora.B[row : row + outputs], (outputs, lora.rank, *[1] * len(kernel)))
        if A is None or B is None:
            return []
        found.append(Lora(A.clone(), B.clone()))
        row += outputs
    return found


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The tensor in that shape, if the two differ by kernel axes of length 1 at most; else None."""

    def essence(sizes: Sequence[int]) -> list[int]:
        return [*sizes[:2], *(size for size in sizes[2:] if size != 1)]

    return tensor.reshape(shape) if essence(tensor.shape) == essence(shape) else None


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
