"""LoRAs that are stored in 8-bit floats, with or without scales."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...errors import TDMError
from .pairs import wide_float

_SCALES = (".scale_weight", ".weight_scale", ".weight.scale")
_NOTES = ("scaled_fp8", ".comfy_quant", ".scale_input", ".input_scale")  # of how a network computes with them


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with 8-bit floats as float32, each times its scale, one number or one for each row.

    Raises:
        TDMError: a scale that fits no tensor.
    """
    scales = {}
    for key, scale in tensors.items():
        if (ending := next((ending for ending in _SCALES if key.endswith(ending)), None)) is not None:
            scales[f"{key.removesuffix(ending)}.weight"] = key, scale.float()
    names = {key for key, _ in scales.values()}
    wide = {}
    for key, tensor in tensors.items():
        if key in names or key.endswith(_NOTES):
            continue
        wide[key] = wide_float(tensor)
        if key in scales:
            wide[key] = _times(wide[key], *scales[key])
    if orphan := next((name for key, (name, _) in scales.items() if key not in wide), None):
        raise TDMError(f"{orphan!r} is the scale of a tensor that is not in the file")
    return wide


def _times(tensor: Tensor, name: str, scale: Tensor) -> Tensor:
    if scale.numel() not in (1, len(tensor)):
        raise TDMError(f"{name!r} {tuple(scale.shape)} is no scale of a tensor {tuple(tensor.shape)}")
    return tensor.float() * scale.reshape(-1, *[1] * (tensor.ndim - 1))
