"""LoRA files of every layout for the tiny pipelines, and the merge by hand that they must equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.layer_names import layer_shapes, names_of, swapped
from tdm.pipelines.loras.pairs import pair_layers
from tdm.tests import tiny
from tdm.tests.pipelines.students import lora_for
from torch import Tensor, nn

RANK, ALPHA = 2, 3.0


class Update(NamedTuple):
    """One LoRA of a file: what it is called there, and our layers whose rows it updates."""

    component: str
    name: str
    layers: tuple[str, ...]
    A: Tensor
    B: Tensor


def updates(pipe: DiffusionPipeline, component: str, names: dict[str, tuple[str, ...]], seed: int = 0) -> list[Update]:
    """Random LoRAs for these names of a network."""
    generator = torch.Generator().manual_seed(seed)
    shapes = layer_shapes(getattr(pipe, component))
    loras = []
    for name, layers in names.items():
        first, rows = shapes[layers[0]], sum(shapes[layer].outputs for layer in layers)
        A = torch.randn(RANK, first.inputs, *first.kernel, generator=generator) * 0.1
        B = torch.randn(rows, RANK, *[1] * len(first.kernel), generator=generator) * 0.1
        loras.append(Update(component, name, layers, A, B))
    return loras


def diffusers_names(network: nn.Module, _family: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in layer_shapes(network)}


def native_names(network: nn.Module, family: str) -> dict[str, tuple[str, ...]]:
    """Return one native name for each layer that has one. Of two it is the name in the first original code."""
    known, left = layer_shapes(network).keys(), set(layer_shapes(network))
    natives = {}
    for name, layers in names_of(network, family).items():
        if "." in name and ".processor." not in name and name not in known and left.issuperset(layers):
            natives[name] = layers
            left -= set(layers)
    return natives


def attention_names(network: nn.Module, _family: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in layer_shapes(network) if ".attn" in name}


class Layout(NamedTuple):
    """How one layout writes an update: the names it uses, its keys, and the scale it states."""

    names: Callable[[nn.Module, str], dict[str, tuple[str, ...]]]
    key: Callable[[Update], str]  # with {} for the half
    halves: tuple[str, str]
    alpha: Callable[[Update], str] | None = None
    text_encoders: bool = False


def kohya(update: Update) -> str:
    numbers = {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"}
    t5 = update.component.startswith("text_encoder") and ".block." in f".{update.name}"
    if t5:  # the third one for kohya, of Flux, too
        numbers["text_encoder_2"] = "te3"
    prefix = f"lora_{numbers.get(update.component, 'unet')}"
    name = update.name
    if "te" in prefix and not t5 and not name.startswith("text_model."):
        name = f"text_model.{name}"  # as all files have it
    return f"{prefix}_{name.replace('.', '_')}"


def dotted(update: Update) -> str:
    return f"{update.component}.{update.name}"


def legacy(update: Update) -> str:
    layer, _, part = update.name.removesuffix(".0").rpartition(".")
    return f"{update.component}.{layer}.processor.{part}_lora.{{}}.weight"


LAYOUTS = {
    "diffusers": Layout(diffusers_names, lambda u: f"{dotted(u)}.lora_{{}}.weight", ("A", "B"), text_encoders=True),
    "diffusers lora.down": Layout(diffusers_names, lambda u: f"{dotted(u)}.lora.{{}}.weight", ("down", "up")),
    "legacy processors": Layout(attention_names, legacy, ("down", "up")),
    "no prefix": Layout(diffusers_names, lambda u: f"{u.name}.lora_{{}}.weight", ("A", "B")),
    "raw peft": Layout(diffusers_names, lambda u: f"base_model.model.{u.name}.lora_{{}}.weight", ("A", "B")),
    "adapter name": Layout(
        diffusers_names, lambda u: f"base_model.model.{u.name}.lora_{{}}.default.weight", ("A", "B")
    ),
    "kohya": Layout(
        diffusers_names, lambda u: f"{kohya(u)}.lora_{{}}.weight", ("down", "up"), lambda u: f"{kohya(u)}.alpha", True
    ),
    "kohya native": Layout(
        native_names, lambda u: f"{kohya(u)}.lora_{{}}.weight", ("down", "up"), lambda u: f"{kohya(u)}.alpha"
    ),
    "native": Layout(native_names, lambda u: f"diffusion_model.{u.name}.lora_{{}}.weight", ("A", "B")),
    "adapter name with a dash": Layout(
        diffusers_names, lambda u: f"{dotted(u)}.lora_{{}}.my-lora.v1.0.weight", ("A", "B"), text_encoders=True
    ),
    "peft in a component": Layout(
        diffusers_names,
        lambda u: f"{u.component}.base_model.model.{u.name}.lora_{{}}.weight",
        ("A", "B"),
        text_encoders=True,
    ),
    "lycoris": Layout(
        diffusers_names,
        lambda u: f"lycoris_{u.name.replace('.', '_')}.lora_{{}}.weight",
        ("down", "up"),
        lambda u: f"lycoris_{u.name.replace('.', '_')}.alpha",
    ),
    "kohya half in dots": Layout(
        diffusers_names, lambda u: f"lora_unet_{u.name.replace('.', '_', 1)}.lora_{{}}.weight", ("down", "up")
    ),
    "kohya native with two underscores": Layout(
        native_names, lambda u: f"lora_unet__{u.name.replace('.', '_')}.lora_{{}}.weight", ("down", "up")
    ),
    "native with alpha": Layout(
        native_names,
        lambda u: f"diffusion_model.{u.name}.lora_{{}}.weight",
        ("down", "up"),
        lambda u: f"diffusion_model.{u.name}.alpha",
    ),
}
_UNET_ONLY = {"legacy processors"}
_NO_NATIVE = {"qwenimage"}  # its own names are the native ones


def layouts_of(family: str) -> list[str]:
    unet = family_of_name(family).denoiser == "unet"
    return [
        name
        for name, layout in LAYOUTS.items()
        if (unet or name not in _UNET_ONLY) and not (family in _NO_NATIVE and layout.names is native_names)
    ]


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write the tensors into the container that the suffix of the path names."""
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata)
    elif path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 3}, path)
    else:
        torch.save(tensors, path)
    return path


