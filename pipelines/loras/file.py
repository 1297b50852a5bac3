"""The containers that LoRA tensors come in: safetensors or a pickle, told apart by content, never by suffix."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import TDMError, first_line

ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings in a safetensors header
_POSITIONAL = ("ema_parameters", "shadow_params")
_TEXTS = {  # what a download leaves in the place of a file
    rb"version https://git-lfs": "a Git LFS pointer, and not the file that it points to; fetch that with: git lfs pull",
    rb"<!doctype html|<html": "an HTML page, and not the file; download it by its own link, signed in if need be",
    rb"<\?xml": "an XML answer of a server, and not the file; download it again",
}


@dataclass(frozen=True)
class LoraFile:
    """What is in a file, before its keys are understood.

    Attributes:
        path: where it was read.
        container: "safetensors" or "pickle".
        tensors: by key, on the CPU; empty if they have no names.
        positional: the tensors of an EMA list, which has an order instead of names; else None.
        metadata: the safetensors header, or peft's `adapter_config.json` next to the file in the same form.
    """

    path: Path
    container: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    positional: list[Tensor] | None = None
    metadata: dict[str, str] = field(default_factory=dict)


def read_lora_file(path: str | os.PathLike[str]) -> LoraFile:
    """Read a LoRA file of any container: `.safetensors`, or `.pt`, `.bin`, `.ckpt` without code in it.

    A pickle is read with torch's `weights_only`, which runs no code. ``{"state_dict": ...}`` is unwrapped.

    Raises:
        TDMError: no such file, a folder, truncated, neither container, or a pickle that holds more than plain data.
    """
    path = Path(path)
    if not _is_pickle(path):
        with open_safetensors(path) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
            return LoraFile(path, "safetensors", tensors, metadata={**_sibling_config(path), **(file.metadata() or {})})
    content = _load_pickle(path)
    if isinstance(content, Mapping):
        content = next((content[name] for name in ("state_dict", *_POSITIONAL) if name in content), content)
    if isinstance(content, list | tuple) and content and all(isinstance(item, Tensor) for item in content):
        return LoraFile(path, "pickle", positional=list(content))
    if not isinstance(content, Mapping):
        raise TDMError(f"{path} holds a {type(content).__name__}, not LoRA tensors by name")
    return LoraFile(path, "pickle", _tensors_of(content), metadata=_sibling_config(path))


def open_safetensors(path: str | os.PathLike[str]) -> Any:
    """`safe_open` on the CPU with one-line errors.

    Raises:
        TDMError: no such file, a folder, a pickle, truncated, or not a safetensors file.
    """
    if _is_pickle(Path(path)):
        raise TDMError(f"{path} is a pickle (.pt, .ckpt, .bin), not a .safetensors file; convert it: tdm convert")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise TDMError(f"{path} is truncated or not a .safetensors file: {error}") from None


def _is_pickle(path: Path) -> bool:
    if path.is_dir():
        raise TDMError(f"{path} is a folder; pass the LoRA file in it")
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise TDMError(f"cannot read {path}: {error.strerror}") from None
    for mark, what in _TEXTS.items():
        if re.match(mark, start.removeprefix(b"\xef\xbb\xbf").lstrip(), re.IGNORECASE):
            raise TDMError(f"{path} is {what}")
    # A safetensors file begins with its header's length, in 8 bytes that may look like a pickle, and a brace.
    return start.startswith((b"PK\x03\x04", b"\x80")) and start[5:9] != b"\0\0\0{"


def _load_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:  # not the path: torch goes by its suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {match[1]}, not only tensors," if match else "it holds more than tensors,"
        raise TDMError(f"{path} is refused: {what} and loading that could run code; use a .safetensors file") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise TDMError(f"{path} is truncated or damaged: {first_line(error)}") from None


def _tensors_of(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The named tensors; an alpha may be a plain number there, and other numbers and texts are not for us."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value
        elif isinstance(value, int | float) and str(key).endswith(".alpha"):
            tensors[str(key)] = torch.tensor(float(value))
    return tensors


def _sibling_config(path: Path) -> dict[str, str]:
    """peft writes its settings, alpha among them, not into `adapter_model.*` but next to it."""
    config = path.with_name("adapter_config.json")
    if path.stem != "adapter_model" or not config.is_file():
        return {}
    try:
        return {ADAPTER_METADATA: json.dumps(json.loads(config.read_bytes()))}
    except ValueError as error:
        raise TDMError(f"{config} is not valid JSON: {error}") from None
