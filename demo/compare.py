"""The student's run, then its teacher's from the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cards import card, plural, stage
from .engine import Engine, Frame
from .settings import Settings


class Comparison:
    """What a stage shows: the student's pictures, and the teacher's of the first.

    Attributes:
        students: the last frame of each student's run.
        teacher: the last frame of the teacher's; None before, or without one.
    """

    def __init__(self, engine: Engine, wanted: Sequence[Settings], race: bool) -> None:
        self.engine, self.wanted, self.race = engine, wanted, race
        self.students: list[Frame] = []
        self.teacher: Frame | None = None

    def run(self) -> Iterator[None]:
        """Draw; yields whenever there is something new to show.

        Raises:
            TDMError: as `Engine.student` and `Engine.teacher`.
        """
        for i, settings in enumerate(self.wanted):
            for frame in self.engine.student(settings):
                self.students[i:] = [frame]
                yield
        if self.race:
            for frame in self.engine.teacher(self.wanted[0]):
                self.teacher = frame
                yield

    @property
    def finished(self) -> bool:
        """Whether everything is drawn."""
        students = len(self.students) == len(self.wanted) and all(frame.final for frame in self.students)
        return students and (not self.race or (self.teacher is not None and self.teacher.final))

    def html(self) -> str:
        """The stage as it is now: with a place for each picture, drawn or not."""
        several, first = len(self.wanted) > 1, self.wanted[0]
        frames = [*self.students, *[None] * (len(self.wanted) - len(self.students))]
        cards = [
            card(f"Seed {s.seed}" if several else _named(s), frame, s.prompt)
            for s, frame in zip(self.wanted, frames, strict=True)
        ]
        if self.race:
            waiting = "the student goes first" if self._students_run() else "at work"
            guided = ", guided" if self.engine.teacher_call.guided else ""
            name = f"Teacher, seed {first.seed}" if several else f"Teacher{guided}"
            cards.append(card(name, self.teacher, f"by the teacher: {first.prompt}", waiting))
        return stage(cards, self._said())

    def _students_run(self) -> bool:
        return len(self.students) < len(self.wanted) or not self.students[-1].final

    def _said(self) -> str:
        if not self.finished:
            return ""
        seconds = sum(frame.seconds for frame in self.students)
        calls = sum(frame.calls for frame in self.students)
        if self.teacher is None:
            return f"{plural(len(self.students), 'picture')} in {plural(calls, 'network call')} and {seconds:.2f} s."
        first = self.students[0]
        return (
            f"{plural(first.calls, 'network call')} instead of {self.teacher.calls}: "
            f"{self.teacher.seconds / first.seconds:.0f} times as fast on this machine."
        )


def _named(settings: Settings) -> str:
    return "Student, " + ("base first" if settings.base_first else plural(settings.steps, "step"))  # on one line