def tensors_of(layout: Layout, loras: list[Update]) -> dict[str, Tensor]:
    tensors = {}
    for update in loras:
        key = layout.key(update)
        tensors[key.format(layout.halves[0])] = update.A
        tensors[key.format(layout.halves[1])] = update.B
        if layout.alpha is not None:
            tensors[layout.alpha(update)] = torch.tensor(ALPHA)
    return tensors


def merge(pipe: Any, loras: list[Update], scale: float) -> None:
    """Add the updates to the weights of a pipeline without adapters, in float64."""
    for update in loras:
        network, row = getattr(pipe, update.component), 0
        for layer in update.layers:
            weight = network.get_submodule(layer).weight
            rows = update.B[row : row + weight.shape[0]].double().flatten(1)
            if layer in swapped(network) and update.name != layer:  # shift, scale: ours are scale, shift
                rows = rows.roll(len(rows) // 2, 0)
            weight.data = (
                weight.double() + scale * (rows @ update.A.double().flatten(1)).reshape(weight.shape)
            ).float()
            row += weight.shape[0]


def sd15_lora(scale: float = 1.0, key: str = "unet.{}.lora_{}.weight") -> dict[str, Tensor]:
    """A LoRA of the tiny SD1.5 under these keys."""
    layers = pair_layers(lora_for(tiny.build("sd15").unet))
    return {
        key.format(layer, half): tensor * (scale if half == "B" else 1)
        for layer, lora in layers.items()
        for half, tensor in lora._asdict().items()
    }
