"""The weights of a base's networks: which files hold them, and loading that accepts nothing less than all of them.

diffusers and transformers fill a tensor that a file lacks with random numbers, or leave it without data, and say so in
a warning. A student of such a teacher is worthless, so here it is an error.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import TDMError, first_line

# Endings of the tensors that hold the scales of a quantised weight in ComfyUI's files.
SCALES = ("scale_weight", "weight_scale", "weight_scale_2", "scaled_fp8", "scale_input", "input_scale", "comfy_quant")
_INDEX = "model_index.json"
_LIBRARIES = ("diffusers", "transformers")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
# Arguments of diffusers' loader that decide how a network is read; with them the network is left to diffusers.
_OWN_WAYS = {"variant", "device_map", "quantization_config", "custom_pipeline", "use_safetensors", "low_cpu_mem_usage"}


def scale_among(names: Iterable[str]) -> str | None:
    """The first name that is the scale of a quantised weight, or None."""
    return next((name for name in names if name.rpartition(".")[2] in SCALES), None)


def refuse_scales(what: str, names: Iterable[str]) -> None:
    """Raise TDMError if tensors of these names need their scales to be read right."""
    if (name := scale_among(names)) is not None:
        raise TDMError(
            f"{what} is quantised ({name} is the scale of a weight), and is not read here; take the same model in bf16 "
            "or fp16"
        )


def variant_of(folder: str, component: str) -> str | None:
    """The variant of a component's files, such as "fp16", if a local folder has its weights in variants alone.

    Args:
        folder: of a base; a hub id has None.
        component: such as "unet".

    Raises:
        TDMError: there are several variants, and none is fp16.
    """
    variants = {variant for _, variant in _weights_in(Path(folder) / component)}
    if not variants or None in variants:
        return None
    if "fp16" not in variants and len(variants) > 1:
        names = ", ".join(sorted(filter(None, variants)))
        raise TDMError(f"{folder}/{component} has its weights as {names}; keep one of them")
    return "fp16" if "fp16" in variants else variants.pop()


def _weights_in(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files of weights in a component's folder, each with its variant."""
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".safetensors", ".bin"):
            continue
        stem, *more = path.name.removesuffix(path.suffix).split(".")
        # Of several files: model-00001-of-00002, model.fp16-00001-of-00002.
        if stem.partition("-0")[0] in _STEMS:
            yield path, more[0].partition("-0")[0] if more else None


def weight_files(folder: str | Path, component: str = "") -> list[Path]:
    """The files that a component's weights are read from: those of its `variant_of`, pickles only where there are no
    .safetensors.

    Args:
        folder: of a pipeline on this machine, or of the component itself.
        component: such as "unet"; "" for the folder of the component itself.

    Raises:
        TDMError: there are none, or several variants, and none is fp16.
    """
    variant = variant_of(str(folder), component)
    paths = [path for path, kind in _weights_in(Path(folder) / component) if kind == variant]
    if not paths:
        raise TDMError(f"{Path(folder) / component} has no weights")
    return [path for path in paths if path.suffix == ".safetensors"] or paths


