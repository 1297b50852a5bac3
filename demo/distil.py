"""The fourth tab: start a distillation, watch, stop and resume it, and draw with its student."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import TDMError
from .cards import enlargeable, plural, status
from .controls import MODEL, PRIVATE, explained
from .curves import curves
from .generate import DRAW, GenerateTab
from .runs import Runs, State
from .settings import whole

EVERY = 2.0  # seconds between two updates of the page, while the tab is open
# Sooner than `tdm distill` does by itself, for people who watch. The student is the same.
OFTEN = "output.log_every=5\noutput.preview_every=20\noutput.checkpoint_every=20"
EXPLAINED = """
<div class="hint"><p class="status" role="status">No run yet.</p>
<p>A run is <code>tdm distill</code> in a separate process: this page may be closed, and the demo ended. Its curves,
its health and what teacher and student draw appear here. The bundled teacher takes minutes on a CPU; as soon as there
is a checkpoint the student draws in the first tab.</p></div>
"""


class DistilTab:
    """The tab that distils. Build it inside a `gr.Blocks`.

    Args:
        runs: the runs that it starts and watches.
        generate: the tab that draws with a run's student.
        tabs: the tabs of the page, which turn to that tab.
    """

    def __init__(self, runs: Runs, generate: GenerateTab, tabs: gr.Tabs) -> None:
        self.runs, self.generate = runs, generate
        known = runs.names()
        with gr.Row(elem_classes="work"):
            with gr.Column(scale=2, min_width=320):
                self._name = gr.Textbox(
                    runs.free_name(), label="Name of a new run", max_lines=1, max_length=40, elem_id="run-name"
                )
                config = gr.Dropdown(list(runs.configs), value="bundled", label="What is distilled", elem_id="config")
                with gr.Row():
                    updates = gr.Number(200, label="Updates", minimum=1, step=1, min_width=100, elem_id="updates")
                    seed = gr.Number(0, label="Seed of the run", minimum=0, step=1, min_width=100)
                more = gr.Textbox(
                    OFTEN,
                    label="More settings, key=value, one a line",
                    info="As of tdm distill: student.lr=1e-4, batch_size=16; these say how often there is news",
                    lines=3,
                    elem_id="more",
                )
                start = gr.Button("Start distilling", variant="primary", elem_classes="go", elem_id="start")
                self._run = gr.Dropdown(
                    known, value=known[0] if known else None, label="Run", elem_id="run", allow_custom_value=True
                )
                with gr.Row():
                    self._stop = gr.Button("Stop", min_width=80, elem_id="stop-run", interactive=False)
                    self._resume = gr.Button("Resume", min_width=80, elem_id="resume-run", interactive=False)
                self._use = gr.Button("Draw with its student", elem_id="use-run", interactive=False)
            with gr.Column(scale=3, min_width=320):
                self._live = gr.HTML(EXPLAINED, elem_id="live", min_height=240, label="Run")
        self._timer = gr.Timer(EVERY, active=False)
        quick: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", **PRIVATE}
        inputs = [self._name, config, updates, seed, more]
        shown = [self._live, self._stop, self._resume, self._use]
        start.click(explained(self.start), inputs, [self._name, self._run, *shown], **quick)
        self._stop.click(explained(self.stop), self._run, shown, **quick)
        self._resume.click(explained(self.resume), self._run, shown, **quick)
        gr.on([self._timer.tick, self._run.change], self.watch, self._run, shown, **quick)
        tabs.select(self.tab_selected, [self._name, self._run], [self._timer, self._name, self._run, *shown], **quick)
        self._use.click(generate.give_way, generate.comparison, queue=False, **PRIVATE)
        used = self._use.click(explained(self.use), self._run, generate.controls.of_student(), **MODEL, **PRIVATE)
        turned = used.success(lambda: gr.update(selected="generate"), None, tabs, **PRIVATE)
        turned.success(None, js=DRAW, **PRIVATE)

    def start(self, name: Any, config: Any, updates: Any, seed: Any, more: Any) -> list[Any]:
        """Begin a run, and show it."""
        extra = [line.strip() for line in str(more or "").splitlines() if line.strip()]
        settings = [
            f"updates={whole('updates', updates, 1, 10**7)}",
            f"seed={whole('the seed', seed, 0, 2**31)}",
            *extra,
        ]
        self.runs.start(str(name).strip(), config, settings)
        chosen = gr.update(choices=self.runs.names(), value=str(name).strip())
        return [self.runs.free_name(), chosen, *self.watch(str(name).strip())]

    def stop(self, name: Any) -> list[Any]:
        """Ask a run to end with a checkpoint."""
        self.runs.stop(name)
        return self.watch(name)

    def resume(self, name: Any) -> list[Any]:
        """Resume a run from its last checkpoint."""
        self.runs.resume(name)
        return self.watch(name)

    def watch(self, name: Any) -> list[Any]:
        """Show a run as it is now, and switch on those of its buttons (stop, resume, draw) that it can follow."""
        try:
            state = self.runs.state(name) if name else None
        except TDMError as error:
            state, shown = None, status(str(error))
        else:
            shown = html(str(name), state) if state else EXPLAINED
        running = state is not None and state.running
        can = [running, state is not None and not running and not state.finished, state is not None and state.resumable]
        return [shown, *(gr.update(interactive=bool(each)) for each in can)]

    def tab_selected(self, name: Any, run: Any, event: gr.SelectData) -> list[Any]:
        """Watch the run while the tab is open, and only then."""
        if event.value != "Distil":
            return [gr.Timer(active=False), *[gr.skip()] * 6]
        names = self.runs.names()
        run = run or (names[0] if names else None)
        free = self.runs.free_name() if name in names else gr.skip()
        return [gr.Timer(active=True), free, gr.update(choices=names, value=run), *self.watch(run)]

    def use(self, name: Any) -> list[Any]:
        """Put the run's student into the first tab."""
        return self.generate.chosen(f"runs/{self.runs.student(name)}")


