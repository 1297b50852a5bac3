"""Which students there are, what each file says of itself, and which one draws."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..errors import TDMError
from ..pipelines.bases import BUNDLED
from ..pipelines.students.describe import about
from ..pipelines.students.locate import student_file
from .controls import MODEL, PRIVATE, explained
from .engine import Engine
from .generate import Controls, GenerateTab


class ModelsTab:
    """Build it inside a `gr.Blocks`, with the tabs around, which it turns to the first."""

    def __init__(self, engine: Engine, generate: GenerateTab, tabs: gr.Tabs) -> None:
        self.engine, self.generate = engine, generate
        self.controls: Controls = generate.controls
        folders = " and ".join(engine.catalogue.folders)
        where = f"{engine.catalogue.first}, and the files in the folders {folders}"
        if "students" not in engine.catalogue.folders:
            where = f"{engine.catalogue.first}, and those of runs; --students-folder adds a folder of files"
        with gr.Row(elem_classes="work"):
            with gr.Column(scale=2, min_width=320):
                self.student = gr.Dropdown(
                    engine.catalogue.names(),
                    value=engine.catalogue.first,
                    label="Student",
                    info=where,
                    allow_custom_value=True,
                    elem_id="model",
                )
                with gr.Row():
                    use = gr.Button("Draw with it", variant="primary", elem_id="use")
                    again = gr.Button("Look again", min_width=120)
                self._verdict = gr.Markdown(elem_id="verdict")
            with gr.Column(scale=3, min_width=320):
                self._info = gr.Code(
                    self.say(engine.catalogue.first), label="What tdm info says", elem_id="info", interactive=False,
                    wrap_lines=True, lines=3, max_lines=40, show_line_numbers=False,
                )  # fmt: skip
        self.student.change(explained(self.say), self.student, self._info, **PRIVATE)
        again.click(self.listed, None, [self.student, self.controls.student], **PRIVATE)
        outputs = [self._verdict, *self.controls.of_student()]
        used = use.click(self.use, self.student, outputs, **MODEL, **PRIVATE)
        used.success(lambda said: gr.update(selected="models" if said else "generate"), self._verdict, tabs, **PRIVATE)

    def say(self, student: str | None) -> str:
        """What `tdm info` says about a student; of a wrong file, what is wrong."""
        path = ""
        try:
            path = self.engine.catalogue.source(student)
            path = str(student_file(path, {})) if path == BUNDLED else path
            text = about(path)
        except TDMError as error:
            text = f"not usable: {error}"
        return text.replace(path, student or path) if path else text  # where it lies is nobody's business

    def listed(self) -> list[Any]:
        """Look into the folders again."""
        return [gr.update(choices=self.engine.catalogue.names())] * 2

    def use(self, student: str) -> list[Any]:
        """Put a student's steps and sizes into the first tab; of one that does not fit, say why."""
        try:
            return ["", *self.generate.chosen(student)]
        except TDMError as error:
            return [f"**It cannot draw here.** {error}", *[gr.skip()] * len(self.controls.of_student())]
