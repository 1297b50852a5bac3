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


@dataclass
class Drawing:
    """What a visitor asked for, from the click to the last picture. Stop and a newer request end it.

    Attributes:
        draw: draws it: takes the values of the tab's components and this, and yields updates of the page.
        html: the pictures so far.
        progress: how far the drawing is, as in "3 of 16 pictures"; "" until it begins.
        begun: whether an event of the page draws it.
        finished: whether nothing more comes: all is drawn, or an error ended it.
        ended: why it was ended early; it draws no further once this is set.
    """

    draw: Callable[..., Iterator[dict[Any, Any]]]
    html: str = ""
    progress: str = ""
    begun: bool = False
    finished: bool = False
    ended: str = ""

    def end(self, why: str) -> bool:
        """Let it draw no further, and return whether there was anything to end."""
        if self.finished or self.ended:
            return False
        self.ended = why
        return True


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
        self._drawing = gr.State(None, time_to_live=24 * 3600)  # the visitor's newest `Drawing`
        inputs, outputs = [prompts, rows, steps, seed, seeds, student, self._drawing], [self._shown, self._file]
        shown: dict[str, Any] = {"show_progress_on": self._shown, **MODEL, **PRIVATE}
        for button, ask in ((go, self.ask_table), (trajectory, self.ask_trajectory)):
            asked = button.click(ask, self._drawing, self._drawing, queue=False, show_progress="hidden", **PRIVATE)
            asked.then(explained(self.draw), inputs, outputs, trigger_mode="always_last", **shown)
        # No `cancels`: Gradio would drop what is asked for before it has ended the older event.
        stop.click(self.stop, self._drawing, self._shown, queue=False, show_progress="hidden", **PRIVATE)
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

    def ask_table(self, older: Drawing | None) -> Drawing:
        """Ask for a table in the place of what the visitor asked for before."""
        return self._ask(self._table, older)

    def ask_trajectory(self, older: Drawing | None) -> Drawing:
        """Ask for a trajectory in the place of what the visitor asked for before."""
        return self._ask(self._trajectory, older)

    def _ask(self, draw: Callable[..., Iterator[dict[Any, Any]]], older: Drawing | None) -> Drawing:
        if older is None:
            return Drawing(draw)
        older.end("Something else was asked for.")
        return Drawing(draw, older.html)

    def draw(self, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw the visitor's newest request, unless another event does or it was stopped while it waited. One that
        fails says so below the pictures, which stay.
        """
        drawing: Drawing = values[-1]
        if drawing.begun or drawing.ended:
            yield {self._shown: gr.skip()}  # Gradio empties the outputs of a generator that yields nothing
            return
        drawing.begun = True
        try:
            for update in drawing.draw(*values):
                yield update
                if drawing.ended:
                    yield self._show(drawing, drawing.ended)
                    return
        except Exception as error:
            yield self._show(drawing, f"Not drawn: {error_line(error)}")
            raise
        finally:
            drawing.finished = True

    def _table(
        self, prompts: Any, rows: Any, steps: Any, seed: Any, seeds: Any, student: Any, drawing: Drawing
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
        drawing.html, drawing.progress = self._html(wanted, []), f"0 of {total}"
        yield self._show(drawing) | {self._file: gr.update(visible=False)}
        for done, drawn in enumerate(draw_grid(self.engine, wanted), 1):
            spent = time.monotonic() - begun
            drawing.html, drawing.progress = self._html(wanted, drawn), f"{done} of {total}"
            if done < len(wanted):
                yield self._show(drawing, f"{drawing.progress}, {spent / done * (len(wanted) - done):.0f} s left")
        drawing.finished = True
        yield self._show(drawing, f"{total} in {spent:.1f} s.")
        yield {self._file: gr.update(value=save_grid(self.pictures, wanted, drawn), visible=True)}

    def _trajectory(
        self, prompts: Any, _rows: Any, steps: Any, seed: Any, _seeds: Any, student: Any, drawing: Drawing
    ) -> Iterator[dict[Any, Any]]:
        """Draw the clean picture predicted at each step, of the first prompt, in the most steps that are ticked."""
        most = max((whole("steps", k, 1, MOST_STEPS) for k in steps or []), default=None)
        settings, _ = self._first(prompts, most, seed, student)
        frames: list[Frame] = []
        for frame in self.engine.student(settings):
            frames.append(frame)
            cells = [picture(f.picture, f"{settings.prompt}: {_label(f)}") for f in frames]
            drawing.html = strip(cells, [_label(f) for f in frames])
            drawing.progress, drawing.finished = f"step {frame.step} of {frame.steps}", frame.final
            yield self._show(drawing, f"Step {frame.step} of {frame.steps}, seed {settings.seed}.")
        yield {self._file: gr.update(value=save_strip(self.pictures, frames, settings), visible=True)}

    def stop(self, drawing: Drawing | None) -> Any:
        """End the drawing of a visitor who presses Stop, and say below the pictures how far it came."""
        if drawing is None or not drawing.end(
            f"Stopped at {drawing.progress}." if drawing.progress else "Stopped before it began."
        ):
            gr.Info("nothing is being drawn")
            return gr.skip()
        return self._show(drawing, drawing.ended)[self._shown]

    def _show(self, drawing: Drawing, line: str = "") -> dict[Any, Any]:
        return {self._shown: drawing.html + status(line or drawing.progress)}

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
