"""A student that has not met its base yet: a LoRA file of any layout, or a `Student` in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..families import Family
from ..loras.file import read_lora_file
from ..loras.pairs import Layers
from ..loras.places import place, place_layers
from .file import Student
from .recipe import completed
from .released import known_of


@dataclass(frozen=True)
class Unplaced:
    """What is known of a student without its base.

    Attributes:
        name: what messages call it: its path, or "the student" in memory.
        fields: of its `StudentRecipe`, as far as they are known.
        place: ``(family, networks by component) -> layers`` puts its LoRA on the layers of a base.
    """

    name: str
    fields: dict[str, Any]
    place: Callable[[Family, Mapping[str, nn.Module]], Layers]


def unplaced(student: Path | Student, recipe: Mapping[str, Any] | None = None, *, strict: bool = True) -> Unplaced:
    """A student as it is before its base is known.

    Args:
        student: a LoRA file of any layout, or a student in memory.
        recipe: fields of `StudentRecipe` that complete or replace what the file, its preset or the student says.
        strict: False: what of a file has no place on the base is left out, with a warning.

    Raises:
        TDMError: the file cannot be read (see `read_lora_file`), or its header's recipe cannot.
    """
    if isinstance(student, Student):
        return Unplaced("the student", completed(vars(student.recipe), recipe), partial(place_layers, student.layers))
    file = read_lora_file(student)
    known, preset = known_of(file)
    placing = preset.placing if preset else {}
    return Unplaced(str(file.path), completed(known, recipe), partial(place, file, strict=strict, **placing))
