"""A distillation from the page: start, watch, stop, resume, and draw with what it learned."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import TDMError
from .cards import picture, plural
from .controls import MODEL, PRIVATE, explained
from .curves import curves
from .generate import GenerateTab
from .runs import Runs, State
from .settings import whole

EVERY = 2.0  # seconds between two looks at a run, while the tab is open


class DistilTab:
    """Build it inside a `gr.Blocks`, with the tabs around, which it turns to the first."""

    def __init__(self, runs: Runs, generate: GenerateTab, tabs: gr.Tabs) -> None:
        self.runs, self.generate = runs, generate
        controls = generate.controls
        known = runs.names()
        with gr.Row(elem_classes="work"):
            with gr.Column(scale=2, min_width=320):
                name = gr.Textbox("first", label="Name of a new run", max_lines=1, max_length=40, elem_id="run-name")
                config = gr.Dropdown(list(runs.configs), value="bundled", label="What is distilled", elem_id="config")
                with gr.Row():
                    updates = gr.Number(200, label="Updates", minimum=1, step=1, min_width=100, elem_id="updates")
                    seed = gr.Number(0, label="Seed of the run", minimum=0, step=1, min_width=100)
                more = gr.Textbox(
                    label="More settings, key=value, one a line",
                    info="As of tdm distill, such as student.lr=1e-4",
                    lines=2,
                    elem_id="more",
                )
                start = gr.Button("Start distilling", variant="primary", elem_classes="go", elem_id="start")
                self._run = gr.Dropdown(
                    known, value=known[0] if known else None, label="Run", elem_id="run", allow_custom_value=True
                )
                with gr.Row():
                    stop = gr.Button("Stop", min_width=80, elem_id="stop-run")
                    resume = gr.Button("Resume", min_width=80, elem_id="resume-run")
                    use = gr.Button("Draw with its student", min_width=160, elem_id="use-run")
            with gr.Column(scale=3, min_width=320):
                self._live = gr.HTML(elem_id="live", min_height=240, label="Run")
        self._timer = gr.Timer(EVERY, active=False)
        quick: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", **PRIVATE}
        asked = [name, config, updates, seed, more]
        start.click(explained(self.start), asked, [self._run, self._live], **quick)
        stop.click(explained(self.stop), self._run, self._live, **quick)
        resume.click(explained(self.resume), self._run, self._live, **quick)
        gr.on([self._timer.tick, self._run.change], self.look, self._run, self._live, **quick)
        tabs.select(self.turned, self._run, [self._timer, self._run, self._live], **quick)
        outputs = [controls.student, *controls.all()[1:4]]
        used = use.click(explained(self.use), [controls.prompt, self._run], outputs, **MODEL, **PRIVATE)
        used.success(lambda: gr.update(selected="generate"), None, tabs, **PRIVATE)

    def start(self, name: Any, config: Any, updates: Any, seed: Any, more: Any) -> list[Any]:
        """Begin a run, and show it."""
        own = [line.strip() for line in str(more or "").splitlines() if line.strip()]
        settings = [f"updates={whole('updates', updates, 1, 10**7)}", f"seed={whole('the seed', seed, 0, 2**31)}", *own]
        self.runs.start(str(name).strip(), config, settings)
        return [gr.update(choices=self.runs.names(), value=str(name).strip()), self.look(str(name).strip())]

    def stop(self, name: Any) -> str:
        """Ask a run to end with a checkpoint."""
        self.runs.stop(name)
        return self.look(name)

    def resume(self, name: Any) -> str:
        """Go on with it."""
        self.runs.resume(name)
        return self.look(name)

    def look(self, name: Any) -> str:
        """A run as it is now."""
        if not name:
            return '<p class="said" role="status">No run yet. The bundled teacher takes some minutes.</p>'
        try:
            return html(str(name), self.runs.state(name))
        except TDMError as error:
            return f'<p class="said" role="status">{escape(str(error))}</p>'

    def turned(self, run: Any, event: gr.SelectData) -> list[Any]:
        """Look at the run only while its tab is open."""
        here = event.value == "Distil"
        names = self.runs.names()
        run = run or (names[0] if names else None)
        shown = [gr.update(choices=names, value=run), self.look(run)] if here else [gr.skip(), gr.skip()]
        return [gr.Timer(active=here), *shown]

    def use(self, prompt: Any, name: Any) -> list[Any]:
        """Put the run's student into the first tab."""
        student = f"runs/{self.runs.student(name)}"
        steps, seed, size, chosen = self.generate.chosen(prompt, student)
        return [chosen, steps, seed, size]


def html(name: str, state: State) -> str:
    """A run: how far, how well, its curves and its newest preview."""
    if state.running:
        said = (
            f"{name}: update {state.step} of {state.updates}" if state.step else f"{name} begins: it reads its prompts"
        )
    elif state.finished:
        said = f"{name} is done: {plural(state.updates, 'update')}"
    else:
        said = f"{name} stopped at update {state.step} of {state.updates}"
    parts = [f'<p class="said" role="status">{escape(said)}</p>']
    parts.append(f'<progress max="{state.updates}" value="{state.step}" aria-label="Updates done"></progress>')
    parts.append(f'<p class="line">{escape(state.said[:300])}</p>')
    if state.lines:
        health = "".join(f"<li>{escape(alarm)}</li>" for alarm in state.alarms)
        parts.append(f"<h3>Health</h3><ul>{health}</ul>" if health else "<h3>Health</h3><p>No alarms.</p>")
        parts.append(f"<h3>Curves</h3>{curves(state.lines)}")
    if state.preview is not None:
        with Image.open(state.preview, formats=["PNG"]) as sheet:
            sheet.load()
        label = f"previews of {name} after update {int(state.preview.stem)}: teacher, student and critic"
        parts.append(f"<h3>Previews, update {int(state.preview.stem)}</h3>{picture(sheet, label)}")
    return f'<div class="run">{"".join(parts)}</div>'
