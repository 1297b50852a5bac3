"""From a LoRA file of any layout to a student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import TDMError
from ..bases import Source, base_folder, networks_without_weights
from ..scheduler import TDMScheduler
from .file import Student
from .locate import student_file
from .recipe_on_base import recipe_on_base
from .unplaced import unplaced


def convert_lora(
    source: Source, *, base: str | None = None, recipe: Mapping[str, Any] | None = None, strict: bool = True
) -> Student:
    """A LoRA as a student: the names of diffusers, every scale baked in, and a recipe.

    Args:
        source: a LoRA file of any layout, a folder or a hub repository of a student, or a released student's id.
        base: folder or hub id of the base whose layers the LoRA is for; only its configs are read. None: the one
            that the file's own header or its preset names.
        recipe: fields of `StudentRecipe` that complete or replace what the header or the preset says.
        strict: False: what has no place on the base is left out, with a warning.

    Raises:
        TDMError: as `TDMPipeline.from_pretrained`.

    >>> import safetensors.torch
    >>> from tdm.pipelines.bases import bundled_path
    >>> lora = safetensors.torch.load_file(bundled_path() / "student.safetensors")
    >>> safetensors.torch.save_file(lora, "lora.safetensors")  # a LoRA that says nothing about itself
    >>> recipe = {"trained_timesteps": {2: [1000, 500]}, "guidance_scale": 1.0, "height": 64, "width": 64}
    >>> convert_lora("lora.safetensors", base="bundled", recipe=recipe).recipe.default_steps
    2
    """
    student = unplaced(student_file(source, {}), recipe, strict=strict)
    base = base or student.fields.get("base_model")
    if not base:
        raise TDMError(f"{student.name} does not name its base; pass it")
    family, networks = networks_without_weights(base)
    config = TDMScheduler.load_config(base_folder(base), subfolder="scheduler")
    complete, _ = recipe_on_base(base, family, config, student.fields)
    return Student(complete, student.place(family, networks))
