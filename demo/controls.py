"""Helpers that the tabs share: errors as one line, and the choices that a student offers."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ..errors import TDMError
from ..pipelines.students.recipe import StudentRecipe

MODEL: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
}  # of every event that draws: there is one model
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # what the page does is no endpoint; demo/api.py has those
BUNDLED_PROMPTS = (
    "two red stars above a blue ball at night",
    "a green heart on the beach",
    "three yellow rings at sea",
    "an orange moon over the waves",
    "two pink triangles right of a blue cross in a meadow",
    "one red heart under two green boxes in the snow",
)
OTHER_PROMPTS = (
    "a lighthouse on a cliff at dawn, oil painting",
    "a red fox asleep in fresh snow",
    "a glass teapot on a wooden table, soft light",
    "a street in Lisbon after rain",
)


def explained(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a handler so that the visitor reads its TDMErrors, on the page and through the API."""

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stepwise(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except TDMError as error:
                raise _shown(error) from None

        return stepwise

    @functools.wraps(function)
    def at_once(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TDMError as error:
            raise _shown(error) from None

    return at_once


def error_line(error: Exception) -> str:
    """An error as the page states it: a `TDMError` in its own words, anything else without what it may give away."""
    return " ".join(str(error).split()) if isinstance(error, TDMError) else "an error, which the terminal explains"


def _shown(error: TDMError) -> gr.Error:
    return gr.Error(error_line(error), title="That does not work", duration=12, print_exception=False)


def steps_choices(recipe: StudentRecipe, also: int | None = None) -> list[tuple[str, int]]:
    """Step counts to choose from; those that the student was trained on say so."""
    trained = recipe.trained_timesteps
    counts = sorted({1, 2, 4, 8, *trained, *([also] if also else [])})
    return [(f"{k}, trained" if k in trained else str(k), k) for k in counts]


def size_choices(recipe: StudentRecipe) -> list[str]:
    """Sizes to choose from: the one that the student was trained at, then a wide and a tall one."""
    width, height = recipe.width, recipe.height
    long = round(max(width, height) * 1.5 / 32) * 32
    return list(dict.fromkeys([size_text(width, height), size_text(long, height), size_text(width, long)]))


def size_text(width: int, height: int) -> str:
    """A size as the page writes it."""
    return f"{width} x {height}"


def parse_size(text: Any) -> tuple[int, int]:
    """Return (width, height) in pixels of a size that `size_text` or a visitor wrote.

    Raises:
        TDMError: the text is not a size.
    """
    size = re.fullmatch(r"\s*(\d{1,6})\s*[x×*]\s*(\d{1,6})\s*", str(text))
    if size is None:
        raise TDMError(f"{str(text)[:40]!r} is no size; give width x height, such as 96 x 64")
    return int(size[1]), int(size[2])
