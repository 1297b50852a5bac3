"""Networks that an operation on adapters leaves as they were if it fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .adapters import tuner_layers

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def unchanged_on_error(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Put networks back as they were if the `with` is left by an error: layers, adapters, what is on, and hooks.

    Loaders of adapters wrap layers, add to them, switch what is on and take off the hooks of offloading, in an order
    of their own, and stop where something does not fit. Undoing their steps would mean knowing them. So the structure
    of the networks is noted before: it is references only, and no weight is copied.
    """
    networks = list(networks)
    structure = [(module, _attributes(module)) for network in networks for module in network.modules()]
    trainable = [
        (parameter, parameter.requires_grad)
        for network in networks
        for layer in tuner_layers(network)
        for parameter in layer.parameters()
    ]
    try:
        yield
    except BaseException:
        for module, attributes in structure:
            _restore(module, attributes)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute of a module with a copy of what it holds, if it is a plain container."""
    return {name: (value, value.copy() if type(value) in _CONTAINERS else None) for name, value in vars(module).items()}


def _restore(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    """The same containers with what they held: handles of hooks refer to them."""
    vars(module).clear()
    for name, (value, content) in attributes.items():
        vars(module)[name] = value
        if content is None:
            continue
        value.clear()
        value.extend(content) if isinstance(value, list) else value.update(content)
