"""The adapters that peft put into a pipeline's networks: switch them off, read them, see past them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...errors import TDMError
from .pairs import Lora


def tuner_layers(module: nn.Module) -> list[Any]:
    """The layers that peft wrapped, of any adapter type."""
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def active_adapters(module: nn.Module) -> list[str]:
    """The adapters that are on in a network."""
    return next((list(layer.active_adapters) for layer in tuner_layers(module)), [])


def set_active(module: nn.Module, adapters: list[str]) -> None:
    """Switch these adapters on in a network, and no others; a layer ignores adapters that it does not have."""
    for layer in tuner_layers(module):
        layer.set_adapter(adapters)


def is_on(module: nn.Module, adapter: str) -> bool:
    """Whether an adapter has a part in what a network computes: switched on at some strength, or fused."""
    return any(
        adapter in layer.merged_adapters
        or (adapter in layer.active_adapters and not layer.disable_adapters and layer.scaling[adapter] != 0)
        for layer in tuner_layers(module)
        if isinstance(layer, LoraLayer) and adapter in layer.scaling
    )


@contextmanager
def staying_active(modules: Iterable[nn.Module]) -> Iterator[None]:
    """For a `with` that loads an adapter, which diffusers makes the only active one: those before it stay on too."""
    before = [(module, active_adapters(module)) for module in modules]
    yield
    for module, adapters in before:
        new = [adapter for adapter in active_adapters(module) if adapter not in adapters]
        set_active(module, [*adapters, *new])


def require_unfused(modules: Iterable[nn.Module]) -> None:
    """Raise TDMError if adapters are merged into the weights, where they can be neither switched off nor read."""
    if any(layer.merged for module in modules for layer in tuner_layers(module)):
        raise TDMError("adapters are fused into the weights; call unfuse_lora first")


def require_wide(modules: Iterable[nn.Module], remedy: str) -> None:
    """Raise TDMError if weights are stored in 8-bit floats by layerwise casting: `remedy` says what to do instead.

    A LoRA that is attached then becomes 8 bits as well and no longer computes, and a saved base would have lost digits.
    """
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.element_size() == 1:
                stored = str(parameter.dtype).removeprefix("torch.")
                raise TDMError(f"{type(module).__name__} stores its weights as {stored} (layerwise casting); {remedy}")


def require_no_gguf(modules: Iterable[nn.Module], problem: str) -> None:
    """Raise TDMError if weights are quantised as GGUF, which can only be computed with.

    Args:
        modules: the networks.
        problem: what cannot be done with such weights, and what to do instead.
    """
    for module in modules:
        if any(type(parameter).__name__ == "GGUFParameter" for parameter in module.parameters()):
            raise TDMError(f"{type(module).__name__} has GGUF weights, {problem}")


@contextmanager
def adapters_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The base weights alone, for the length of a `with`. What was on, and what was trainable, is so again afterwards.

    Raises:
        TDMError: adapters are fused into the weights.
    """
    modules = list(modules)
    require_unfused(modules)
    layers = [layer for module in modules for layer in tuner_layers(module) if not layer.disable_adapters]
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@contextmanager
def adapter_off(module: nn.Module, adapter: str) -> Iterator[Callable[[], None]]:
    """One adapter off and the others as they are, until what the `with` gives is called, or its end.

    The active adapters are set on the layers: peft's `set_adapter` would also say what is trainable.
    """
    before = [(layer, layer._active_adapter) for layer in tuner_layers(module) if adapter in layer.active_adapters]
    for layer, _ in before:
        layer._active_adapter = [other for other in layer.active_adapters if other != adapter]

    def on() -> None:
        while before:  # once: what is switched after that stays
            layer, active = before.pop()
            layer._active_adapter = active

    try:
        yield on
    finally:
        on()


@contextmanager
def adapters_hidden(module: nn.Module, adapter: str, *, merged: bool = False) -> Iterator[None]:
    """`module.state_dict()` as it was before peft attached its only adapter, for the length of a `with`.

    A text encoder would else save its adapter in the place of its weights. With `merged` the adapter's update is added
    to the weights of the state dict; the network itself stays as it is.
    """

    def hide(_module: nn.Module, state_dict: dict[str, Any], _prefix: str, _metadata: Any) -> None:
        for key in list(state_dict):
            tensor = state_dict.pop(key)
            if f".{adapter}." not in key:
                state_dict[key.replace(".base_layer.", ".")] = tensor
        if merged:
            for name, layer in lora_layers(module, adapter):
                state_dict[f"{name}.weight"] = _merged_weight(name, layer, adapter)

    hook = module.register_state_dict_post_hook(hide)
    flag, module._hf_peft_config_loaded = module._hf_peft_config_loaded, False  # type: ignore[assignment]
    try:
        yield
    finally:
        hook.remove()
        module._hf_peft_config_loaded = flag


def lora_of(module: nn.Module, adapter: str) -> dict[str, Lora]:
    """The LoRA of one adapter as it sits in a network, by layer; empty if it is not there.

    Raises:
        TDMError: its strength is not 1.0, or it is fused into the weights.
    """
    require_unfused([module])
    layers: dict[str, Lora] = {}
    for name, layer in lora_layers(module, adapter):
        if layer.scaling[adapter] != 1:
            raise TDMError(f"the {adapter} is set to strength {layer.scaling[adapter]}; set it back to 1.0 first")
        A, B = (_weight(half[adapter]) for half in (layer.lora_A, layer.lora_B))
        layers[name] = Lora(A, B)
    return layers


def lora_layers(module: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """The layers that have this LoRA, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            yield name, layer


@torch.no_grad()
def _merged_weight(name: str, layer: Any, adapter: str) -> Tensor:
    """A layer's weight with the adapter's update, summed in float32 and stored in the weight's own dtype.

    Raises:
        TDMError: the weight is quantised, or its dtype cannot hold the sum.
    """
    weight = layer.get_base_layer().weight
    if type(weight.data) is not Tensor or not weight.is_floating_point():
        raise TDMError(f"{name} is quantised; load the base without quantisation to merge a student into it")
    merged = (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise TDMError(f"{name} with the student is too large for {weight.dtype}; merge in another dtype")
    return merged


def _weight(layer: Any) -> Tensor:
    return layer.weight
