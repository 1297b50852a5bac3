"""A question's answer for people: a table with intervals, and the curves over the network passes that they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from textwrap import wrap
from typing import Any

import torch
from PIL import Image

from ...errors import TDMError
from ...files import replacing
from ..cost import mean_passes
from ..metrics import bootstrap_interval
from .question import Question
from .runs import BASE, TEACHER, StudyRun, picture_folder, slug

Answer = Mapping[tuple[str, int], StudyRun]


def at_steps(question: Question, answer: Answer, steps: int) -> tuple[Question, dict[tuple[str, int], StudyRun]]:
    """The question and its answer at a step count: of unified students that learned it, and of those of it alone.

    Raises:
        TDMError: none was evaluated there.
    """
    name = f"{question.measure}/{steps}_steps"

    def measure_of(run: StudyRun) -> str:
        return question.measure if run.config["trajectory"]["steps"] == steps else name

    measured = _measured(answer, name, measure_of)
    if not measured:
        raise TDMError(f"no run of {question.name} was evaluated at {steps} steps")
    return replace(question, measure=name, name=f"{question.name}-{steps}-steps", reach=None), measured


def of_further(question: Question, answer: Answer, name: str) -> tuple[Question, dict[tuple[str, int], StudyRun]]:
    """The question and its answer by one of its further measures; of runs in which that was not taken, none."""
    further = question.further[name]
    about = replace(question, measure=name, name=f"{question.name}-{name}", **vars(further))
    return about, _measured(answer, name, lambda _: name)


def _measured(answer: Answer, name: str, measure_of: Callable[[StudyRun], str]) -> dict[tuple[str, int], StudyRun]:
    """The runs with a measure, which is called ``measure_of(run)`` in each, as ``name`` and no other."""

    def renamed(run: StudyRun) -> StudyRun:
        measure = measure_of(run)
        points = [replace(p, measures={name: p.measures[measure]}) for p in run.curve if measure in p.measures]
        return replace(run, curve=points)

    return {key: run for key, run in ((key, renamed(run)) for key, run in answer.items()) if run.curve}


def seeds_of(question: Question, answer: Answer, variant: str) -> list[StudyRun]:
    """The runs of a variant that are there."""
    return [answer[variant, seed] for seed in question.seeds if (variant, seed) in answer]


def reference(question: Question, answer: Answer, name: str) -> float | None:
    """The measure of the teacher or of the undistilled network, where it was taken."""
    run = answer.get((name, 0))
    return None if run is None else run.curve[0].measures.get(question.measure)


def at_updates(question: Question, run: StudyRun) -> float:
    """The measure after the question's updates: of the last evaluation up to there."""
    return [p.measures[question.measure] for p in run.curve if p.step <= question.updates][-1]


def at_passes(question: Question, run: StudyRun) -> float:
    """The measure after the question's network passes: of the last evaluation up to there."""
    budget = question.budget() * (1 + 1e-9)
    return [p.measures[question.measure] for p in run.curve if p.passes <= budget][-1]


def best_to_last(question: Question, run: StudyRun) -> tuple[float, float]:
    """The best and the last value of a run's measure."""
    values = [p.measures[question.measure] for p in run.curve]
    return (max if question.higher_is_better else min)(values), values[-1]


def reached(question: Question, run: StudyRun) -> tuple[int, float] | None:
    """(updates, network passes per sample) of the first evaluation at `question.reach` or beyond; None: none is."""
    assert question.reach is not None
    sign = 1 if question.higher_is_better else -1
    for point in run.curve:
        if sign * point.measures[question.measure] >= sign * question.reach:
            return point.step, point.passes
    return None


def interval(values: Sequence[float]) -> str:
    """``mean (low to high)``: a bootstrap interval over seeds, which of three says how far apart they are."""
    if not values:
        return "-"
    low, high = bootstrap_interval(torch.tensor(values, dtype=torch.float64))
    return f"{mean(values):.4g} ({low:.4g} to {high:.4g})" if len(values) > 1 else f"{values[0]:.4g}"


