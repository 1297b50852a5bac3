"""The model families, one file each: all that differs from one to the next, for sampling and training alike.

A family is recognised by the pipeline class that a base names in its `model_index.json`, never by a folder's name.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from ...errors import TDMError

if TYPE_CHECKING:
    from .base import Condition, Family, Size, TeacherCall

__all__ = [
    "FAMILY_NAMES",
    "Condition",
    "Family",
    "Size",
    "TeacherCall",
    "check_family_name",
    "family_of_name",
    "family_of_pipeline",
]

# Stock pipeline -> class, whose name in lower case is the family's and its module's. Modules are imported when they are
# asked for: they need torch, and what a student file says of itself is read without.
_CLASSES = {
    "StableDiffusionPipeline": "SD15",
    "StableDiffusionXLPipeline": "SDXL",
    "PixArtAlphaPipeline": "PixArt",
    "PixArtSigmaPipeline": "PixArt",
    "StableDiffusion3Pipeline": "SD3",
    "CogVideoXPipeline": "CogVideoX",
    "FluxPipeline": "Flux",
    "SanaPipeline": "Sana",
    "WanPipeline": "Wan",
    "ZImagePipeline": "ZImage",
    "QwenImagePipeline": "QwenImage",
    "Krea2Pipeline": "Krea2",
}
FAMILY_NAMES = tuple(dict.fromkeys(name.lower() for name in _CLASSES.values()))
_PIPELINES = {name.lower(): pipeline for pipeline, name in reversed(_CLASSES.items())}


def __getattr__(name: str) -> object:
    if name in ("Condition", "Family", "Size", "TeacherCall"):
        return getattr(importlib.import_module(".base", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def family_of_pipeline(class_name: str) -> Family:
    """The family of a base whose `model_index.json` names this pipeline class, or of ours in its place ("TDM" + name).

    Raises:
        TDMError: no family uses that pipeline; the message lists those that are supported.
    """
    class_name = class_name if class_name in _CLASSES else class_name.removeprefix("TDM")
    if class_name not in _CLASSES:
        raise TDMError(f"pipeline class {class_name!r} is not supported; supported: {', '.join(_CLASSES)}")
    return _family(class_name)


def family_of_name(name: str) -> Family:
    """The family that a student file names.

    Raises:
        TDMError: an unknown name; the message lists those that are supported.
    """
    check_family_name(name)
    return _family(_PIPELINES[name])


def check_family_name(name: str) -> None:
    """Raise TDMError, which lists the names that are supported, for a name that no family has."""
    if name not in _PIPELINES:
        raise TDMError(f"model family {name!r} is not supported; supported: {', '.join(sorted(_PIPELINES))}")


@functools.cache
def _family(pipeline: str) -> Family:
    """The one object of a row."""
    family_class = _CLASSES[pipeline]
    return getattr(importlib.import_module(f".{family_class.lower()}", __name__), family_class)(pipeline)
