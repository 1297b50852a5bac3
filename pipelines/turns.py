"""One run of a pipeline at a time. Scheduler, step counter and adapters are one pipeline's own, whoever calls it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import TDMError


class Turns:
    """Who may use a pipeline now. It pickles and copies as a new one, with nobody at it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._thread: int | None = None  # whose turn it is
        self._streaming = self._calling = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()

    @contextmanager
    def turn(self, *, streaming: bool = False) -> Iterator[None]:
        """The pipeline for this thread alone, for the length of a `with`; a turn in a turn is the same one.

        It waits for the turn of another thread to end. It does not wait for a stream, whose consumer may be this very
        thread.

        Raises:
            TDMError: a stream is open.
        """
        thread = threading.get_ident()
        if self._thread == thread:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None or self._streaming)
            if self._thread is not None:
                raise TDMError("a stream of this pipeline is open; read it to its end or close() it first")
            self._thread, self._streaming = thread, streaming
        try:
            yield
        finally:
            with self._changed:
                self._thread, self._streaming = None, False
                self._changed.notify_all()

    @contextmanager
    def call(self) -> Iterator[None]:
        """A turn in which the scheduler runs through its steps.

        Raises:
            TDMError: as `turn`; or this thread is in a call already, as a callback is.
        """
        with self.turn():
            if self._calling:
                raise TDMError(
                    "this pipeline is in the middle of a call, and a callback cannot start another one on it"
                )
            self._calling = True
            try:
                yield
            finally:
                self._calling = False
