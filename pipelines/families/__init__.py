"""The model families, one file each: all that differs from one to the next, for sampling and training alike.

A family is recognised by the pipeline class that a base names in its `model_index.json`, never by a folder's name.
"""

from __future__ import annotations

from ...errors import TDMError
from .base import Condition, Family, Size, TeacherCall
from .cogvideox import CogVideoX
from .flux import Flux
from .pixart import PixArt
from .qwenimage import QwenImage
from .sana import Sana
from .sd3 import SD3
from .sd15 import SD15
from .sdxl import SDXL
from .wan import Wan
from .zimage import ZImage

__all__ = ["Condition", "Family", "Size", "TeacherCall", "family_of_name", "family_of_pipeline"]

_FAMILIES: tuple[Family, ...] = (
    SD15("StableDiffusionPipeline"),
    SDXL("StableDiffusionXLPipeline"),
    PixArt("PixArtAlphaPipeline"),
    PixArt("PixArtSigmaPipeline"),
    SD3("StableDiffusion3Pipeline"),
    CogVideoX("CogVideoXPipeline"),
    Flux("FluxPipeline"),
    Sana("SanaPipeline"),
    Wan("WanPipeline"),
    ZImage("ZImagePipeline"),
    QwenImage("QwenImagePipeline"),
)
_BY_PIPELINE = {family.pipeline: family for family in _FAMILIES}
_BY_NAME = {family.name: family for family in reversed(_FAMILIES)}


def family_of_pipeline(class_name: str) -> Family:
    """The family of a base whose `model_index.json` names this pipeline class, or of ours in its place ("TDM" + name).

    Raises:
        TDMError: no family uses that pipeline; the message lists those that are supported.
    """
    class_name = class_name if class_name in _BY_PIPELINE else class_name.removeprefix("TDM")
    if class_name not in _BY_PIPELINE:
        raise TDMError(f"pipeline class {class_name!r} is not supported; supported: {', '.join(_BY_PIPELINE)}")
    return _BY_PIPELINE[class_name]


def family_of_name(name: str) -> Family:
    """The family that a student file names.

    Raises:
        TDMError: an unknown name; the message lists those that are supported.
    """
    if name not in _BY_NAME:
        raise TDMError(f"model family {name!r} is not supported; supported: {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[name]
