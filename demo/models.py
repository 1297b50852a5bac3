"""The third tab: the students to choose from, what each file contains, and a button that draws with one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..errors import TDMError
from ..pipelines.bases import BUNDLED
from ..pipelines.students.describe import about
from ..pipelines.students.locate import student_file
from .controls import MODEL, PRIVATE, explained
from .engine import Engine
from .generate import DRAW, GenerateTab


class ModelsTab:
    """The tab with the students. Build it inside a `gr.Blocks`.

    Args:
        engine: has the catalogue of students.
        generate: the tab that draws with the chosen student.
        tabs: the tabs of the page, which turn to that tab.
    """

    def __init__(self, engine: Engine, generate: GenerateTab, tabs: gr.Tabs) -> None:
        self.engine, self.generate = engine, generate
        self.controls = generate.controls
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
                    refresh = gr.Button("Refresh", min_width=120)
                self._verdict = gr.Markdown(elem_id="verdict")
            with gr.Column(scale=3, min_width=320):
                self._info = gr.Code(
                    self.about(engine.catalogue.first), label="What tdm info says", elem_id="info", interactive=False,
                    wrap_lines=True, lines=3, max_lines=40, show_line_numbers=False,
                )  # fmt: skip
        self.student.change(explained(self.about), self.student, self._info, **PRIVATE)
        refresh.click(self.listed, None, [self.student, self.controls.student], **PRIVATE)
        outputs = [self._verdict, *self.controls.of_student()]
        use.click(generate.give_way, generate.comparison, queue=False, **PRIVATE)
        used = use.click(explained(self.use), self.student, outputs, **MODEL, **PRIVATE)
        turned = used.success(lambda: gr.update(selected="generate"), None, tabs, **PRIVATE)
        turned.success(None, js=DRAW, **PRIVATE)

    def about(self, student: str | None) -> str:
        """Return what `tdm info` prints about a student, or what is wrong with its file."""
        path = ""
        try:
            path = self.engine.catalogue.source(student)
            path = str(student_file(path, {})) if path == BUNDLED else path
            text = about(path)
        except TDMError as error:
            text = f"not usable: {error}"
        return text.replace(path, student or path) if path else text  # where it lies is nobody's business

    def listed(self) -> list[Any]:
        """Read the folders of students again."""
        return [gr.update(choices=self.engine.catalogue.names())] * 2

    def use(self, student: str) -> Iterator[list[Any]]:
        """Put a student and its steps and sizes into the first tab, or say why it cannot draw."""
        try:
            yield ["", *self.generate.chosen(student)]
        except TDMError as error:
            yield [f"**It cannot draw here.** {error}", *[gr.skip()] * len(self.controls.of_student())]
            raise gr.Error(str(error), visible=False, print_exception=False) from None  # nothing is drawn
