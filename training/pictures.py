"""Pictures that are expensive to draw and always the same: kept on disk, so that only the first run waits for them.

A cache is one folder with one file for each thing that was drawn, named by a hash of all that the pictures depend on:
another base, guidance or seed is another file. The whole of it is in the file's header, too, and is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import replacing

FORMAT = 1


class Drawn(NamedTuple):
    """uint8 pictures of any shape on the CPU, and facts of their drawing, such as the seconds that it took."""

    pictures: Tensor
    facts: dict[str, float]


def cached(root: Path, identity: Mapping[str, Any], draw: Callable[[], Drawn]) -> Drawn:
    """What ``draw`` gives, drawn only if ``root`` does not have it; a file that is damaged or not ours is replaced.

    Processes that miss the same pictures at the same time all draw them; the file is whole at any moment.

    Args:
        root: folder of the cache; it is made.
        identity: all that the pictures depend on, as JSON.
        draw: what to do without them; the facts are kept with the pictures.

    Raises:
        TDMError: the file cannot be written.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    path = root / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if (kept := _read(path, text)) is not None:
        return kept
    drawn = draw()
    pictures = drawn.pictures.contiguous()
    if pictures.dtype != torch.uint8:
        raise ValueError(f"pictures must be uint8, not {pictures.dtype}")
    header = {"identity": text, "sha256": _sha256(pictures), "facts": json.dumps(drawn.facts)}
    with replacing(path, shared=True) as file:
        file.write(save({"pictures": pictures}, header))
    return drawn


def cached_pictures(root: Path, identity: Mapping[str, Any], draw: Callable[[], Tensor]) -> Tensor:
    """:func:`cached` of pictures alone."""
    return cached(root, identity, lambda: Drawn(draw(), {})).pictures


def _read(path: Path, identity: str) -> Drawn | None:
    """The pictures of a file that is whole and of this identity."""
    with contextlib.suppress(OSError, ValueError, SafetensorError), safe_open(path, "pt") as file:
        header = file.metadata() or {}
        pictures = file.get_tensor("pictures")
        if header.get("identity") == identity and header.get("sha256") == _sha256(pictures):
            return Drawn(pictures, json.loads(header["facts"]))
    return None


def _sha256(pictures: Tensor) -> str:
    return hashlib.sha256(pictures.numpy().tobytes()).hexdigest()
