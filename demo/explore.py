"""The second tab: tables of pictures, steps or prompts against seeds, and the trajectory of one sample."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import TDMError
from ..sheet import contact_sheet
from .cards import picture, plural, status, strip, table
from .controls import MODEL, PRIVATE, error_line, explained, steps_choices
from .engine import Engine, Frame
from .pictures import Pictures
from .settings import MOST_STEPS, Settings, whole

MOST_CELLS = 64
STEPS, PROMPTS = "Steps", "Prompts"
EMPTY = '<div class="cell"></div>'
EXPLAINED = """
<div class="hint">
<p><b>Table</b>: each seed is a column. The rows are step counts of the first prompt, or all prompts.</p>
<p><b>Trajectory</b>: the clean picture that the student predicts after each network call, of the first prompt and
seed, in the most steps that are ticked.</p>
</div>
"""


@dataclass(frozen=True)
class Grid:
    """The settings of a table of pictures, by row and column.

    Attributes:
        rows: the settings of each row; all rows are of one length.
        side: a label for each row.
        head: a label for each column.
    """

    rows: list[list[Settings]]
    side: list[str]
    head: list[str]

    def __len__(self) -> int:
        return sum(map(len, self.rows))


def grid(first: Settings, prompts: list[str], steps: list[int], seeds: int, trained: Container[int]) -> Grid:
    """Make a table: each seed, counted up from the first's, is a column, and each prompt or step count is a row.

    The step counts that the student was trained for are labelled so.

    Raises:
        TDMError: several of both, or more cells than 64.
    """
    if len(prompts) > 1 and len(steps) > 1:
        raise TDMError("a table has several prompts or several step counts, not both")
    if not prompts or not steps:
        raise TDMError("a table needs a prompt and a step count at least")
    if (cells := len(prompts) * len(steps) * seeds) > MOST_CELLS:
        raise TDMError(f"{cells} pictures are too many for a table; at most {MOST_CELLS}")
    columns = range(first.seed, first.seed + seeds)
    rows = [[replace(first, prompt=p, steps=k, seed=seed) for seed in columns] for p in prompts for k in steps]
    side = prompts if len(prompts) > 1 else [plural(k, "step") + ", trained" * (k in trained) for k in steps]
    return Grid(rows, side, [f"seed {seed}" for seed in columns])


def draw_grid(engine: Engine, wanted: Grid) -> Iterator[list[list[Image.Image | None]]]:
    """Draw a table, and yield the pictures so far after each one."""
    drawn: list[list[Image.Image | None]] = [[None] * len(row) for row in wanted.rows]
    for y, row in enumerate(wanted.rows):
        for x, settings in enumerate(row):
            for frame in engine.student(settings):
                drawn[y][x] = frame.picture
            yield drawn


def save_grid(pictures: Pictures, wanted: Grid, drawn: list[list[Image.Image | None]]) -> Path:
    """Write a table as one PNG."""
    rows = [[image for image in row if image is not None] for row in drawn]
    labels = ["\n".join(textwrap.wrap(text, 24)) for text in wanted.side]
    sheet = contact_sheet(rows, labels, wanted.head, side=128)
    return pictures.save_sheet(sheet, f"table {wanted.rows[0][0].prompt}")


def save_strip(pictures: Pictures, frames: list[Frame], settings: Settings) -> Path:
    """Write a trajectory as one PNG."""
    sheet = contact_sheet([[f.picture for f in frames]], ["predicted"], [_label(f) for f in frames], side=128)
    return pictures.save_sheet(sheet, f"trajectory {settings.prompt}")


def _label(frame: Frame) -> str:
    return "picture" if frame.final else f"step {frame.step}, t\xa0=\xa0{frame.timestep:.0f}"


@dataclass(frozen=True)
class View:
    """A drawing as the tab shows it.

    Attributes:
        html: the pictures so far.
        progress: how far the drawing is, as in "3 of 16 pictures".
        finished: whether all of it is drawn.
    """

    html: str
    progress: str
    finished: bool = False


class ExploreTab:
    """The tab that draws tables and trajectories. Build it inside a `gr.Blocks`.

    Args:
        engine: draws.
        pictures: keeps the sheets.
        student: the component with the student's name.
    """

    def __init__(self, engine: Engine, pictures: Pictures, student: gr.Dropdown) -> None:
        self.engine, self.pictures = engine, pictures
        recipe = engine.recipe()
        with gr.Row(elem_classes="work"):
            with gr.Column(scale=2, min_width=320):
                prompts = gr.Textbox(
                    "two red stars above a blue ball at night" if engine.base == "bundled" else "a red fox in the snow",
                    label="Prompts, one a line",
                    lines=3,
                    max_lines=12,
                    elem_id="prompts",
                )
                rows = gr.Radio([STEPS, PROMPTS], value=STEPS, label="Rows of the table", elem_id="rows")
                steps = gr.CheckboxGroup(
                    steps_choices(recipe), value=[1, 2, 4, 8], label="Steps", elem_id="table-steps"
                )
                with gr.Row():
                    seed = gr.Number(0, label="First seed", minimum=0, step=1, min_width=160)
                    seeds = gr.Slider(1, 8, value=4, step=1, label="Seeds", min_width=160)
                with gr.Row():
                    go = gr.Button("Draw the table", variant="primary", elem_classes="go", elem_id="table")
                    stop = gr.Button("Stop", scale=0, min_width=90, elem_id="stop-table")
                trajectory = gr.Button("Show one trajectory", elem_id="trajectory")
            with gr.Column(scale=3, min_width=320):
                self._shown = gr.HTML(EXPLAINED, elem_id="explored", min_height=200, label="Table")
                self._file = gr.DownloadButton("Download as one picture", visible=False, size="sm")
        self._view = gr.State(None, time_to_live=24 * 3600)  # the `View` that the visitor saw last
        inputs, outputs = [prompts, rows, steps, seed, seeds, student], [self._shown, self._file, self._view]
        shown: dict[str, Any] = {"show_progress_on": self._shown, **MODEL, **PRIVATE}
        drawings: list[dict[str, Any]] = [
            button.click(explained(self._closed(function)), [*inputs, self._view], outputs, **shown)
            for button, function in ((go, self.table), (trajectory, self.trajectory))
        ]
        stop.click(self.stop, self._view, self._shown, queue=False, show_progress="hidden", **PRIVATE)
        stop.click(None, cancels=drawings, queue=False, **PRIVATE)
        student.change(self.marked, student, steps, show_progress="hidden", **PRIVATE)

    def marked(self, student: Any) -> Any:
        """Mark the step counts that a student was trained for; a wrong file is explained elsewhere."""
        try:
            return gr.update(choices=steps_choices(self.engine.recipe(student)))
        except TDMError:
            return gr.skip()

    def _first(self, prompts: Any, steps: Any, seed: Any, student: Any) -> tuple[Settings, list[str]]:
        lines = [line for line in str(prompts or "").splitlines() if line.strip()] or [""]
        checked = [
            self.engine.settings({"prompt": line, "steps": steps, "seed": seed, "student": student}) for line in lines
        ]
        return checked[0], [settings.prompt for settings in checked]

    def table(
        self, prompts: Any, rows: Any, steps: Any, seed: Any, seeds: Any, student: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw cell by cell, with the time that is left; then the sheet."""
        first, lines = self._first(prompts, None, seed, student)
        columns = whole("the number of seeds", seeds, 1, 8)
        if rows == STEPS:
            lines, counts = lines[:1], sorted(whole("steps", k, 1, MOST_STEPS) for k in steps or [])
        else:
            counts = [first.steps]
        wanted = grid(first, lines, counts, columns, self.engine.recipe(first.student).trained_timesteps)
        begun = time.monotonic()
        total = plural(len(wanted), "picture")
        yield self._show(View(self._html(wanted, []), f"0 of {total}")) | {self._file: gr.update(visible=False)}
        for done, drawn in enumerate(draw_grid(self.engine, wanted), 1):
            spent = time.monotonic() - begun
            view = View(self._html(wanted, drawn), f"{done} of {total}")
            if done < len(wanted):
                yield self._show(view, f"{view.progress}, {spent / done * (len(wanted) - done):.0f} s left")
        yield self._show(replace(view, finished=True), f"{total} in {spent:.1f} s.")
        yield {self._file: gr.update(value=save_grid(self.pictures, wanted, drawn), visible=True)}

    def trajectory(
        self, prompts: Any, _rows: Any, steps: Any, seed: Any, _seeds: Any, student: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw the clean picture predicted at each step, of the first prompt, in the most steps that are ticked."""
        most = max((whole("steps", k, 1, MOST_STEPS) for k in steps or []), default=None)
        settings, _ = self._first(prompts, most, seed, student)
        frames: list[Frame] = []
        for frame in self.engine.student(settings):
            frames.append(frame)
            cells = [picture(f.picture, f"{settings.prompt}: {_label(f)}") for f in frames]
            view = View(strip(cells, [_label(f) for f in frames]), f"step {frame.step} of {frame.steps}", frame.final)
            yield self._show(view, f"Step {frame.step} of {frame.steps}, seed {settings.seed}.")
        yield {self._file: gr.update(value=save_strip(self.pictures, frames, settings), visible=True)}

    def stop(self, view: View | None) -> Any:
        """Say below the pictures where the visitor's Stop ended the drawing."""
        if view is None or view.finished:
            gr.Info("nothing is being drawn")
            return gr.skip()
        return view.html + status(f"Stopped at {view.progress}.")

    def _closed(self, function: Callable[..., Iterator[dict[Any, Any]]]) -> Callable[..., Iterator[dict[Any, Any]]]:
        """Make a drawing that fails say so below the pictures, which stay."""

        def drawing(*values: Any) -> Iterator[dict[Any, Any]]:
            *inputs, view = values
            try:
                for update in function(*inputs):
                    view = update.get(self._view, view)
                    yield update
            except Exception as error:
                shown = replace(view or View("", ""), finished=True)
                yield self._show(shown, f"Not drawn: {error_line(error)}")
                raise

        return drawing

    def _show(self, view: View, line: str = "") -> dict[Any, Any]:
        return {self._shown: view.html + status(line or view.progress), self._view: view}

    def _html(self, wanted: Grid, drawn: list[list[Image.Image | None]]) -> str:
        cells = []
        for y, row in enumerate(wanted.rows):
            images = drawn[y] if drawn else [None] * len(row)
            cells.append(
                [
                    picture(image, f"{s.prompt}, {plural(s.steps, 'step')}, seed {s.seed}") if image else EMPTY
                    for image, s in zip(images, row, strict=True)
                ]
            )
        return table(cells, wanted.head, wanted.side, "Pictures by row and seed")
