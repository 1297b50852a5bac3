"""Which students a user of ComfyUI has: the released ones, and the files in `models/loras`."""

from __future__ import annotations

import folder_paths

from ..errors import TDMError
from ..pipelines.loras.file import LoraFile
from ..pipelines.presets import PRESETS, known_of
from ..pipelines.student import StudentRecipe, read_header

RELEASED = tuple(name for name, preset in PRESETS.items() if "sampler" not in preset.recipe)


def student_names() -> list[str]:
    """The released TDM students, then all files in `models/loras`, whether they are students or not."""
    return [*RELEASED, *folder_paths.get_filename_list("loras")]


def recipe_of(name: str) -> StudentRecipe:
    """The recipe of one of `student_names`: the one in its header, or else that of the released student of this name.

    Raises:
        TDMError: it has none, or one that another sampler than TDM's runs.
    """
    if name in RELEASED:
        fields = PRESETS[name].fields
    else:
        path = folder_paths.get_full_path_or_raise("loras", name)
        safetensors = name.endswith((".safetensors", ".sft"))
        file = LoraFile(path, "safetensors", metadata=read_header(path)) if safetensors else LoraFile(path, "pickle")
        fields, _ = known_of(file)
    if not fields:
        raise TDMError(f"{name} says nothing about its timesteps; type them in, or choose the student by its name")
    recipe = StudentRecipe.from_fields(fields)
    if recipe.sampler is not None:
        raise TDMError(f"{name} is no TDM student: it is sampled with {recipe.sampler}")
    return recipe
