"""The settings of a picture, checked in one place for the page, links, pictures and the API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import TDMError
from ..pipelines.students.recipe import MOST_AREA, StudentRecipe

LONGEST_PROMPT = 2_000  # characters
MOST_STEPS = 50
MOST_PICTURES = 8  # of one request


@dataclass(frozen=True)
class Settings:
    """The settings that one picture depends on.

    Attributes:
        prompt: what to draw.
        seed: of the noise, 0 or more and below 2^53: a browser's numbers are exact up to there.
        steps: of the student, 1 to 50.
        width, height: in pixels, multiples of 8.
        student: its name in the `Catalogue`.
        base_first: the first step is the base's (`TDMPipeline.base_first`).
    """

    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    student: str
    base_first: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The settings as a picture's metadata and the API's results have them."""
        return asdict(self)


def check(fields: Mapping[str, Any], recipe: StudentRecipe, student: str) -> Settings:
    """Make settings from values of any kind. Those that are absent or None are the student's defaults, and seed 0.

    Args:
        fields: values by the names of `Settings`.
        recipe: the recipe of the student.
        student: the student's name.

    Raises:
        TDMError: a value is of the wrong kind or out of range.
    """
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise TDMError("the prompt is empty; say what to draw")
    if len(prompt) > LONGEST_PROMPT:
        raise TDMError(f"the prompt has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} are taken")
    if not prompt.isprintable() and any(ord(c) < 32 and c not in "\n\t\r" for c in prompt):
        raise TDMError("the prompt has control characters; type it without them")

    def count(name: str, default: int, least: int, most: int) -> int:
        value = fields.get(name)
        return whole(name, default if value is None else value, least, most)

    area = MOST_AREA * recipe.width * recipe.height
    width = count("width", recipe.width, 8, area)
    height = count("height", recipe.height, 8, area)
    if width % 8 or height % 8:
        raise TDMError(f"{width} x {height}: width and height must be multiples of 8")
    if width * height > area:
        raise TDMError(
            f"{width} x {height} is too large here: at most {MOST_AREA} times the pixels of {recipe.width} x "
            f"{recipe.height}, which the student was trained for"
        )
    steps = count("steps", recipe.default_steps, 1, MOST_STEPS)
    base_first = fields.get("base_first") or False
    if not isinstance(base_first, bool):
        raise TDMError(f"base_first must be true or false, not {str(base_first)[:40]!r}")
    if base_first and steps < 2:
        raise TDMError("the base's first step needs 2 steps or more, so that one is left for the student")
    return Settings(
        prompt=" ".join(prompt.split()),
        seed=count("seed", 0, 0, 2**53 - 1),
        steps=steps,
        width=width,
        height=height,
        student=student,
        base_first=base_first,
    )


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Return `value` as a whole number from `least` to `most`.

    Raises:
        TDMError: it is not a whole number, or out of range.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value != int(value):
        raise TDMError(f"{name} must be a whole number, not {str(value)[:40]!r}")
    if not least <= value <= most:
        raise TDMError(f"{name} must be {least} to {most}, not {str(value)[:40]}")
    return int(value)
