"""The rows: a line of JSON each, added when it is finished, and the one table that is made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import TDMError
from ..files import writing
from ..training.from_plain import from_dict
from .jobs import Machine

GIB = 2**30
State = Literal["ok", "failed", "not available"]
Range = tuple[float, float]


@dataclass(frozen=True)
class Result:
    """What a row shows.

    Attributes:
        text: in one line.
        state: "not available" is what this machine cannot do, and no failure.
        seconds: of an update or a call.
        seconds_estimated: the least and the most that `tdm estimate` says.
        peak: bytes of memory.
        peak_estimated: the same by `tdm estimate`, without CUDA's own.
    """

    text: str
    state: State = "ok"
    seconds: float | None = None
    seconds_estimated: Range | None = None
    peak: int | None = None
    peak_estimated: int | None = None


@dataclass(frozen=True)
class Row:
    """What is to be shown.

    Attributes:
        section: "bench", "presets", "cards" or "storage".
        name: what of it.
        weights: of which base.
        settings: what else it depends on.
    """

    section: str
    name: str
    weights: str
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.section} {self.name}"


@dataclass(frozen=True)
class Line:
    """A finished row.

    Attributes:
        took: seconds, all of it.
    """

    row: Row
    machine: Machine
    result: Result
    took: float = field(default=0.0)


def read(path: Path) -> list[Line]:
    """The lines of a record; [] if there is none. One that was cut short counts for nothing."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError, TDMError):
            lines.append(from_dict(Line, json.loads(text)))
    return lines


def add(path: Path, line: Line) -> None:
    """Add a line.

    Raises:
        TDMError: it cannot be written.
    """
    with writing(path), path.open("a+b") as file:
        if file.tell() and not _ends_whole(path):  # what was cut short keeps its own line
            file.write(b"\n")
        file.write(json.dumps(dataclasses.asdict(line)).encode() + b"\n")


def _ends_whole(path: Path) -> bool:
    return path.read_bytes()[-1:] == b"\n"


def table(command: str, machine: Machine, lines: Iterable[Line]) -> str:
    """The Markdown of finished rows."""
    head = [
        f"`{command}` on {machine.count} x {machine.device}, {machine.memory / GIB:.0f} GiB; {machine.versions}",
        "",
        "Seconds are of an update, or of a call of 4 steps. Estimates are `tdm estimate`'s, memory without CUDA's own.",
        "",
        "| row | weights | state | seconds | estimated | peak GiB | estimated | result |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(_cells(line) for line in lines)]) + "\n"


def _cells(line: Line) -> str:
    result = line.result
    cells: Sequence[str] = (
        str(line.row),
        line.row.weights,
        result.state,
        "" if result.seconds is None else f"{result.seconds:.3g}",
        "" if result.seconds_estimated is None else "{:.3g} to {:.3g}".format(*result.seconds_estimated),
        "" if result.peak is None else f"{result.peak / GIB:.2f}",
        "" if result.peak_estimated is None else f"{result.peak_estimated / GIB:.2f}",
        result.text,
    )
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
