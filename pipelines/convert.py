"""From a LoRA file of any layout to a student file of ours, and from a model in one file to a base's folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError

from ..errors import TDMError
from .folders import whole_folder
from .locate import Source, base_folder, family_of_base, student_file
from .loras.file import open_safetensors, read_lora_file
from .loras.pairs import state_dict_of
from .loras.places import flat, place
from .loras.skeleton import skeletons
from .presets import known_of
from .recipe_on_base import recipe_for
from .scheduler import TDMScheduler
from .student import completed, save_student


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
    fields = completed(known, recipe)
    base = base or fields.get("base_model")
    if not base:
        raise TDMError(f"{file.path} does not name its base; pass it")
    family, networks = skeletons(base)
    complete = recipe_for(base, family, TDMScheduler.load_config(base_folder(base), subfolder="scheduler"), fields)
    placed = place(file, family, networks, **(preset.placing if preset else {}))
    return save_student(out, state_dict_of(flat(placed)), complete, lora_alpha=None, force=force)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a .safetensors file holds a network's own weights, and no LoRA.

    Raises:
        TDMError: it cannot be read.
    """
    if not Path(path).is_file() or Path(path).suffix != ".safetensors":
        return False
    with open_safetensors(path) as file:
        return not any(mark in key.lower() for key in file.keys() for mark in ("lora", "lokr", "hada_"))  # noqa: SIM118


def convert_checkpoint(source: Path, out: Path, *, base: str, force: bool = False) -> Path:
    """Write a model that is a single .safetensors file, such as a fine-tune, as the folder of a pipeline.

    The folder is a base for everything here: `task.model` of a distillation, `TDMPipeline`, `tdm generate --model`.

    Args:
        source: the file, in the names of diffusers or of the original checkpoints, as far as diffusers reads them.
        out: the folder to write; the weights keep the dtype that most of the file has.
        base: folder (or hub id) of what the model was tuned from: its configs are taken, and the parts that the file
            lacks, such as text encoders and VAE.
        force: replace a folder that is there.

    Raises:
        TDMError: diffusers reads no single files of this family; the file is for another network; parts are in neither.
    """
    folder = base_folder(base)
    family = family_of_base(folder)
    stock: Any = getattr(diffusers, family.pipeline)
    if not hasattr(stock, "from_single_file"):
        raise TDMError(f"diffusers reads no single files of {family.name}; get this model as a folder")
    with open_safetensors(source) as file:
        stored = Counter(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.most_common(1)[0][0], torch.float32)

    with whole_folder(out, force=force) as unfinished:
        try:
            pipe = _from_file(stock, source, folder, family.denoiser, dtype)
        except Exception as error:  # diffusers reads the keys of another network in any way, and fails in any
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TDMError(f"{source} cannot be read as a {family.name} model on {base}: {line}") from None
        pipe.save_pretrained(str(unfinished))
    return out


def _from_file(stock: Any, source: Path, folder: str, denoiser: str, dtype: torch.dtype) -> Any:
    """diffusers' `from_single_file`; each part but the denoiser that it does not find in the file is the base's."""
    base: Any = None
    parts: dict[str, Any] = {}
    while True:
        try:
            return stock.from_single_file(str(source), config=folder, dtype=dtype, **parts)
        except SingleFileComponentError as error:
            missing = re.search(r"^(\w+) = ", str(error), re.MULTILINE)
            if missing is None or missing[1] == denoiser or missing[1] in parts:
                raise
            base = base or stock.from_pretrained(folder, dtype=dtype)
            parts[missing[1]] = base.components[missing[1]]
