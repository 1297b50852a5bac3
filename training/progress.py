"""Lines that say how far long work is, and when it will be done."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Report = Callable[[str], None]
"""Takes lines as they come."""


def print_line(line: str) -> None:
    """Progress goes to stderr: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def silent(_line: str) -> None:
    """Print nothing: for all processes of a run but the first, and for programs that show progress themselves."""


class Progress:
    """At most a line every few seconds; work that is over sooner says nothing.

    Args:
        what: is being done.
        total: of its parts.
        report: takes the lines.
        every: seconds between two of them.
    """

    def __init__(self, what: str, total: int, report: Report, every: float = 3.0) -> None:
        self.what, self.total, self.report, self.every, self.done = what, total, report, every, 0
        self.start = self.last = time.monotonic()

    def add(self, count: int) -> None:
        """Count ``count`` more parts as done."""
        self.done += count
        now = time.monotonic()
        if now - self.last >= self.every or (self.done == self.total and self.last > self.start):
            self.last = now
            left = (now - self.start) / self.done * (self.total - self.done)
            self.report(f"{self.what} {self.done}/{self.total}  ETA {duration(left)}")


def duration(seconds: float) -> str:
    """Seconds for reading: "90 s", "25 min"."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
