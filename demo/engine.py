"""The one pipeline in memory, and its turns."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..errors import NO_STRICT, PartialLoraError, TDMError, first_line
from ..pipelines.calls import Calls, count_calls
from ..pipelines.families import TeacherCall
from ..pipelines.students.recipe import StudentRecipe
from .catalogue import Catalogue
from .settings import Settings, check

BETWEEN_FRAMES = 0.1  # seconds, at least, of a teacher: to decode every step would take longer than to draw


@dataclass(frozen=True)
class Frame:
    """A moment of a run.

    Attributes:
        picture: the clean picture predicted so far (of the teacher: with the noise that is left in it).
        step, steps: which of how many.
        timestep: that the network was called at last.
        calls: network calls so far, counted as they happen; classifier-free guidance makes two a step.
        total: calls at the end, as this far there were so many a step.
        seconds: spent on drawing so far.
        final: whether this is the picture itself.
        warm: whether the same model had drawn at this size before, so that `seconds` is what it takes.
    """

    picture: Image.Image
    step: int
    steps: int
    timestep: float
    calls: int
    total: int
    seconds: float
    final: bool
    warm: bool


class Engine:
    """Draws for everyone, one run at a time.

    Args:
        pipe: a loaded pipeline, whose student is the catalogue's first.
        catalogue: the students to choose from.

    Raises:
        TDMError: the pipeline makes videos.
    """

    def __init__(self, pipe: Any, catalogue: Catalogue) -> None:
        if pipe.family.video:
            raise TDMError(f"the demo shows pictures, and {pipe.recipe.family} makes videos; use TDMPipeline in Python")
        self.catalogue = catalogue
        self._pipe = pipe
        self._turn = threading.Lock()  # no RLock: Gradio resumes a generator from whatever thread is free
        self._loaded = self._version(catalogue.first)
        self._recipes: dict[tuple[str, int], StudentRecipe] = {self._loaded: pipe.recipe}
        self._warm: set[tuple[str | None, int, int]] = set()  # student (None: the teacher) and size of earlier runs

    def warm_up(self) -> None:
        """Run the student once, and one step of its teacher, so that no visitor waits for a process's first calls."""
        settings = self.settings({"prompt": "a"})
        for _ in self.student(settings):
            pass
        with suppress(TDMError), closing(self.teacher(settings)) as steps:  # a merged student has no teacher
            next(steps)

    @property
    def base(self) -> str:
        """The name of the base."""
        return self._pipe.recipe.base_model

    @property
    def teacher_call(self) -> TeacherCall:
        """Steps and guidance scale of the teacher."""
        return self._pipe.teacher_call

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the base."""
        return self._pipe.tokenizer

    def recipe(self, student: str | None = None) -> StudentRecipe:
        """Return the recipe of a student.

        Raises:
            TDMError: there is none of this name, or it does not fit the base.
        """
        version = self._version(student)
        if version not in self._recipes:
            with self._turn:
                self._put_in(student)
        return self._recipes[version]

    def settings(self, values: Mapping[str, Any]) -> Settings:
        """Checked settings (see `settings.check`) for a student by its name, the first if none is given.

        Raises:
            TDMError: as `check` and `recipe`.
        """
        student = values.get("student") or self.catalogue.first
        return check(values, self.recipe(student), student)

    def student(self, settings: Settings) -> Generator[Frame, None, None]:
        """The student's run, every step and then the picture.

        Raises:
            TDMError: the settings do not fit the model, or another student cannot be loaded.
        """
        return self._frames(settings, {"num_inference_steps": settings.steps}, teacher=False)

    def teacher(self, settings: Settings) -> Generator[Frame, None, None]:
        """The teacher's run from the same noise, with the base's own steps and guidance; not every step is shown.

        Raises:
            TDMError: as `student`, or the base's own weights are gone (a merged student).
        """
        return self._frames(settings, {}, teacher=True)

    def _frames(self, settings: Settings, call: dict[str, Any], *, teacher: bool) -> Generator[Frame, None, None]:
        with self._turn:
            self._put_in(settings.student)
            pipe = self._pipe
            generator = torch.Generator().manual_seed(settings.seed)
            size = {"width": settings.width, "height": settings.height}
            first = pipe.base_first() if settings.base_first and not teacher else nullcontext()
            model = (None if teacher else settings.student, settings.width, settings.height)
            with (
                _explained(),
                pipe.teacher() if teacher else first,
                count_calls(getattr(pipe, pipe.family.denoiser)) as calls,
                closing(pipe.stream(settings.prompt, generator=generator, **size, **call)) as run,
            ):
                yield from self._timed(run, calls, BETWEEN_FRAMES if teacher else 0, model)

    def _timed(
        self, run: Iterator[Any], calls: Calls, pause: float, model: tuple[str | None, int, int]
    ) -> Generator[Frame, None, None]:
        seconds, shown, warm = 0.0, -pause, model in self._warm
        while True:
            begun = time.perf_counter()
            step = next(run)
            seconds += time.perf_counter() - begun
            self._warm.add(model)
            final = step.output is not None
            if final or time.perf_counter() - shown >= pause:
                shown = time.perf_counter()
                picture = step.output.images[0] if final else step.preview[0]
                total = calls.samples if final else round(calls.samples / step.index) * step.total
                yield Frame(picture, step.index, step.total, step.timestep, calls.samples, total, seconds, final, warm)
            if final:
                return

    def _version(self, student: str | None) -> tuple[str, int]:
        """A student's source, and when its file was written: a run that goes on replaces it."""
        source = self.catalogue.source(student)
        return source, os.stat(source).st_mtime_ns if os.path.isfile(source) else 0

    def _put_in(self, student: str | None) -> None:
        version = self._version(student)
        if version == self._loaded:
            return
        try:
            with _explained():
                self._pipe.load_student(version[0])
        except TDMError as error:  # where the file lies is nobody's business
            text = f"{error.reason}; {NO_STRICT}" if isinstance(error, PartialLoraError) else str(error)
            raise TDMError(text.replace(version[0], student or self.catalogue.first)) from None
        self._loaded = version
        self._recipes[version] = self._pipe.recipe


@contextmanager
def _explained() -> Iterator[None]:
    """Raise what the pipeline refuses, such as a size that does not fit its network, as one line."""
    try:
        yield
    except TDMError:
        raise
    except ValueError as error:
        raise TDMError(first_line(error)) from error
    except torch.OutOfMemoryError:
        raise TDMError("out of memory on the device; ask for a smaller picture") from None
