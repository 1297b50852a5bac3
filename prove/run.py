"""What is to be shown on a machine, and the showing: every row that the record does not have yet, one after another."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence

from ..bench.models import MODELS
from ..errors import TDMError, first_line
from ..files import replacing
from ..training.presets import MEMORY
from ..training.progress import Report, duration, print_line
from ..training.settings import load_config
from .bases import Base, by_size
from .checks import (
    COMPILED,
    STORAGES,
    NotAvailableError,
    Workplace,
    bench_row,
    cards_row,
    compile_row,
    preset_row,
    storage_row,
)
from .child import DiedError
from .record import Line, Result, Row, add, read, table

SECTIONS = ("bench", "presets", "cards", "storage")
CLASSES = tuple(name for name in MEMORY if not load_config(name).memory.shard)  # that one device can have
Show = Callable[[Workplace], Result]


def plan(
    bases: Sequence[Base], sections: Sequence[str], memory: Sequence[str], updates: int, settings: Sequence[str]
) -> dict[Row, Show]:
    """The rows of some sections, and what shows each.

    Args:
        bases: of "presets", from small to large; the smallest is that of "cards" and "storage".
        sections: of `SECTIONS`.
        memory: of `CLASSES`.
        updates: of a run in "presets".
        settings: of every run.
    """
    random, given = "random weights", tuple(settings)
    rows: dict[Row, Show] = {}
    sizes = by_size(bases) if set(sections) != {"bench"} else {}
    if "bench" in sections:
        for model in ("bundled", *MODELS):
            weights = "bundled" if model == "bundled" else random
            rows[Row("bench", model, weights)] = functools.partial(bench_row, model=model)
    if "presets" in sections:
        for base in sizes:
            for name in memory:
                row = Row("presets", f"{base.family} {name}", base.weights, (f"updates={updates}", *given))
                rows[row] = functools.partial(preset_row, base=base, memory=name)
    smallest = next((base for base, size in sizes.items() if size), None)
    if smallest is None:
        return rows
    if "cards" in sections:
        for shard, name in ((False, "data parallel"), (True, "sharded base")):
            rows[Row("cards", name, smallest.weights, given)] = functools.partial(cards_row, base=smallest, shard=shard)
    if "storage" in sections:
        for storage in STORAGES:
            row = Row("storage", storage, smallest.weights, given)
            rows[row] = functools.partial(storage_row, base=smallest, storage=storage)
        rows[Row("storage", "compile", f"{random}, {COMPILED}")] = compile_row
    return rows


def prove(
    rows: Mapping[Row, Show],
    work: Workplace,
    command: str,
    *,
    fresh: bool = False,
    retry: bool = False,
    report: Report = print_line,
) -> list[Line]:
    """Show all rows that ``prove.jsonl`` in the folder does not have, and write ``prove.md``.

    Args:
        rows: of `plan`.
        work: the folder and what rows work with.
        command: as a person gave it, for the table.
        fresh: forget the rows that are there.
        retry: show those again that failed or were not available.
        report: takes the progress lines.

    Returns:
        The lines of these rows.

    Raises:
        TDMError: the folder cannot be written.
    """
    path, scratch = work.folder / "prove.jsonl", work.folder / "work"
    if fresh:
        path.unlink(missing_ok=True)

    def done() -> dict[Row, Line]:
        lines = {line.row: line for line in read(path) if line.machine == work.machine and line.row in rows}
        return {row: lines[row] for row in rows if row in lines}

    kept = done()
    todo = [row for row in rows if row not in kept or (retry and kept[row].result.state != "ok")]
    begun = time.monotonic()
    for i, row in enumerate(todo):
        left = f"  ETA {duration((time.monotonic() - begun) / i * (len(todo) - i))}" if i else ""
        report(f"{row} ({row.weights}): row {i + 1} of {len(todo)}{left}")
        shutil.rmtree(scratch, ignore_errors=True)  # an interrupted row starts again
        start = time.monotonic()
        try:
            result = _shown(rows[row], work)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        report(f"  {result.state}: {result.text}")
        add(path, Line(row, work.machine, result, time.monotonic() - start))
        _write(work, command, done())
    lines = done()
    _write(work, command, lines)
    return list(lines.values())


def _shown(show: Show, work: Workplace) -> Result:
    """A row's result; whatever goes wrong in it is its result, too."""
    try:
        return show(work)
    except NotAvailableError as reason:
        return Result(str(reason), "not available")
    except (TDMError, DiedError, OSError, RuntimeError) as error:
        return Result(first_line(error), "failed")


def _write(work: Workplace, command: str, lines: Mapping[Row, Line]) -> None:
    with replacing(work.folder / "prove.md") as file:
        file.write(table(command, work.machine, lines.values()).encode())
