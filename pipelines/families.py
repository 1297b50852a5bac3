"""What differs from one model family to the next, as far as loading and calling a student goes.

A family is recognised by the pipeline class that a base names in its `model_index.json`, never by a folder's name.
Nothing here imports diffusers until a pipeline class is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import TDMError

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class Family:
    """One row of the registry.

    Attributes:
        name: the `family` field of a student file.
        pipeline: class name of the stock pipeline, as written in `model_index.json`.
        denoiser: the component that a student's LoRA belongs to; also the prefix of its keys.
        guidance_argument: the argument of `__call__` that takes the recipe's guidance scale.
        no_guidance: its value that switches guidance off; a pipeline with 0 counts from the conditional prediction,
            ``cond + w * (cond - uncond)``, and gets the recipe's scale less 1.
        call_kwargs: what this pipeline is called with unless the caller says otherwise, student or teacher.
        binned_sample_sizes: the denoiser's `sample_size`s that resolution binning has tables for; others switch it off.
        home: module that defines the class, if the stock one lacks or breaks something (it is then "TDM" + `pipeline`).
    """

    name: str
    pipeline: str
    denoiser: Literal["unet", "transformer"] = "transformer"
    guidance_argument: str = "guidance_scale"
    no_guidance: float = 1.0
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    binned_sample_sizes: frozenset[int] | None = None
    home: str | None = None

    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The class to load a base with: the stock one, or ours where something in the stock one has to be mended."""
        if self.home is None:
            return getattr(importlib.import_module("diffusers"), self.pipeline)
        return getattr(importlib.import_module(self.home, __package__), f"TDM{self.pipeline}")

    def guidance(self, scale: float) -> dict[str, float]:
        """The argument of `__call__` for a recipe's guidance scale (1.0 is none)."""
        return {self.guidance_argument: scale - (1.0 - self.no_guidance)}

    def call_defaults(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """`call_kwargs` for a loaded pipeline: resolution binning goes off where it has no table for the model."""
        defaults = dict(self.call_kwargs)
        sizes = self.binned_sample_sizes
        if sizes is not None and getattr(pipe, self.denoiser).config.sample_size not in sizes:
            defaults["use_resolution_binning"] = False
        return defaults


# Caption cleaning needs two optional packages and is skipped without them: off, so that no picture depends on that.
_PIXART: dict[str, Any] = {
    "call_kwargs": {"clean_caption": False},
    "binned_sample_sizes": frozenset({32, 64, 128}),
    "home": ".pixart",
}

_FAMILIES = (
    Family("sd15", "StableDiffusionPipeline", denoiser="unet"),
    Family("sdxl", "StableDiffusionXLPipeline", denoiser="unet"),
    Family("pixart", "PixArtAlphaPipeline", **_PIXART),
    Family("pixart", "PixArtSigmaPipeline", **_PIXART),
    Family("sd3", "StableDiffusion3Pipeline"),
    Family("cogvideox", "CogVideoXPipeline", home=".mended"),
    Family("flux", "FluxPipeline"),
    Family("sana", "SanaPipeline", binned_sample_sizes=frozenset({16, 32, 64, 128}), home=".mended"),
    Family("wan", "WanPipeline"),
    Family("zimage", "ZImagePipeline", no_guidance=0.0, home=".mended"),
    Family("qwenimage", "QwenImagePipeline", guidance_argument="true_cfg_scale", home=".mended"),
)
_BY_PIPELINE = {family.pipeline: family for family in _FAMILIES}
_BY_NAME = {family.name: family for family in reversed(_FAMILIES)}


def family_of_pipeline(class_name: str) -> Family:
    """The family of a base whose `model_index.json` names this pipeline class.

    Raises:
        TDMError: no family uses that pipeline; the message lists those that are supported.
    """
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