def table(question: Question, answer: Answer) -> str:
    """The answer as a Markdown table; what is not trained yet is a dash."""
    m = question.measure
    columns: dict[str, Callable[[Sequence[StudyRun]], str]] = {}
    if not question.passes_only:
        columns[f"{m}, {question.updates} updates"] = lambda runs: interval([at_updates(question, r) for r in runs])
    columns[f"{m}, equal passes"] = lambda runs: interval([at_passes(question, run) for run in runs])
    columns["best"] = lambda runs: interval([best_to_last(question, run)[0] for run in runs])
    columns["last"] = lambda runs: interval([best_to_last(question, run)[1] for run in runs])
    columns["seeds"] = lambda runs: str(len(runs))
    if question.reach is not None:
        columns[f"updates (passes) to {m} {question.reach:g}"] = lambda runs: _reached(question, runs)
    head = ["variant", "passes an update", *columns]
    rows = [head, ["---"] * len(head)]
    for name in (TEACHER, BASE):
        value = reference(question, answer, name)
        if value is not None:
            rows.append([name, "", f"{value:.4g}", *[""] * (len(head) - 3)])
    for variant in question.variants:
        runs = seeds_of(question, answer, variant)
        cost = f"{mean_passes(question.config(variant, question.seeds[0])):g}"
        rows.append([variant, cost, *(say(runs) for say in columns.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _reached(question: Question, runs: Sequence[StudyRun]) -> str:
    first = [reached(question, run) for run in runs]
    there = [f for f in first if f is not None]
    if not there:
        return f"not in {max(run.curve[-1].step for run in runs)}" if runs else "-"
    steps, costs = zip(*there, strict=True)
    some = "" if len(there) == len(first) else f", {len(there)} of {len(first)} seeds"
    return f"{min(steps)} to {max(steps)} ({min(costs):.0f} to {max(costs):.0f}){some}"


def grid(question: Question, results: Path, path: Path) -> bool:
    """What the first seed of each variant draws, from the same noise; False if nothing was kept."""
    names = (TEACHER, BASE, *question.variants)
    files = {name: picture_folder(results) / f"{slug(name)}.png" for name in names}
    images = {name: Image.open(file) for name, file in files.items() if file.is_file()}
    if not images:
        return False
    plt = _pyplot()
    shape = next(iter(images.values()))
    columns = min(len(images), max(1, 6 * shape.height // shape.width))
    rows = -(-len(images) // columns)
    width = 1.7 * columns if columns > 1 else 8.0
    height = width / columns * shape.height / shape.width + 0.3
    figure, axes = plt.subplots(rows, columns, figsize=(width, rows * height), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, image) in zip(axes.flat, images.items(), strict=False):
        axis.imshow(image)
        axis.set_title("\n".join(wrap(name, 24 if columns > 1 else 90)), fontsize=8)
    figure.tight_layout(pad=0.3)
    _save(figure, path)
    return True


def plot(question: Question, answer: Answer, path: Path) -> None:
    """The measure over network passes: a line is the mean over seeds, around it lowest and highest."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(10, 5), layout="constrained")
    for i, variant in enumerate(question.variants):
        runs = seeds_of(question, answer, variant)
        if not runs:
            continue
        colour = plt.get_cmap("tab10" if len(question.variants) <= 10 else "tab20")(i)
        values = list(zip(*([p.measures[question.measure] for p in run.curve] for run in runs), strict=True))
        x = [p.passes for p in runs[0].curve]
        axis.plot(x, [mean(v) for v in values], color=colour, label=variant, marker="." if len(x) < 30 else None)
        axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12, linewidth=0)
    # A distance, whose differences grow with it.
    log = not question.higher_is_better and 0 < axis.dataLim.y0 < math.inf
    for name, style in ((TEACHER, "--"), (BASE, ":")):
        value = reference(question, answer, name)
        if value is not None and (value > 0 or not log):  # the teacher has none to itself
            axis.axhline(value, color="grey", linestyle=style, linewidth=1, label=name)
    if log:
        axis.set_yscale("log")
    axis.set_xlabel("network passes per sample of the batch (a backward one counts as two)")
    axis.set_ylabel(question.measure)
    figure.suptitle(question.asks, fontsize=10, wrap=True)
    axis.grid(alpha=0.3)
    # Next to the curves: over them it hides some.
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
    _pyplot().close(figure)
