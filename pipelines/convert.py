"""From a LoRA file of any layout to a student file of ours, without the weights of the base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TDMError
from .locate import Source, base_folder, student_file
from .loras.file import read_lora_file
from .loras.pairs import state_dict_of
from .loras.places import flat, place
from .loras.skeleton import skeletons
from .presets import known_of
from .recipe_on_base import recipe_for
from .scheduler import TDMScheduler
from .student import save_student


def convert_lora(
    source: Source,
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write a LoRA as a student file: our layout, every scale baked in, and the recipe in its header.

    Args:
        source: a LoRA file of any layout, a folder or a hub repository of a student, or a released student's id.
        out: the file to write.
        base: folder or hub id of the base whose layers the LoRA is for; only its configs are read. None: the one
            that the file's own header or its preset names.
        recipe: fields of `StudentRecipe` that complete or replace what the header or the preset says.
        force: replace an existing file.

    Raises:
        TDMError: as `TDMPipeline.from_pretrained` and `save_student`; nothing is written then.

    >>> import safetensors.torch
    >>> from tdm.pipelines.locate import bundled_path
    >>> lora = safetensors.torch.load_file(bundled_path() / "student.safetensors")
    >>> safetensors.torch.save_file(lora, "lora.safetensors")  # a LoRA that says nothing about itself
    >>> recipe = {"trained_timesteps": {2: [1000, 500]}, "guidance_scale": 1.0, "height": 64, "width": 64}
    >>> convert_lora("lora.safetensors", "student.safetensors", base="bundled", recipe=recipe).name
    'student.safetensors'
    """
    file = read_lora_file(student_file(source, {}))
    known, preset = known_of(file)
    fields = {**known, **(recipe or {})}
    base = base or fields.get("base_model")
    if not base:
        raise TDMError(f"{file.path} does not name its base; pass it")
    family, networks = skeletons(base)
    complete = recipe_for(base, family, TDMScheduler.load_config(base_folder(base), subfolder="scheduler"), fields)
    placed = place(file, family, networks, **(preset.placing if preset else {}))
    return save_student(out, state_dict_of(flat(placed)), complete, lora_alpha=None, force=force)
