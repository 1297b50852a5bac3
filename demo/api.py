"""Named endpoints, for gradio_client, HTTP and MCP: their docstrings are what a caller and a language model read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gradio as gr
from gradio import FileData

from ..errors import TDMError
from .compare import Comparison
from .controls import MODEL, explained
from .engine import Engine
from .explore import draw_grid, grid, save_grid, save_strip
from .pictures import Pictures
from .settings import MOST_STEPS, whole

Result = tuple[FileData | None, dict[str, Any]]


def endpoints(engine: Engine, pictures: Pictures) -> None:
    """Add the endpoints to the `gr.Blocks` around."""
    api = Endpoints(engine, pictures)
    for function in (api.generate, api.compare, api.explore, api.trajectory):
        gr.api(_typed(function), api_name=function.__name__, **MODEL)
    gr.api(_typed(api.info), api_name="info")


class Endpoints:
    """The endpoints, one method each.

    Args:
        engine: draws.
        pictures: keeps the files that are returned.
    """

    def __init__(self, engine: Engine, pictures: Pictures) -> None:
        self._engine, self._pictures = engine, pictures

    def generate(
        self,
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        student: str | None = None,
        base_first: bool = False,
    ) -> Iterator[Result]:
        """Draw a picture from a prompt with a few-step TDM student. The same seed gives the same picture.

        Args:
            prompt: what to draw, at most 2,000 characters
            seed: of the noise, 0 or more
            steps: network calls, 1 to 50; leave it out for what the student was trained for
            width: pixels, a multiple of 8; leave it out for the student's own
            height: pixels, a multiple of 8; leave it out for the student's own
            student: one of the names that info lists; leave it out for the first
            base_first: let the base make the first step: more variety over seeds, less exact; 2 steps or more

        Returns:
            the picture, a PNG with its settings inside
            settings, network calls and seconds; before the end, how far it is, without a picture
        """
        fields = {"prompt": prompt, "seed": seed, "steps": steps, "width": width, "height": height}
        settings = self._engine.settings({**fields, "student": student, "base_first": base_first})
        for frame in self._engine.student(settings):
            if not frame.final:
                yield None, {"step": frame.step, "steps": frame.steps, "calls": frame.calls, "seconds": frame.seconds}
        metadata = {**settings.to_dict(), "calls": frame.calls, "seconds": frame.seconds}
        yield _file(self._pictures.save(frame.picture, settings)), metadata

    def compare(
        self,
        prompt: str,
        seed: int = 0,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        student: str | None = None,
        base_first: bool = False,
    ) -> Iterator[tuple[FileData | None, FileData | None, dict[str, Any]]]:
        """Draw the same prompt from the same noise twice: the few-step student, then its teacher with its own
        steps and guidance.

        Args:
            prompt: what to draw, at most 2,000 characters
            seed: of the noise, 0 or more
            steps: network calls of the student, 1 to 50; leave it out for what it was trained for
            width: pixels, a multiple of 8; leave it out for the student's own
            height: pixels, a multiple of 8; leave it out for the student's own
            student: one of the names that info lists; leave it out for the first
            base_first: let the base make the student's first step: more variety over seeds, less exact; 2 steps or more

        Returns:
            the student's picture, which is there before the teacher begins
            the teacher's picture
            settings, and network calls and seconds of both
        """
        fields = {"prompt": prompt, "seed": seed, "steps": steps, "width": width, "height": height}
        settings = self._engine.settings({**fields, "student": student, "base_first": base_first})
        comparison = Comparison(self._engine, [settings], race=True)
        file: FileData | None = None
        metadata: dict[str, Any] = settings.to_dict()
        for _ in comparison.run():
            for name, frame in (("student", comparison.students[0]), ("teacher", comparison.teacher)):
                if frame is not None:
                    metadata |= {f"{name}_calls": frame.calls, f"{name}_seconds": frame.seconds}
            if file is None and comparison.students[0].final:
                file = _file(self._pictures.save(comparison.students[0].picture, settings))
            if not comparison.finished:
                yield file, None, metadata
        assert comparison.teacher is not None
        sheet = self._pictures.save_sheet(comparison.teacher.picture, f"teacher {settings.prompt}")
        yield file, _file(sheet), metadata

    def explore(
        self,
        prompts: list[str],
        steps: list[int] | None = None,
        seeds: int = 4,
        seed: int = 0,
        student: str | None = None,
    ) -> Iterator[Result]:
        """Draw a table of pictures: seeds as columns; as rows several prompts, or of one prompt several step counts.

        Args:
            prompts: one, or several with one step count
            steps: network calls of each row, such as [1, 2, 4, 8]; leave it out for what the student was trained for
            seeds: how many columns, 1 to 8
            seed: of the first column
            student: one of the names that info lists; leave it out for the first

        Returns:
            one PNG with the table and its labels
            prompts, steps and seeds; before the end, how many pictures are drawn
        """
        texts = prompts if isinstance(prompts, list) else [prompts]
        rows = [self._engine.settings({"prompt": text, "seed": seed, "student": student}) for text in texts]
        if not rows:
            raise TDMError("a table needs a prompt at least")
        counts = [whole("steps", k, 1, MOST_STEPS) for k in (steps or [rows[0].steps])]
        trained = self._engine.recipe(rows[0].student).trained_timesteps
        wanted = grid(rows[0], [s.prompt for s in rows], counts, whole("seeds", seeds, 1, 8), trained)
        for done, drawn in enumerate(draw_grid(self._engine, wanted), 1):  # noqa: B007 (the last is saved)
            if done < len(wanted):
                yield None, {"done": done, "of": len(wanted)}
        metadata = {"prompts": [s.prompt for s in rows], "steps": counts, "seeds": [s.seed for s in wanted.rows[0]]}
        yield _file(save_grid(self._pictures, wanted, drawn)), metadata

    def trajectory(
        self, prompt: str, seed: int = 0, steps: int | None = None, student: str | None = None
    ) -> Iterator[Result]:
        """Show how one picture comes about: the clean picture that the student predicts at each of its steps.

        Args:
            prompt: what to draw, at most 2,000 characters
            seed: of the noise, 0 or more
            steps: network calls, 1 to 50; leave it out for what the student was trained for
            student: one of the names that info lists; leave it out for the first

        Returns:
            one PNG with the strip
            settings, and the timestep of each step
        """
        settings = self._engine.settings({"prompt": prompt, "seed": seed, "steps": steps, "student": student})
        frames = []
        for frame in self._engine.student(settings):
            frames.append(frame)
            if not frame.final:
                yield None, {"step": frame.step, "steps": frame.steps}
        metadata = {**settings.to_dict(), "timesteps": [frame.timestep for frame in frames[:-1]]}
        yield _file(save_strip(self._pictures, frames, settings)), metadata

    def info(self) -> dict[str, Any]:
        """Say which base this is, which students there are, and the first student's trained steps, size and guidance.

        Returns:
            base, family, students by name, trained timesteps by step count, default steps, width, height, guidance
        """
        recipe = self._engine.recipe()
        return {
            "base": self._engine.base,
            "family": recipe.family,
            "students": self._engine.catalogue.names(),
            "trained_timesteps": {str(k): grid for k, grid in recipe.trained_timesteps.items()},
            "default_steps": recipe.default_steps,
            "width": recipe.width,
            "height": recipe.height,
            "guidance_scale": recipe.guidance_scale,
        }


def _file(path: Path) -> FileData:
    return FileData(path=str(path), orig_name=path.name, mime_type="image/png")


def _typed(method: Callable[..., Any]) -> Callable[..., Any]:
    """An endpoint with the types that Gradio reads: types instead of their names, and an iterator's items."""
    hints = get_type_hints(method)
    if hints["return"].__origin__ is not tuple and issubclass(hints["return"].__origin__, Iterator):
        (hints["return"],) = get_args(hints["return"])
    function = explained(method)
    function.__annotations__ = hints
    function.__signature__ = inspect.signature(method).replace(return_annotation=hints["return"])  # type: ignore
    return function
