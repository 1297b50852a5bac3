"""The first tab: a prompt, one button, and the student's picture beside its teacher's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import TDMError
from ..pipelines.vocabulary import unknown_words
from .compare import Comparison
from .controls import (
    BUNDLED_PROMPTS,
    MODEL,
    OTHER_PROMPTS,
    PRIVATE,
    explained,
    parse_size,
    size_choices,
    size_text,
    steps_choices,
)
from .engine import Engine
from .pictures import Pictures, read_settings
from .settings import MOST_PICTURES, Settings, whole

REMEMBERED = 24  # pictures in a visitor's gallery
DICE = "() => Math.floor(Math.random() * 2 ** 31)"
SHARE = "(...settings) => { tdm.share(settings); return []; }"


@dataclass
class Controls:
    """The components that other tabs and links set, in the order of `values`."""

    prompt: gr.Textbox
    steps: gr.Radio
    seed: gr.Number
    size: gr.Dropdown
    student: gr.Dropdown
    base_first: gr.Checkbox

    def all(self) -> list[Any]:
        """In this order everywhere."""
        return [self.prompt, self.steps, self.seed, self.size, self.student, self.base_first]

    def of_student(self) -> list[Any]:
        """Those that another student changes."""
        return [self.steps, self.size, self.student]

    def values(self, engine: Engine, settings: Settings) -> list[Any]:
        """Updates that put settings into the components."""
        recipe = engine.recipe(settings.student)
        return [
            settings.prompt,
            gr.update(choices=steps_choices(recipe, settings.steps), value=settings.steps),
            settings.seed,
            gr.update(choices=size_choices(recipe), value=size_text(settings.width, settings.height)),
            gr.update(choices=engine.catalogue.names(), value=settings.student),
            settings.base_first,
        ]


class GenerateTab:
    """Build it inside a `gr.Blocks`.

    Attributes:
        controls: what is asked for.
    """

    def __init__(self, engine: Engine, pictures: Pictures) -> None:
        self.engine, self.pictures = engine, pictures
        self._opening: Comparison | None = None  # what every visitor sees first is drawn once
        self._newest: dict[str | None, object] = {}  # of each visitor, the wish that is being drawn
        prompts = BUNDLED_PROMPTS if engine.base == "bundled" else OTHER_PROMPTS
        self.first = engine.settings({"prompt": prompts[0]})
        with gr.Row(elem_classes="first"):
            with gr.Column(elem_classes="ask"):
                prompt, go, stop = self._ask(prompts)
            with gr.Column(elem_classes="shown"):
                blank = Comparison(engine, [self.first], race=True).html()
                self._stage = gr.HTML(blank, elem_id="stage", label="Pictures", min_height=320)
                self._slider = gr.ImageSlider(
                    label="Student | teacher: drag to compare",
                    interactive=False,
                    format="png",
                    buttons=["fullscreen"],
                    elem_id="slider",
                    height=422,  # with its border; with or without pictures: nothing below it moves when they come
                    max_height=420,
                )
                self._download = gr.DownloadButton("Download PNG, settings inside", visible=False, size="sm")
                self._gallery = gr.Gallery(
                    label="Your pictures: each gives its settings back",
                    columns=6,
                    fit_columns=False,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    visible=False,
                    elem_id="gallery",
                    interactive=False,
                    buttons=[],
                )
            with gr.Column(elem_classes="more"):
                self.controls, batch, race, dropped = self._settings(prompt)
        self._history = gr.State([], time_to_live=24 * 3600)
        self.outputs = [self._stage, self._slider, self._download, self._gallery, self._history]
        asked = [*self.controls.all(), batch, race, self._history]
        go.click(None, self.controls.all(), js=SHARE, **PRIVATE)
        go.click(self.give_way, None, None, queue=False, **PRIVATE)
        shown: dict[str, Any] = {"show_progress_on": self._stage, **MODEL, **PRIVATE}
        drawing = go.click(explained(self.draw), asked, self.outputs, trigger_mode="always_last", **shown)
        self._gallery.select(explained(self.back), self._history, self.controls.all(), **PRIVATE)
        dropped.upload(explained(self.from_file), dropped, self.controls.all(), **PRIVATE)
        self.controls.student.input(
            explained(self.chosen), self.controls.student, self.controls.of_student(), **PRIVATE
        )
        self._asked, self._drawing, self._stop, self._shown = asked, drawing, stop, shown

    def _ask(self, prompts: tuple[str, ...]) -> tuple[gr.Textbox, gr.Button, gr.Button]:
        prompt = gr.Textbox(
            self.first.prompt, label="Prompt", lines=2, max_lines=6, elem_id="prompt", info="Ctrl+Enter draws"
        )
        with gr.Row(elem_classes="chips"):
            for text in prompts:
                chip = gr.Button(text, size="sm", variant="secondary", min_width=0)
                told = chip.click(None, None, prompt, js=f"() => {json.dumps(text)}", **PRIVATE)
                told.then(None, js="() => { tdm.go(); return []; }", **PRIVATE)
        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id="go", elem_classes="go", scale=3)
            stop = gr.Button("Stop", variant="secondary", elem_id="stop", scale=1, min_width=80)
        return prompt, go, stop

    def _settings(self, prompt: gr.Textbox) -> tuple[Controls, gr.Slider, gr.Checkbox, gr.File]:
        first, recipe = self.first, self.engine.recipe()
        teacher = self.engine.teacher_call
        by_teacher = f"{teacher.steps}{' guided' * teacher.guided} steps"
        race = gr.Checkbox(True, label="Beside its teacher", info=f"{by_teacher}, from the same noise")
        grid = ", ".join(str(k) for k in recipe.trained_timesteps)
        steps = gr.Radio(
            steps_choices(recipe),
            value=first.steps,
            label="Steps",
            elem_id="steps",
            info=f"Trained for {grid}; another count runs on that grid, spaced anew",
        )
        with gr.Row(elem_classes="seed"):
            seed = gr.Number(first.seed, label="Seed", minimum=0, step=1, elem_id="seed", scale=3)
            dice = gr.Button("Roll the dice", size="sm", elem_id="dice", scale=1, min_width=120)
        dice.click(None, None, seed, js=DICE, **PRIVATE)
        with gr.Row():
            size = gr.Dropdown(
                size_choices(recipe),
                value=size_text(first.width, first.height),
                label="Size",
                allow_custom_value=True,
                elem_id="size",
                min_width=160,
            )
            batch = gr.Slider(1, MOST_PICTURES, value=1, step=1, label="Pictures", elem_id="batch", min_width=160)
        base_first = gr.Checkbox(
            first.base_first,
            label="More variety",
            info="The base makes the first step: pictures differ more from seed to seed, and are less exact",
        )
        with gr.Accordion("Student, and settings from a picture", open=False):
            student = gr.Dropdown(
                self.engine.catalogue.names(), value=first.student, label="Student", allow_custom_value=True
            )
            dropped = gr.File(
                label="Drop a PNG made here to get its settings back", file_types=[".png"], type="filepath", height=160
            )
        return Controls(prompt, steps, seed, size, student, base_first), batch, race, dropped

    def wanted(
        self, prompt: Any, steps: Any, seed: Any, size: Any, student: Any, base_first: Any, batch: Any = 1
    ) -> list[Settings]:
        """Checked settings of each picture; seeds count up.

        Raises:
            TDMError: a value is wrong.
        """
        width, height = parse_size(size)
        given = {"prompt": prompt, "steps": steps, "seed": seed, "width": width, "height": height}
        given |= {"student": student, "base_first": base_first}
        first = self.engine.settings(given)
        count = whole("the number of pictures", batch, 1, MOST_PICTURES)
        return [self.engine.settings(given | {"seed": first.seed + i}) for i in range(count)]

    def draw(
        self,
        prompt: Any,
        steps: Any,
        seed: Any,
        size: Any,
        student: Any,
        base_first: Any,
        batch: Any,
        race: Any,
        history: list[str],
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """Draw, streaming the stage; then the slider, the download and the gallery. A newer wish ends it."""
        wanted = self.wanted(prompt, steps, seed, size, student, base_first, batch)
        if words := unknown_words(self.engine, wanted[0].prompt):
            gr.Info(f"this model does not know {', '.join(words[:5])} and leaves that out")
        comparison = Comparison(self.engine, wanted, bool(race))
        visitor, wish = request.session_hash, object()
        self._newest[visitor] = wish
        try:
            yield {self._stage: comparison.html(), self._slider: gr.update(value=None, visible=comparison.race)}
            yield from self._stream(comparison, history, lambda: self._newest.get(visitor) is wish)
        finally:
            if self._newest.get(visitor) is wish:
                del self._newest[visitor]

    def give_way(self, request: gr.Request) -> None:
        """End what is being drawn for this visitor, who has a newer wish."""
        self._newest.pop(request.session_hash, None)

    def _stream(
        self, comparison: Comparison, history: list[str], wanted: Callable[[], bool]
    ) -> Iterator[dict[Any, Any]]:
        saved: list[str] = []
        for _ in comparison.run():
            if not wanted():
                return
            yield {self._stage: comparison.html()}
            done = sum(frame.final for frame in comparison.students)
            if len(saved) < done:
                file = self.pictures.save(comparison.students[done - 1].picture, comparison.wanted[done - 1])
                saved.append(str(file))
                yield self._shelf(saved, history)
        if comparison.teacher is not None:
            yield self._beside(comparison)

    def open(
        self,
        prompt: Any,
        steps: Any,
        seed: Any,
        size: Any,
        student: Any,
        base_first: Any,
        batch: Any,
        race: Any,
        history: list[str],
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """What a visitor sees first. Without a link's settings it is the same for all, and drawn once."""
        own = self.wanted(prompt, steps, seed, size, student, base_first) != [self.first]
        if own or self._opening is None:
            yield from self.draw(prompt, steps, seed, size, student, base_first, batch, race, history, request)
            return
        shown = self._opening
        yield {self._stage: shown.html()}
        yield self._shelf([str(self.pictures.save(shown.students[0].picture, self.first))], history)
        yield self._beside(shown)

    def _shelf(self, saved: list[str], history: list[str]) -> dict[Any, Any]:
        """The download of the newest picture, and the gallery with the new ones in front."""
        kept = [path for path in history if Path(path).is_file()]
        shelf = list(dict.fromkeys([*reversed(saved), *kept]))[:REMEMBERED]
        captions = [(path, _caption(path)) for path in shelf]
        return {
            self._download: gr.update(value=saved[-1], visible=True),
            self._gallery: gr.update(value=captions, visible=True),
            self._history: shelf,
        }

    def _beside(self, comparison: Comparison) -> dict[Any, Any]:
        if comparison.wanted == [self.first] and self._opening is None:
            self._opening = comparison
        assert comparison.teacher is not None
        pair = comparison.students[0].picture, comparison.teacher.picture
        return {self._slider: gr.update(value=pair, visible=True)}

    def back(self, history: list[str], event: gr.SelectData) -> list[Any]:
        """The settings of a picture of the gallery, into the page."""
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(history):
            raise TDMError("that picture is not here any more")
        return self.from_file(history[index])

    def from_file(self, path: str | None) -> list[Any]:
        """The settings of a dropped picture, into the page."""
        if path is None:
            raise TDMError("no file came; drop a PNG")
        given = read_settings(path)
        if given["student"] and given["student"] not in self.engine.catalogue.names():
            gr.Warning(f"its student, {str(given['student'])[:60]}, is not here; {self.engine.catalogue.first} draws")
            given["student"] = None
        if more := ", ".join(sorted(given.keys() - Settings.__dataclass_fields__.keys()))[:60]:
            gr.Warning(f"it was made with {more}, which this page does not have; it draws without")
        return self.controls.values(self.engine, self.engine.settings(given))

    def chosen(self, student: Any) -> list[Any]:
        """Another student and its steps and sizes, into the page; prompt and seed stay, to compare."""
        settings = self.engine.settings({"prompt": self.first.prompt, "student": student})
        values = dict(zip(self.controls.all(), self.controls.values(self.engine, settings), strict=True))
        return [values[control] for control in self.controls.of_student()]

    def opened(self, page: gr.Blocks) -> None:
        """Read the link, then draw."""
        link = page.load(explained(self.from_link), None, self.controls.all(), show_progress="hidden", **PRIVATE)
        opening = link.then(explained(self.open), self._asked, self.outputs, **self._shown)
        self._stop.click(None, cancels=[self._drawing, opening], queue=False, **PRIVATE)

    def from_link(self, request: gr.Request) -> list[Any]:
        """The settings in the page's address, into the page; those of a broken link are left out, with a warning."""
        query = dict(request.query_params)
        given: dict[str, Any] = {name: query[name] for name in ("prompt", "student") if name in query}
        given |= {name: _number(query[name]) for name in ("steps", "seed", "width", "height") if name in query}
        given |= {"base_first": query["base_first"] == "true"} if "base_first" in query else {}
        try:
            settings = self.engine.settings({"prompt": self.first.prompt} | given)
        except TDMError as error:
            # Until it is closed: the page may draw for longer than a notice stays by itself.
            gr.Warning(f"the link's settings are left out: {error}", duration=None)
            settings = self.first
        return self.controls.values(self.engine, settings)


def _number(text: str) -> Any:
    return int(text) if text.isdecimal() and len(text) < 20 else text


def _caption(path: str) -> str:
    try:
        s = read_settings(path)
    except TDMError:
        return Path(path).stem
    return f"{s['prompt']}, seed {s['seed']}, {s['steps']} steps"
