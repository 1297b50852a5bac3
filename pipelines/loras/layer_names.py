"""Every name under which a LoRA file may address a layer of a network.

A layer has its own name (diffusers), the name in the original checkpoint of its family (native), and either with
underscores for dots (kohya). A native layer can be several of ours, stacked: its rows are theirs, in a fixed order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from diffusers.models.normalization import AdaLayerNormContinuous
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .native_names import NATIVE
from .pairs import LayerShape

Names = dict[str, tuple[str, ...]]
Meaning = TypeVar("Meaning")


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

    A name that could mean two things is left out. The halves of some native layers are `swapped`.

    Args:
        network: a denoiser of that family, or a text encoder of any.
        family: a name of `families`.
    """
    layers = list(layer_shapes(network))
    meanings: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in layers]
    if hasattr(network, "down_blocks"):
        meanings += _sgm_names(network, layers)
    elif is_clip(layers):
        meanings += [(other_clip_name(name), (name,)) for name in layers]
    else:
        meanings += native_names(family, layers)
    return unambiguous(meanings)


def unambiguous(meanings: Iterable[tuple[str, Meaning]]) -> dict[str, Meaning]:
    """What each of these names means, with dots or underscores; those that mean two things are left out."""
    meanings = list(meanings)
    names: dict[str, Meaning] = {}
    ambiguous = set()
    for name, meaning in [*meanings, *((name.replace(".", "_"), meaning) for name, meaning in meanings)]:
        if names.setdefault(name, meaning) != meaning:
            ambiguous.add(name)
    return {name: meaning for name, meaning in names.items() if name not in ambiguous}


def look_up(names: Mapping[str, Meaning], name: str) -> Meaning | None:
    """What a name stands for, even if it mixes dots and underscores; None if it is unknown."""
    return names[name] if name in names else names.get(name.replace(".", "_"))


def component_of(address: tuple[str | None, str], denoiser: str, names: Mapping[str, Mapping[str, Any]]) -> str:
    """The component that a file's (component or None, layer name) is for.

    T5 is the third text encoder for kohya and ComfyUI, also of a model that has only two.

    Args:
        address: as the file has it; None is the denoiser.
        denoiser: the component.
        names: of each component, from `names_of`.
    """
    component, name = address
    if component != "text_encoder_3" or component in names:
        return component or denoiser
    encoders = (encoder for encoder in names if encoder.startswith("text_encoder"))
    return next((encoder for encoder in encoders if look_up(names[encoder], name) is not None), component)


def is_clip(names: Iterable[str]) -> bool:
    """Whether these are the layers of a CLIP text encoder."""
    return any(name.startswith(("encoder.layers.", "text_model.")) for name in names)


def other_clip_name(name: str) -> str:
    """CLIPTextModel dropped the `text_model.` of its names in transformers 5; files have either."""
    return name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"


def swapped(network: nn.Module) -> set[str]:
    """The last modulations (SD3, Flux), whose halves, scale and shift, are the other way round in native layers."""
    return {f"{name}.linear" for name, module in network.named_modules() if isinstance(module, AdaLayerNormContinuous)}


