"""What a terminal shows while a distillation runs: a bar of updates with the time left, and the lines above it."""

from __future__ import annotations

import sys
from typing import Any, Self

from tqdm.auto import tqdm

from ..training.progress import print_line


class LiveBar:
    """A bar of the updates of a run, in a terminal. In a pipe there are the lines alone.

    Args:
        updates: of the whole run.
        shown: False in all processes of a run but the first.
    """

    def __init__(self, updates: int, shown: bool = True) -> None:
        terminal = shown and sys.stderr.isatty()
        self._bar: Any = tqdm(total=updates, unit="update", dynamic_ncols=True, disable=not terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def report(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar.disable:
            print_line(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def on_update(self, step: int) -> None:
        """Put the bar at ``step``, the number of updates done. Those before a resume took no time of this run."""
        if self._bar.n == 0:
            self._bar.n = self._bar.initial = step - 1
        self._bar.update(step - self._bar.n)
