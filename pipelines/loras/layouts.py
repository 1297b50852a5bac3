"""LoRA files of any layout: their keys, read as (component, layer, half), and their scale.

A key is a prefix (which network), a name of a layer (see `layer_names.py`), and an ending (which half). Prefixes and
endings are tables here; what a name stands for in a network is looked up in `places.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import PartialLoraError, TDMError
from .eight_bits import widened
from .file import ADAPTER_METADATA, LoraFile
from .pairs import Lora, pair


class Address(NamedTuple):
    """A layer as a file names it; the component is None where the file means the denoiser, whatever that is called."""

    component: str | None
    name: str


@dataclass(frozen=True)
class NamedLoras:
    """The LoRA tensors of a file, understood as far as that goes without the network they are for.

    Attributes:
        layout: what the file's keys look like, for humans.
        layers: the LoRA of each layer, with alpha / rank multiplied into B.
        scales: the alpha / rank that was multiplied in.
        left_out: keys of what is no part of the LoRA.
    """

    layout: str
    layers: dict[Address, Lora]
    scales: dict[Address, float]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Positional:
    """What an EMA list without names is laid on: peft's parameters of these layers, of this rank and scale.

    Attributes:
        targets: ends of layer names, as peft's `target_modules`.
        rank: of every layer.
        scale: alpha / rank of the training.
    """

    targets: tuple[str, ...]
    rank: int
    scale: float


_PREFIXES: tuple[tuple[str, str | None, str], ...] = (  # (prefix, component, layout); the first that fits counts
    ("unet.", "unet", "diffusers (unet.)"),
    ("transformer.", "transformer", "diffusers (transformer.)"),
    ("text_encoder.", "text_encoder", "diffusers (text_encoder.)"),
    ("text_encoder_2.", "text_encoder_2", "diffusers (text_encoder_2.)"),
    ("text_encoder_3.", "text_encoder_3", "diffusers (text_encoder_3.)"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "ComfyUI (text_encoders.clip_l.)"),
    ("text_encoders.clip_l.", "text_encoder", "ComfyUI (text_encoders.clip_l.)"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "ComfyUI (text_encoders.clip_g.)"),
    ("text_encoders.clip_g.", "text_encoder_2", "ComfyUI (text_encoders.clip_g.)"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", "ComfyUI (text_encoders.t5xxl.)"),
    ("text_encoders.t5xxl.", "text_encoder_3", "ComfyUI (text_encoders.t5xxl.)"),
    ("model.diffusion_model.", None, "native (model.diffusion_model.)"),
    ("diffusion_model.", None, "native (diffusion_model.)"),
    ("lora_unet__", None, "kohya (lora_unet__)"),
    ("lora_unet_", None, "kohya (lora_unet_)"),
    ("lora_transformer_", None, "kohya (lora_transformer_)"),
    ("lora_te_", "text_encoder", "kohya (lora_te_)"),
    ("lora_te1_", "text_encoder", "kohya (lora_te1_)"),
    ("lora_te2_", "text_encoder_2", "kohya (lora_te2_)"),
    ("lora_te3_", "text_encoder_3", "kohya (lora_te3_)"),
    ("lycoris_", None, "LyCORIS (lycoris_)"),
    ("", None, "no prefix"),
)
_PEFT = "base_model.model."
_ENDINGS = tuple(
    (re.compile(pattern), layout)
    for pattern, layout in (
        (r"(?P<layer>.+)\.lora_(?P<half>A|B)\.weight", "lora_A / lora_B"),
        (r"(?P<layer>.+)\.lora_(?P<half>down|up)\.weight", "lora_down / lora_up"),
        (r"(?P<layer>.+)\.lora_(?P<half>A|B|down|up)\.[^/]+\.weight", "lora_A / lora_B with an adapter's name"),
        (r"(?P<layer>.+)\.lora(_linear_layer)?\.(?P<half>down|up)\.weight", "lora.down / lora.up"),
        (
            r"(?P<layer>.+?)(\.processor)?\.(?P<part>to_[qkv]|to_out|add_[kv]_proj)_lora\.(?P<half>down|up)\.weight",
            "legacy attention processors",
        ),
        (r"(?P<layer>.+\.processor\.(qkv|proj)_lora[12]?)\.(?P<half>down|up)\.weight", "XLabs processors"),
    )
)
_HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.oft_|\.boft_": "OFT",
    r"\.lora_mid\.": "a LoRA with a middle (Tucker) tensor",
}
_ADDITIONS = {  # they stand alone: without them the LoRA is what it was
    r"\.lora_.*bias$|\.diff_b$": "a change of biases",
    r"\.diff$|\.diff_m$|\.set_weight$": "a change of whole weights",
}
_EMBEDDINGS = re.compile(r"bundle_emb\..+")


def parse(file: LoraFile, *, strict: bool = True) -> NamedLoras:
    """The LoRA of each layer that a file names. Alpha comes from `.alpha` tensors, or from peft's settings in the
    header, or else is the rank. Embeddings of a textual inversion in the same file are left out.

    Args:
        file: from `read_lora_file`.
        strict: False: changes of biases and whole weights in the file are left out as well.

    Raises:
        TDMError: the file has no names; keys that are no LoRA's or another adapter's (DoRA, LoKr); half a layer, a half
            given twice, halves that do not fit; NaN; no LoRA at all.
        PartialLoraError: with `strict`, changes of biases or whole weights that are not 0.
    """
    if file.positional is not None:
        raise TDMError(
            f"{file.path} is a list of {len(file.positional)} tensors without names: only a preset knows their order"
        )
    halves: dict[Address, dict[str, Tensor]] = {}
    alphas: dict[Address, float] = {}
    layouts: set[str] = set()
    others: dict[str, Tensor] = {}
    for key, tensor in widened(file.tensors).items():
        if key.endswith(".alpha"):
            alphas[_address(key.removesuffix(".alpha"))[0]] = _alpha(key, tensor)
            continue
        match, ending = next(((m, label) for pattern, label in _ENDINGS if (m := pattern.fullmatch(key))), (None, ""))
        if match is None:
            others[key] = tensor
            continue
        address, prefix = _address(match["layer"], match.groupdict().get("part"))
        half = _HALVES[match["half"]]
        if half in halves.setdefault(address, {}):
            raise TDMError(f"{key!r}: the file gives this half of the layer twice; does it hold two adapters?")
        halves[address][half] = tensor
        layouts.add(f"{prefix}, {ending}")
    left_out = _left_out(others, len(halves), strict)
    if orphans := sorted(address.name for address in alphas.keys() - halves.keys()):
        raise TDMError(f"layer {orphans[0]!r} has an alpha without a LoRA")
    loras = {address: pair(".".join(filter(None, address)), half) for address, half in halves.items()}
    settings = _peft_settings(file.metadata)
    scales = {
        address: alphas[address] / lora.rank if address in alphas else _scale_of(settings, address, lora.rank)
        for address, lora in loras.items()
    }
    layers = {address: lora.scaled(scales[address]) for address, lora in loras.items()}
    return NamedLoras(" + ".join(sorted(layouts)), layers, scales, tuple(left_out))


def _address(text: str, part: str | None = None) -> tuple[Address, str]:
    """(the layer that the front of a key names, the layout of its prefix); `part` is a projection of that layer."""
    bare = text.removeprefix(_PEFT)
    prefix, component, layout = next(row for row in _PREFIXES if bare.startswith(row[0]))
    name = bare.removeprefix(prefix).removeprefix(_PEFT)
    if part is not None:
        clip = component in ("text_encoder", "text_encoder_2")
        ends = {"to_out": "out_proj" if clip else "to_out.0"}
        name = f"{name}.{ends.get(part, part.replace('to_', '') + '_proj' if clip else part)}"
    if _PEFT not in text:
        return Address(component, name), layout
    return Address(component, name), "raw PEFT (base_model.model.)" + (f" around {layout}" if prefix else "")


def _alpha(key: str, tensor: Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 else math.nan
    if not math.isfinite(alpha):
        raise TDMError(f"{key!r} is not one finite number")
    return alpha


def _left_out(others: Mapping[str, Tensor], layers: int, strict: bool) -> list[str]:
    """Which of the keys that are no half of a LoRA may be left out. Changes by 0 need no mention.

    Raises:
        TDMError: one may not, or there is no LoRA.
        PartialLoraError: one may only without `strict`.
    """
    for key in others:
        for pattern, kind in _OTHER_KINDS.items():
            if re.search(pattern, key):
                raise TDMError(f"{key!r}: this is {kind}, which is not supported; merge it into a plain LoRA first")
    if not layers:
        first = next(iter(others), "")
        what = f" among its {len(others)} tensors, such as {first!r}; is it a whole model?" if others else ""
        raise TDMError(f"there are no LoRA tensors{what}")
    left_out = []
    for key, tensor in others.items():
        addition = next((addition for pattern, addition in _ADDITIONS.items() if re.search(pattern, key)), None)
        if addition is None and not _EMBEDDINGS.fullmatch(key):
            raise TDMError(f"{key!r} is not the key of a LoRA ({len(others)} such keys next to {layers} LoRA layers)")
        if addition is None or (tensor.any() and not strict):
            left_out.append(key)
        elif tensor.any():
            raise PartialLoraError(f"{key!r}: this is {addition} next to the LoRA, which is not supported")
    return left_out


def _peft_settings(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        settings = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
    except ValueError as error:
        raise TDMError(f"the header entry {ADAPTER_METADATA!r} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise TDMError(f"the header entry {ADAPTER_METADATA!r} is not a JSON object")
    return settings


def _scale_of(settings: Mapping[str, Any], address: Address, rank: int) -> float:
    """alpha / rank by peft's settings, whose keys have the component as prefix where the layers have it."""
    front = f"{address.component}." if address.component else ""
    network_settings = {key.removeprefix(front): value for key, value in settings.items() if key.startswith(front)}
    if network_settings.get("use_dora"):
        raise TDMError("this is DoRA, which is not supported; merge it into a plain LoRA first")
    patterns = (network_settings.get("alpha_pattern") or {}).items()
    alphas = (value for pattern, value in patterns if re.fullmatch(rf"(.*\.)?({pattern})", address.name))
    alpha = next(alphas, network_settings.get("lora_alpha"))
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if network_settings.get("use_rslora") else rank)
