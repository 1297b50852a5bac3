"""Pictures that are expensive to draw and always the same: kept on disk, so that only the first run waits for them.

A cache is one folder with one file for each thing that was drawn, named by a hash of all that the pictures depend on:
another base, guidance or seed is another file. The whole of it is in the file's header, too, and is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import replacing

FORMAT = 1


class Drawn(NamedTuple):
    """uint8 pictures, and the seconds that drawing them took at the time."""

    pictures: Tensor
    seconds: float


def cached(root: Path, identity: Mapping[str, Any], draw: Callable[[], Tensor]) -> Drawn:
    """What ``draw`` gives, drawn only if ``root`` does not have it; a file that is damaged or not ours is replaced.

    Processes that miss the same pictures at the same time all draw them; the file is whole at any moment.

    Args:
        root: folder of the cache; it is made.
        identity: all that the pictures depend on, as JSON.
        draw: gives a uint8 tensor of any shape on the CPU.

    Raises:
        TDMError: the file cannot be written.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    path = root / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if (found := _read(path, text)) is not None:
        return found
    begun = time.perf_counter()
    pictures = draw().contiguous()
    if pictures.dtype != torch.uint8:
        raise ValueError(f"pictures must be uint8, not {pictures.dtype}")
    seconds = time.perf_counter() - begun
    header = {"identity": text, "sha256": _sha256(pictures), "seconds": repr(seconds)}
    with replacing(path, shared=True) as file:
        file.write(save({"pictures": pictures}, header))
    return Drawn(pictures, seconds)


def cached_pictures(root: Path, identity: Mapping[str, Any], draw: Callable[[], Tensor]) -> Tensor:
    """The pictures of :func:`cached`."""
    return cached(root, identity, draw).pictures


def _read(path: Path, identity: str) -> Drawn | None:
    """The pictures of a file that is whole and of this identity."""
    with contextlib.suppress(OSError, ValueError, SafetensorError), safe_open(path, "pt") as file:
        header = file.metadata() or {}
        pictures = file.get_tensor("pictures")
        if header.get("identity") == identity and header.get("sha256") == _sha256(pictures):
            return Drawn(pictures, float(header["seconds"]))
    return None


def _sha256(pictures: Tensor) -> str:
    return hashlib.sha256(pictures.numpy().tobytes()).hexdigest()