def _left(state: State) -> str:
    """The time to go at the latest pace; the line of an alarm has none."""
    pace = next((line["seconds_per_update"] for line in reversed(state.lines) if "seconds_per_update" in line), 0.0)
    seconds = pace * (state.updates - state.step)
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _headline(name: str, state: State) -> str:
    if state.running and state.step:
        return f"{name}: update {state.step} of {state.updates}, {_left(state)} left"
    if state.running:
        return f"{name} begins: it loads its teacher and encodes its prompts"
    if state.finished:
        return f"{name} is done: {plural(state.updates, 'update')}"
    how = "was stopped" if state.stopped else "ended with an error"
    return f"{name} {how} at update {state.step} of {state.updates}"


def html(name: str, state: State) -> str:
    """A run: how far, how well, its curves and its newest preview."""
    sections = [status(_headline(name, state))]
    sections.append(f'<progress max="{state.updates}" value="{state.step}" aria-label="Updates done"></progress>')
    if not state.running:  # while it runs, the last line repeats the curves' figures, or is a remark of a library
        sections.append(f'<p class="line">{escape(state.last_line[:300])}</p>')
    if state.lines:
        health = "".join(f"<li>{escape(alarm)}</li>" for alarm in state.alarms)
        sections.append(f"<h3>Health</h3><ul>{health}</ul>" if health else "<h3>Health</h3><p>No alarms.</p>")
        sections.append(f"<h3>Curves</h3>{curves(state.lines)}")
    if state.preview is not None:
        with Image.open(state.preview, formats=["PNG"]) as sheet:
            sheet.load()
        label = f"previews of {name} after update {int(state.preview.stem)}: teacher, student and critic"
        sections.append(f"<h3>Previews, update {int(state.preview.stem)}: a click enlarges</h3>")
        sections.append(enlargeable(sheet, label))
    return f'<div class="run">{"".join(sections)}</div>'
