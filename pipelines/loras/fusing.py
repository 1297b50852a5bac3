"""Fused adapters. In peft a layer with a fused adapter computes its merged weight alone: what else is on is dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from ...errors import TDMError
from .adapters import tuner_layers


def require_fusable(
    networks: Mapping[str, nn.Module], components: Collection[str], adapters: Sequence[str] | None
) -> None:
    """Raise TDMError unless fusing changes nothing in what the networks compute, then or after `unload_lora_weights`.

    Args:
        networks: those that can have adapters, by component.
        components: where to fuse.
        adapters: which to fuse; None: all that are on.
    """
    for component, network in networks.items():
        for layer in tuner_layers(network):
            if layer.disable_adapters:
                raise TDMError("the adapters are switched off, and fusing would put them into the weights; enable_lora")
            fused = set(layer.active_adapters if adapters is None else adapters) & _adapters(layer)
            if component not in components and fused:
                raise TDMError(
                    f"{_listed(fused)} would be fused in part: there are layers in {component} too; "
                    "leave out `components` to fuse them all"
                )
            if fused and (dropped := _counting(layer) - fused - set(layer.merged_adapters)):
                raise TDMError(
                    f"with {_listed(fused)} fused alone, {_listed(dropped)} would be dropped from the same layers; "
                    "fuse all adapters that are on (leave out `adapter_names`), or switch off the others: set_adapters"
                )


def require_all_counted(networks: Collection[nn.Module]) -> None:
    """Raise TDMError if an adapter is on, but dropped where another one is fused."""
    for network in networks:
        for layer in tuner_layers(network):
            fused = layer.merged and not layer.disable_adapters
            if fused and (dropped := _counting(layer) - set(layer.merged_adapters)):
                raise TDMError(
                    f"{_listed(dropped)} would be dropped, because {_listed(layer.merged_adapters)} was fused into the "
                    "same layers; fuse_lora() all that are on, or unfuse_lora()"
                )


def _adapters(layer: Any) -> set[str]:
    """The adapters that a layer has."""
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind)}


def _counting(layer: Any) -> set[str]:
    """The adapters that are on in a layer, at some strength."""
    on = set(layer.active_adapters) & _adapters(layer)
    return {name for name in on if not isinstance(layer, LoraLayer) or layer.scaling[name] != 0}


def _listed(names: Collection[str]) -> str:
    return " and ".join(map(repr, sorted(names)))
