"""Students averaged into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...errors import TDMError
from ..loras.average import mean
from .file import Student
from .recipe import StudentRecipe


def average(
    students: Sequence[Student],
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Student, float]:
    """The mean of students of one base with one recipe. See `loras/average.py` for what the mean is.

    Args:
        students: two or more; their notes may differ, and those that do are left out.
        weights: one each, above 0; None: all alike.
        rank: of the mean; None is the largest rank of each layer among the students.
        names: what messages call them; None: "student 1" and so on.

    Returns:
        (the mean, the share of the exact mean's norm that this rank keeps).

    Raises:
        TDMError: fewer than two students, recipes that differ, of which the message names the field, or as in `mean`.
    """
    if len(students) < 2:
        raise TDMError("give two students or more to average")
    names = names or [f"student {i + 1}" for i in range(len(students))]
    first = students[0]
    for field in dataclasses.fields(StudentRecipe):
        for name, other in zip(names[1:], students[1:], strict=True):
            here, there = getattr(first.recipe, field.name), getattr(other.recipe, field.name)
            if here != there and field.name != "notes":
                raise TDMError(
                    f"{names[0]} and {name} cannot be averaged: {field.name} is {here} in one and {there} in the other"
                )
    weights = [1.0] * len(students) if weights is None else weights
    layers, kept = mean([student.layers for student in students], weights, rank)
    notes = {k: v for k, v in first.recipe.notes.items() if all(s.recipe.notes.get(k) == v for s in students)}
    notes["average"] = f"of {len(students)} students, weights {' : '.join(f'{weight:g}' for weight in weights)}"
    return Student(dataclasses.replace(first.recipe, notes=notes), layers), kept
