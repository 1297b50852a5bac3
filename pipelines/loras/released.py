"""The denoisers of the families as they were released: which of them has the layers that a file names."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

from torch import nn

from ..families import family_of_name
from ..outlines import network_without_weights, published_bases
from .layer_names import layer_shapes, names_of
from .layouts import Address
from .pairs import Lora


@functools.cache
def released(family: str) -> nn.Module:
    """The denoiser of a family as it was released, on the meta device: that of the base which its preset names."""
    folder, component = published_bases()[family], family_of_name(family).denoiser
    library, name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[component]
    return network_without_weights(library, name, str(folder), component, {})


def known_layers(family: str, layers: Mapping[Address, Lora]) -> tuple[int, int]:
    """(how many of these layers the released denoiser of a family has by name, how many of those fit its shapes)."""
    network = released(family)
    names, shapes = names_of(network, family), layer_shapes(network)
    known = fitting = 0
    for address, lora in layers.items():
        if address.component in (None, family_of_name(family).denoiser) and address.name in names:
            stack = [shapes[layer] for layer in names[address.name]]
            known += 1
            fitting += lora.widths == (stack[0].inputs, sum(part.outputs for part in stack))
    return known, fitting


def family_by_names(layers: Mapping[Address, Lora]) -> str | None:
    """The family whose released denoiser knows most of these layers; shapes decide between equals. None: no family."""
    counts = {family: known_layers(family, layers) for family in published_bases()}
    best = max(counts, key=lambda family: counts[family])
    return best if counts[best][0] else None