class Weights(Mapping[str, Tensor]):
    """The tensors of files by name, each read when it is asked for, on the CPU in its own dtype.

    Args:
        files: .safetensors, or pickles, which are read with ``weights_only``.
        prefix: of the names to have; they are given without it.

    Raises:
        TDMError: a file cannot be read, two have a tensor of one name, or the weights are quantised with scales.
    """

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        self._prefix = prefix
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in files:
            with reading(str(path)):
                if path.suffix == ".safetensors":
                    content: Any = safe_open(path, "pt")
                else:
                    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            names = [name for name in content.keys() if name.startswith(prefix)]  # noqa: SIM118 (a file, not a dict)
            refuse_scales(str(path), names)
            for name in (name.removeprefix(prefix) for name in names):
                if name in self._files:
                    raise TDMError(f"{path} and {self._files[name][0]} both have {name}; remove one of the files")
                self._files[name] = path, content

    def __getitem__(self, name: str) -> Tensor:
        path, content = self._files[name]
        with reading(str(path)):
            full = self._prefix + name
            return content[full] if isinstance(content, dict) else content.get_tensor(full)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load_network(network_class: Any, folder: str, component: str, dtype: torch.dtype) -> Any:
    """A network of a base, with every one of its tensors from the files.

    Args:
        network_class: of diffusers or transformers.
        folder: of the base, or hub id.
        component: such as "unet".
        dtype: of the weights.

    Raises:
        TDMError: it cannot be read, a tensor is missing, or the weights are quantised with scales.
    """
    options: dict[str, Any] = {"variant": variant} if (variant := variant_of(folder, component)) else {}
    with reading(f"{component} of the base {folder}"):
        network, info = network_class.from_pretrained(
            folder, subfolder=component, dtype=dtype, output_loading_info=True, **options
        )
    missing, unexpected = sorted(info.get("missing_keys", ())), list(info.get("unexpected_keys", ()))
    refuse_scales(f"{component} of the base {folder}", unexpected)
    if missing:
        with_lora = any("base_layer" in name or "lora_" in name for name in unexpected)
        advice = (
            "it was saved with a LoRA attached; call unload_lora_weights() before save_pretrained()"
            if with_lora
            else "get the whole model again"
        )
        raise TDMError(
            f"{component} of the base {folder} lacks {len(missing)} of its tensors, such as {missing[0]}: {advice}"
        )
    return network


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library says of files that it cannot read into one line about ``what``.

    Raises:
        TDMError: they cannot be read.
    """
    try:
        yield
    except (torch.OutOfMemoryError, TDMError):
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise TDMError(f"cannot read {what}: {first_line(error)}") from None


def component_classes(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """(library, class name) of each component that a base's ``model_index.json`` names; the index has other lists, too,
    such as the layers that Krea 2 takes from its text encoder.
    """
    pairs = {name: tuple(entry) for name, entry in index.items() if isinstance(entry, list | tuple)}
    return {name: pair for name, pair in pairs.items() if len(pair) == 2 and all(isinstance(x, str) for x in pair)}


def network_classes(folder: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """The class of each network of diffusers or transformers that a base's ``model_index.json`` names."""
    classes = {}
    for name, (library, class_name) in component_classes(index).items():
        if library in _LIBRARIES and (Path(folder) / name).is_dir():
            component = getattr(importlib.import_module(library), class_name, None)
            if inspect.isclass(component) and issubclass(component, nn.Module):
                classes[name] = component
    return classes


def left_out(index: Mapping[str, Any]) -> dict[str, None]:
    """The components that a base was saved without, such as SD3's T5; diffusers needs them as None."""
    return {name: None for name, entry in index.items() if entry in ([None, None], (None, None))}


def require_tokenizers(folder: str, index: Mapping[str, Any]) -> None:
    """Raise TDMError if a local base lacks a tokenizer that its index names: transformers makes an empty one then."""
    for name in component_classes(index):
        if name.startswith("tokenizer") and Path(folder).is_dir() and not (Path(folder) / name).is_dir():
            raise TDMError(f"the base {folder} has no folder {name}; get the whole model again")


def components(folder: str, passed: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The networks of a base in a local folder, each whole, and None for those that it was saved without.

    Args:
        folder: of the base. A hub id gives {}: diffusers downloads and loads it.
        passed: what the caller passes to ``from_pretrained``; components among it are not loaded, and with an option
            that says how networks are read all are left to diffusers.
        dtype: of the weights.

    Raises:
        TDMError: as `load_network` and `require_tokenizers`.
    """
    file = Path(folder) / _INDEX
    if not file.is_file() or _OWN_WAYS & set(passed):
        return {}
    index = json.loads(file.read_text(encoding="utf-8"))
    require_tokenizers(folder, {name: entry for name, entry in index.items() if name not in passed})
    classes = {name: c for name, c in network_classes(folder, index).items() if name not in passed}
    absent = {name: None for name in left_out(index) if name not in passed}
    return {**absent, **{name: load_network(c, folder, name, dtype) for name, c in classes.items()}}


def check_files(folder: str) -> None:
    """What the names in a local base's files tell before anything is loaded.

    Raises:
        TDMError: a network has no weights there, was saved with a LoRA attached, or is quantised with scales.
    """
    file = Path(folder) / _INDEX
    if not file.is_file():
        return
    for component in network_classes(folder, json.loads(file.read_text(encoding="utf-8"))):
        variant_of(folder, component)
        paths = [path for path in (Path(folder) / component).glob("*") if path.suffix in (".safetensors", ".bin")]
        if not paths:
            raise TDMError(f"the base {folder} has no weights of {component}")
        for path in (path for path in paths if path.suffix == ".safetensors"):
            with reading(str(path)), safe_open(path, "pt") as weights:
                names = list(weights.keys())
            refuse_scales(str(path), names)
            if any(".base_layer." in name for name in names):
                raise TDMError(
                    f"{path} was saved with a LoRA attached; call unload_lora_weights() before save_pretrained()"
                )
