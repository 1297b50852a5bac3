"""A comparison: the student's run, then its teacher's from the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cards import card, plural, stage, status
from .engine import Engine, Frame
from .settings import Settings


class Comparison:
    """The student's pictures, and the teacher's picture for the first of them.

    Attributes:
        wanted: the settings of each of the student's pictures.
        race: whether the teacher draws, too.
        students: the last frame of each student's run.
        teacher: the last frame of the teacher's run; None before it begins, or without one.
        ended: why the drawing was ended early; `run` draws no further once it is set.
    """

    def __init__(self, engine: Engine, wanted: Sequence[Settings], race: bool) -> None:
        self.engine, self.wanted, self.race = engine, wanted, race
        self.students: list[Frame] = []
        self.teacher: Frame | None = None
        self.ended = ""

    def run(self) -> Iterator[None]:
        """Draw, and yield at every new frame, until all is drawn or `ended` is set.

        Raises:
            TDMError: as `Engine.student` and `Engine.teacher`.
        """
        for i, settings in enumerate(self.wanted):
            for frame in self.engine.student(settings):
                if self.ended:
                    return
                self.students[i:] = [frame]
                yield
        if self.race:
            for frame in self.engine.teacher(self.wanted[0]):
                if self.ended:
                    return
                self.teacher = frame
                yield

    @property
    def finished(self) -> bool:
        """Whether everything is drawn."""
        students = len(self.students) == len(self.wanted) and all(frame.final for frame in self.students)
        return students and (not self.race or (self.teacher is not None and self.teacher.final))

    @property
    def progress(self) -> str:
        """A sentence that says how far the drawing has come."""
        done = sum(frame.final for frame in self.students)
        if done == len(self.wanted) and self.race:
            return f"The teacher had made {plural(self.teacher.calls if self.teacher else 0, 'call')}."
        if len(self.wanted) > 1:
            return f"{done} of {len(self.wanted)} pictures are drawn."
        return f"The student had made {plural(self.students[0].calls if self.students else 0, 'call')}."

    def html(self, note: str = "") -> str:
        """The stage as it is now, with a place for each picture, drawn or not.

        Args:
            note: the line below the pictures; the default says how the drawing ended.
        """
        note = note or self.ended
        several, first = len(self.wanted) > 1, self.wanted[0]
        frames = [*self.students, *[None] * (len(self.wanted) - len(self.students))]
        cards = [
            card(f"Seed {s.seed}" if several else self._name(s), frame, s.prompt, "not drawn" * bool(note))
            for s, frame in zip(self.wanted, frames, strict=True)
        ]
        if self.race:
            waiting = "not drawn" if note else "the student goes first" if self._students_run() else "at work"
            guided = ", guided" if self.engine.teacher_call.guided else ""
            name = f"Teacher, seed {first.seed}" if several else f"Teacher{guided}"
            cards.append(card(name, self.teacher, f"by the teacher: {first.prompt}", waiting))
        return stage(cards) + status(note or self._result())

    def _students_run(self) -> bool:
        return len(self.students) < len(self.wanted) or not self.students[-1].final

    def _result(self) -> str:
        if not self.finished:
            return ""
        seconds = sum(frame.seconds for frame in self.students)
        calls = sum(frame.calls for frame in self.students)
        if self.teacher is None:
            return f"{plural(len(self.students), 'picture')} in {plural(calls, 'network call')} and {seconds:.2f} s."
        first = self.students[0]
        line = f"{plural(first.calls, 'network call')} instead of {self.teacher.calls}"
        if not (first.warm and self.teacher.warm):  # the first run of a model at a size is slow: it proves nothing
            return f"{line}."
        return f"{line}: {self.teacher.seconds / first.seconds:.0f} times as fast on this machine."

    def _name(self, settings: Settings) -> str:
        student = "Student" if settings.student == self.engine.catalogue.first else settings.student
        return f"{student}, " + ("base first" if settings.base_first else plural(settings.steps, "step"))
