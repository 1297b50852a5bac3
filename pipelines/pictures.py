"""Pictures as users have them, for image to image: of any mode, rank and dtype that says what its range is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import load_image
from torch import Tensor

from ..errors import TDMError, first_line

Picture = PIL.Image.Image | Tensor
_RANGES = {torch.uint16: 65535, torch.bool: 1}
_ROUNDING = 1e-2  # what halves and resizing may leave beyond the range
_CHANNELS = (1, 2, 3, 4)  # grey and RGB, each without or with alpha


def pictures_of(image: Any) -> list[Picture]:
    """Pictures as RGB: PIL images, or float32 tensors [1, 3, H, W] in [0, 1].

    Alpha is left out, as diffusers' `load_image` does.

    Args:
        image: one picture, a batch, or a list of them. PIL images of any mode but those without a range ("I", "F");
            paths and URLs; arrays [H, W], [H, W, C] or [B, H, W, C] and tensors [H, W], [C, H, W] or [B, C, H, W] with
            1 to 4 channels, which may be on the other side if that is plain. Whole numbers are uint8 or uint16; floats
            are in [0, 1], or in [-1, 1] if one is below 0.

    Raises:
        TDMError: none, or one that is no picture, cannot be read, or has numbers of another range.
    """
    images = list(image) if isinstance(image, list | tuple) else [image]
    pictures = [picture for one in images for picture in _pictures_of(one)]
    if not pictures:
        raise TDMError("image to image needs a picture")
    return pictures


def _pictures_of(image: Any) -> Sequence[Picture]:
    if isinstance(image, str | os.PathLike):
        image = _loaded(os.fspath(image))
    if isinstance(image, PIL.Image.Image):
        return [_rgb(image)]
    if isinstance(image, np.ndarray):
        return _from_numbers(_tensor(image), channels_last=True)
    if isinstance(image, Tensor):
        return _from_numbers(image, channels_last=False)
    raise TDMError(f"a {type(image).__name__} is no picture; give PIL images, arrays, tensors or paths")


def _loaded(path: str) -> PIL.Image.Image:
    try:
        return load_image(path, convert_method=lambda image: image)  # its own would cut 16 bits
    except (OSError, ValueError) as error:
        raise TDMError(f"cannot read the picture {path}: {first_line(error)}") from None


def _rgb(image: PIL.Image.Image) -> Picture:
    if image.mode.startswith("I;16"):
        return _from_numbers(_tensor(np.asarray(image).astype("uint16")), channels_last=True)[0]
    if image.mode in ("I", "F"):
        raise TDMError(f"a PIL image of mode {image.mode!r} does not say its range; give an array of floats in [0, 1]")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise TDMError(f"a PIL image of mode {image.mode!r} cannot be converted to RGB: {first_line(error)}") from None


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array))  # strides below 0, and other byte orders, have no tensor
    except TypeError:
        raise TDMError(f"an array of {array.dtype} is no picture; use uint8, or floats in [0, 1]") from None


def _from_numbers(x: Tensor, *, channels_last: bool) -> Sequence[Picture]:
    """The pictures in numbers of any rank."""
    shape = tuple(x.shape)
    if x.ndim not in (2, 3, 4) or 0 in shape:
        raise TDMError(f"an array or tensor {shape} is no picture, and no batch of pictures")
    if x.ndim == 2:
        x = x[..., None] if channels_last else x[None]
    if x.ndim == 3:
        x = x[None]
    last, first = x.shape[-1] in _CHANNELS, x.shape[1] in _CHANNELS
    if not last and not first:
        raise TDMError(f"an array or tensor {shape} has no axis of 1, 3 or 4 channels")
    if last and (channels_last or not first):
        x = x.movedim(-1, 1)
    x = (x[:, :3] if x.shape[1] > 2 else x[:, :1]).expand(-1, 3, -1, -1)
    if x.dtype == torch.uint8:  # to be resized as PIL images are
        return [PIL.Image.fromarray(one.movedim(0, -1).contiguous().cpu().numpy()) for one in x]
    return _unit_range(x).split(1)


def _unit_range(x: Tensor) -> Tensor:
    """Numbers as float32 in [0, 1], by their dtype."""
    if x.dtype in _RANGES:
        return x.float() / _RANGES[x.dtype]
    if not x.is_floating_point():
        raise TDMError(f"a picture of {x.dtype} does not say its range; use uint8, or floats in [0, 1]")
    x = x.float()
    low, high = float(x.min()), float(x.max())
    if not -1 - _ROUNDING <= low <= high <= 1 + _ROUNDING:  # NaN too
        raise TDMError(f"a picture of floats must lie in [0, 1] or [-1, 1], got {low:g} to {high:g}")
    return (x if low >= -_ROUNDING else x / 2 + 0.5).clamp(0, 1)
