"""Students averaged into one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import TDMError
from .loras.average import mean
from .loras.pairs import Lora, pair_layers
from .student import StudentRecipe, read_student


class Student(NamedTuple):
    """A student in memory: what messages call it, its recipe, and its LoRA by `<component>.<layer>` at strength 1.0."""

    name: str
    recipe: StudentRecipe
    layers: dict[str, Lora]


def read(path: str | os.PathLike[str]) -> Student:
    """The student of a file of ours.

    Raises:
        TDMError: it cannot be read, has no recipe, or has another layout.
    """
    recipe, tensors = read_student(path)
    try:
        if recipe is None:
            raise TDMError("it has no recipe")
        return Student(str(path), recipe, pair_layers(tensors))
    except TDMError as error:
        raise TDMError(f"{path} is not in the layout of a student file ({error}); write it with tdm convert") from None


def average(
    students: Sequence[Student], *, weights: Sequence[float] | None = None, rank: int | None = None
) -> tuple[Student, float]:
    """The mean of students of one base with one recipe. See `loras/average.py` for what the mean is.

    Args:
        students: two or more; their notes may differ, and those that do are left out.
        weights: one each, above 0; None: all alike.
        rank: of the mean; None is the largest rank of each layer among the students.

    Returns:
        (the mean, the share of the exact mean's norm that this rank keeps).

    Raises:
        TDMError: fewer than two students, recipes that differ, of which the message names the field, or as in `mean`.
    """
    if len(students) < 2:
        raise TDMError("give two students or more to average")
    first = students[0]
    for field in dataclasses.fields(StudentRecipe):
        for other in students[1:]:
            here, there = getattr(first.recipe, field.name), getattr(other.recipe, field.name)
            if here != there and field.name != "notes":
                raise TDMError(
                    f"{first.name} and {other.name} cannot be averaged: {field.name} is {here} in one and {there} in "
                    "the other"
                )
    weights = [1.0] * len(students) if weights is None else weights
    layers, kept = mean([student.layers for student in students], weights, rank)
    notes = {k: v for k, v in first.recipe.notes.items() if all(s.recipe.notes.get(k) == v for s in students)}
    notes["average"] = f"of {len(students)} students, weights {' : '.join(f'{weight:g}' for weight in weights)}"
    return Student("average", dataclasses.replace(first.recipe, notes=notes), layers), kept
