"""What `tdm eval` writes of its rows: a table, everything with intervals, plots."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import replacing
from .evaluate import Row
from .measure import EXPLAINED, Measures
from .metrics.bootstrap import Value
from .metrics.colours import COLOURS

INTERVALS = "In brackets: 95 %, by bootstrap over prompts; in a row of several students: the lowest and the highest."
CACHED = "†: measured when the pictures were drawn, in an earlier evaluation."


def over_students(rows: Sequence[Row]) -> list[Row]:
    """A row of their means for several students that were run alike, with as many steps, at one strength and by the
    base first or not; the intervals are their ranges.
    """
    alike: dict[tuple[float | None, int, bool], list[Row]] = {}
    for row in rows:
        if row.student is not None:
            alike.setdefault((row.strength, row.steps, row.base_first), []).append(row)
    summaries = []
    for (strength, steps, base_first), same in alike.items():
        if len(same) < 2:
            continue
        at = "" if strength is None else f" at {strength:g}"
        tables = ("values", "attributes", "combinations", "spectrum")
        measures = Measures(**{t: _together([getattr(row.measures, t) for row in same]) for t in tables})
        summaries.append(
            Row(
                name=f"mean of {len(same)}{at}, {steps} step{'s' * (steps > 1)}{', base first' * base_first}",
                steps=steps,
                calls=sum(row.calls for row in same) / len(same),
                seconds=sum(row.seconds for row in same) / len(same),
                cached=False,
                student=None,
                strength=strength,
                base_first=base_first,
                measures=measures,
            )
        )
    return summaries


def _together(tables: list[dict[str, Value]]) -> dict[str, Value]:
    means = {}
    for name in (name for name in tables[0] if all(name in table for table in tables)):
        values = [table[name].value for table in tables]
        means[name] = Value(sum(values) / len(values), min(values), max(values))
    return means


def table(rows: Sequence[Row]) -> str:
    """The most important of the rows as a Markdown table."""
    short = {"brightness": "bright", "contrast": "contrast", "saturation": "saturation"}
    head = ["sampler", "calls", "s / picture", "accuracy", "distance", "diversity", *short.values(), "sharpness"]
    lines = []
    for row in rows:
        values = row.measures.values
        lines.append(
            [
                row.name,
                f"{row.calls:g}",
                f"{row.seconds:.3f}{'†' * row.cached}",
                cell(values.get("accuracy")),
                cell(values["distance"]),
                f"{values['diversity'].value:.2f}" if "diversity" in values else "",
                *(f"{values[name].value:.3f}" if name in values else "" for name in (*COLOURS, "sharpness")),
            ]
        )
    return _markdown(head, lines)


def cell(value: Value | None) -> str:
    """A number with its interval."""
    if value is None:
        return ""
    interval = "" if value.low is None or value.high is None else f" ({value.low:.3f}, {value.high:.3f})"
    return f"{value.value:.3f}{interval}"


def report(rows: Sequence[Row]) -> str:
    """Everything, in Markdown."""
    sections = [f"{table(rows)}\n\n{INTERVALS} {CACHED if any(row.cached for row in rows) else ''}"]
    first = rows[0].measures
    sections.append("Over the teacher's:\n\n" + _wide(rows, "values", ["diversity", *COLOURS]))
    others = [name for name in EXPLAINED if name in first.values]
    explanations = "\n".join(f"- `{name}`: {EXPLAINED[name]}" for name in others)
    sections.append(f"{explanations}\n\n" + _wide(rows, "values", others))
    sections.append("Power by wavelength, over the teacher's:\n\n" + _wide(rows, "spectrum", list(first.spectrum)))
    if first.attributes:
        sections.append("Accuracy by attribute:\n\n" + _wide(rows, "attributes", list(first.attributes)))
        sections.append("Accuracy by held-out combination:\n\n" + _wide(rows, "combinations", list(first.combinations)))
    return "\n\n".join(part.strip() for part in sections) + "\n"


def _wide(rows: Sequence[Row], kind: str, names: Sequence[str]) -> str:
    lines = [[row.name, *(cell(getattr(row.measures, kind).get(name)) for name in names)] for row in rows]
    return _markdown(["sampler", *names], lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def as_json(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """The settings, and every row with {"value", "low", "high"} for each number."""
    entries = []
    for row in rows:
        plain = asdict(row)
        measures = {
            kind: {name: value._asdict() for name, value in values.items()}
            for kind, values in vars(row.measures).items()
        }
        entries.append({**plain, "measures": measures})
    return json.dumps({"settings": settings, "rows": entries}, indent=1, allow_nan=False)


def plot(rows: Sequence[Row]) -> Image.Image:
    """Accuracy by attribute, power by wavelength, and diversity against distance."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    first = rows[0].measures
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    colours: dict[str, Any] = {row.name: f"C{i}" for i, row in enumerate(rows)}
    if len(rows) > 10:
        from matplotlib import colormaps

        colours = {row.name: colormaps["viridis"](i / len(rows)) for i, row in enumerate(rows)}
    grid = figure.add_gridspec(2, 2)
    if first.attributes:
        axes = figure.add_subplot(grid[0, :])
        names = ["all", *first.attributes]
        width = 0.85 / len(rows)
        for i, row in enumerate(rows):
            values = [row.measures.values["accuracy"], *(row.measures.attributes[name] for name in names[1:])]
            at = [j + (i - (len(rows) - 1) / 2) * width for j in range(len(names))]
            axes.bar(
                at, [v.value for v in values], width, yerr=_bars(values), color=colours[row.name],
                error_kw={"elinewidth": 0.8},
            )  # fmt: skip
        axes.set_xticks(range(len(names)), names)
        axes.set(ylim=(0, 1.02), title="accuracy by attribute")
    axes = figure.add_subplot(grid[1, 0])
    for row in rows:
        bands = row.measures.spectrum
        values = list(bands.values())
        axes.errorbar(
            list(bands), [v.value for v in values], yerr=_bars(values), marker="o", ms=3,
            color=colours[row.name], capsize=2,
        )  # fmt: skip
    axes.axhline(1, color="grey", lw=0.8, zorder=0)
    axes.set_title("power by wavelength, over the teacher's")
    axes = figure.add_subplot(grid[1, 1])
    for row in rows:
        x, y = row.measures.values["distance"], row.measures.values.get("diversity")
        if y is None:
            continue
        axes.errorbar(
            x.value, y.value, xerr=_bars([x]), yerr=_bars([y]), marker="o", color=colours[row.name], label=row.name
        )
    axes.axhline(1, color="grey", lw=0.8, zorder=0)
    axes.set(xlabel="distance to the teacher", ylabel="diversity, over the teacher's")
    axes.set_xscale("symlog", linthresh=0.1)  # about what good students have, and below 0 for equal samplers
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_title("diversity and distance")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=100)
    return Image.open(written)


def _bars(values: Sequence[Value]) -> list[list[float]]:
    """Lengths of the error bars below and above."""
    below = [v.value - v.low if v.low is not None else 0.0 for v in values]
    above = [v.high - v.value if v.high is not None else 0.0 for v in values]
    return [[max(0.0, length) for length in lengths] for lengths in (below, above)]


def write(rows: Sequence[Row], sheet: Image.Image, folder: Path, settings: dict[str, Any]) -> None:
    """``eval.json``, ``eval.md``, ``eval.png`` and ``grid.png`` in ``folder``.

    Raises:
        TDMError: a file cannot be written.
    """
    for name, text in (("eval.json", as_json(rows, settings)), ("eval.md", report(rows))):
        with replacing(folder / name) as file:
            file.write(text.encode())
    for name, image in (("eval.png", plot(rows)), ("grid.png", sheet)):
        with replacing(folder / name) as file:
            image.save(file, format="PNG")