def native_names(family: str, known_layers: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(native name, our layers in the order of its rows) by the family's table, for these layers."""
    known = set(known_layers)
    for native, ours in NATIVE.get(family, {}).items():
        patterns = ours.split()
        for numbers in _matches(patterns[0], known):
            layers = tuple(_numbered(pattern, numbers) for pattern in patterns)
            if known.issuperset(layers):
                yield _numbered(native, numbers), layers


def _matches(pattern: str, names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The numbers that `*` stands for, of each name that fits the pattern."""
    expression = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    return (match.groups() for match in map(expression.fullmatch, names) if match)


def _numbered(pattern: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def layers_of_native(shapes: Mapping[str, LayerShape], family: str) -> Names:
    """The inverse of `names_of`: each layer of a network in its original code -> our layers, in the order of its rows.

    Layers that are called alike are left out.

    Args:
        shapes: of the original network, from `layer_shapes`.
        family: a name of `families`.
    """
    if "input_blocks.0.0" in shapes:
        return dict(_layers_of_sgm(list(shapes)))
    return {
        _numbered(pattern, numbers): tuple(_numbered(part, numbers) for part in ours.split())
        for pattern, ours in NATIVE.get(family, {}).items()
        for numbers in _matches(pattern, shapes)
    }


class _SgmBlock(NamedTuple):
    """A block of the UNet as diffusers counts them: how many layers, and whether they attend and it resamples."""

    layers: int
    attends: bool
    resamples: bool


def _sgm_names(unet: Any, layers: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The names of the original Stable Diffusion UNet (SD1.5, SDXL)."""
    down = [_SgmBlock(len(b.resnets), hasattr(b, "attentions"), bool(b.downsamplers)) for b in unet.down_blocks]
    up = [_SgmBlock(len(b.resnets), hasattr(b, "attentions"), bool(b.upsamplers)) for b in unet.up_blocks]
    stems = _sgm_stems(down, up)
    for name in layers:
        if (match := _by_stem(name, stems)) is not None:
            stem, rest = match
            yield _joined(stem, _SGM_RESNET.get(rest, rest) if ".resnets." in name else rest), (name,)


def _layers_of_sgm(names: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our name of each layer of the original UNet."""
    stems = {native: ours for ours, native in _sgm_stems(*_sgm_blocks(set(names))).items()}
    resnet = {native: ours for ours, native in _SGM_RESNET.items()}
    for name in names:
        if (match := _by_stem(name, stems)) is not None:
            stem, rest = match
            yield name, (_joined(stem, resnet.get(rest, rest) if ".resnets." in stem else rest),)


def _joined(*segments: str) -> str:
    return ".".join(filter(None, segments))


def _by_stem(name: str, stems: Mapping[str, str]) -> tuple[str, str] | None:
    """(what the longest front of a name that is in the table stands for, the rest of the name)."""
    segments = name.split(".")
    fronts = (".".join(segments[:cut]) for cut in range(len(segments), 0, -1))
    front = next((front for front in fronts if front in stems), None)
    return None if front is None else (stems[front], name[len(front) + 1 :])


def _sgm_stems(down: Iterable[_SgmBlock], up: Iterable[_SgmBlock]) -> dict[str, str]:
    """The fronts of our names -> those of the original's, whose blocks are counted through."""
    stems = dict(_SGM_STEMS)
    number = 1  # input block 0 is conv_in
    for i, block in enumerate(down):
        for j in range(block.layers):
            stems[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            if block.attends:
                stems[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.resamples:
            stems[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(up):
        for j in range(block.layers):
            stems[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            if block.attends:
                stems[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        if block.resamples:  # it closes the block's last layer
            stems[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{number - 1}.{2 if block.attends else 1}"
    return stems


def _sgm_blocks(names: set[str]) -> tuple[list[_SgmBlock], list[_SgmBlock]]:
    """The (down, up) blocks of an original UNet with these layers: what resamples ends a block."""
    down, up = [_SgmBlock(0, False, False)], [_SgmBlock(0, False, False)]
    for n in range(1, _count(names, "input_blocks")):
        last = down[-1]
        if f"input_blocks.{n}.0.op" in names:
            down[-1:] = [last._replace(resamples=True), _SgmBlock(0, False, False)]
        else:
            down[-1] = _SgmBlock(last.layers + 1, last.attends or f"input_blocks.{n}.1.proj_in" in names, False)
    for n in range(_count(names, "output_blocks")):
        last = up[-1]
        up[-1] = _SgmBlock(last.layers + 1, last.attends or f"output_blocks.{n}.1.proj_in" in names, False)
        if names & {f"output_blocks.{n}.1.conv", f"output_blocks.{n}.2.conv"}:
            up[-1:] = [up[-1]._replace(resamples=True), _SgmBlock(0, False, False)]
    return down, up


def _count(names: set[str], blocks: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in names if name.startswith(f"{blocks}."))


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
