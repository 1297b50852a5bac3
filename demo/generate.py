"""The first tab: a prompt, one button, and the student's picture next to its teacher's."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    error_line,
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
NEW_SEED = "(randomize, seed) => tdm.seed(randomize, seed)"
SHARE = "(...settings) => { tdm.share(settings); return []; }"
DRAW = "() => { tdm.draw(); return []; }"  # presses the hidden button: draws with the settings as they are now
PRESS = "() => { tdm.go(); return []; }"  # presses the tab's own button


@dataclass(frozen=True)
class Controls:
    """The components that other tabs, links and pictures set.

    Attributes:
        randomize: whether Generate takes a new seed; off after a link or a picture has set the seed.
    """

    prompt: gr.Textbox
    steps: gr.Radio
    seed: gr.Number
    size: gr.Dropdown
    student: gr.Dropdown
    base_first: gr.Checkbox
    randomize: gr.Checkbox

    def shared(self) -> list[Any]:
        """The components that a link keeps, in the order of `tdm.names` in page.js."""
        return [self.prompt, self.steps, self.seed, self.size, self.student, self.base_first]

    def all(self) -> list[Any]:
        """All components, in the order of `updates`."""
        return [*self.shared(), self.randomize]

    def of_student(self) -> list[Any]:
        """The components that the choice of a student sets."""
        return [self.steps, self.size, self.student]

    def updates(self, engine: Engine, settings: Settings, *, randomize: bool) -> list[Any]:
        """Updates that put settings into the components."""
        recipe = engine.recipe(settings.student)
        return [
            settings.prompt,
            gr.update(choices=steps_choices(recipe, settings.steps), value=settings.steps),
            settings.seed,
            gr.update(choices=size_choices(recipe), value=size_text(settings.width, settings.height)),
            gr.update(choices=engine.catalogue.names(), value=settings.student),
            settings.base_first,
            randomize,
        ]


@dataclass(frozen=True)
class DrawRequest:
    """A visitor's request to draw.

    Attributes:
        pictures: the settings of each picture; the seeds count up.
        compare: whether the teacher draws the first picture, too.
        history: files of the visitor's gallery, the newest first.
    """

    pictures: list[Settings]
    compare: bool
    history: list[str]


@dataclass
class Wait:
    """The time between a visitor's click and the first update of the page, which others' drawings can make long.

    Attributes:
        over: whether the drawing has begun; it is then a `Comparison`.
        stopped: whether Stop was pressed before.
    """

    over: bool = False
    stopped: bool = False


class GenerateTab:
    """The tab that draws. Build it inside a `gr.Blocks`.

    Attributes:
        controls: the components with the settings.
        comparison: a `gr.State` with the `Comparison` that the visitor saw last.
    """

    def __init__(self, engine: Engine, pictures: Pictures) -> None:
        self.engine, self.pictures = engine, pictures
        self._opening: Comparison | None = None  # every visitor sees the same first pictures, which are drawn once
        prompts = BUNDLED_PROMPTS if engine.base == "bundled" else OTHER_PROMPTS
        self.first = engine.settings({"prompt": prompts[0]})
        with gr.Row(elem_classes="first"):
            with gr.Column(elem_classes="ask"):
                prompt, go, self._stop = self._prompt(prompts)
            with gr.Column(elem_classes="shown"):
                self._results()
            with gr.Column(elem_classes="more"):
                self.controls, self._batch, self._compare, dropped = self._settings(prompt)
        self._history = gr.State([], time_to_live=24 * 3600)
        self.comparison = gr.State(None, time_to_live=24 * 3600)
        self._wait = gr.State(None, time_to_live=24 * 3600)  # the `Wait` of the visitor's newest request
        self._events(go, dropped)

    def _prompt(self, prompts: tuple[str, ...]) -> tuple[gr.Textbox, gr.Button, gr.Button]:
        prompt = gr.Textbox(
            self.first.prompt, label="Prompt", lines=2, max_lines=6, elem_id="prompt", info="Enter draws"
        )
        with gr.Row(elem_classes="chips"):
            for text in prompts:
                chip = gr.Button(text, size="sm", variant="secondary", min_width=0)
                chip.click(None, None, prompt, js=f"() => {json.dumps(text)}", **PRIVATE).then(
                    None, js=PRESS, **PRIVATE
                )
        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id="go", elem_classes="go", scale=3)
            stop = gr.Button("Stop", variant="secondary", elem_id="stop", scale=1, min_width=80)
        return prompt, go, stop

    def _results(self) -> None:
        blank = Comparison(self.engine, [self.first], race=True).html()
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
            label="Your pictures: a click shows one again",
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

    def _settings(self, prompt: gr.Textbox) -> tuple[Controls, gr.Slider, gr.Checkbox, gr.File]:
        first, recipe = self.first, self.engine.recipe()
        teacher = self.engine.teacher_call
        by_teacher = f"{teacher.steps}{' guided' * teacher.guided} steps"
        compare = gr.Checkbox(True, label="Compare with teacher", info=f"{by_teacher}, from the same noise")
        grid = ", ".join(str(k) for k in recipe.trained_timesteps)
        steps = gr.Radio(
            steps_choices(recipe),
            value=first.steps,
            label="Steps",
            elem_id="steps",
            info=f"Trained for {grid}; another count runs on that grid, re-spaced",
        )
        with gr.Row(elem_classes="seed"):
            seed = gr.Number(first.seed, label="Seed", minimum=0, step=1, elem_id="seed", scale=2, min_width=120)
            randomize = gr.Checkbox(True, label="Randomize seed", elem_id="randomize", scale=3, min_width=190)
        with gr.Row():
            size = gr.Dropdown(
                size_choices(recipe),
                value=size_text(first.width, first.height),
                label="Size",
                allow_custom_value=True,
                elem_id="size",
                min_width=160,
            )
            batch = gr.Slider(
                1, MOST_PICTURES, value=1, step=1, label="Number of images", elem_id="batch", min_width=160
            )
        base_first = gr.Checkbox(
            first.base_first,
            label="More variety",
            info="The base makes the first step: pictures differ more from seed to seed, and are less exact",
        )
        with gr.Accordion("Advanced", open=False):
            student = gr.Dropdown(
                self.engine.catalogue.names(), value=first.student, label="Student", allow_custom_value=True
            )
            dropped = gr.File(
                label="Drop a PNG made here to draw it again", file_types=[".png"], type="filepath", height=160
            )
        return Controls(prompt, steps, seed, size, student, base_first, randomize), batch, compare, dropped

    def _events(self, go: gr.Button, dropped: gr.File) -> None:
        controls, seed = self.controls, self.controls.seed
        # Everything that draws sets the settings first and then presses this button.
        draw = gr.Button("Draw", visible="hidden", elem_id="draw")
        self._inputs = {*controls.shared(), self._batch, self._compare, self._history, self.comparison, self._wait}
        outputs = [self._stage, self._slider, self._download, self._gallery, self._history, self.comparison, seed]
        self._drawing: dict[str, Any] = {
            "inputs": self._inputs,
            "outputs": outputs,
            "show_progress_on": self._stage,
            **MODEL,
            **PRIVATE,
        }
        new_seed = go.click(None, [controls.randomize, seed], seed, js=NEW_SEED, **PRIVATE)
        new_seed.then(None, js=DRAW, **PRIVATE)
        seed.input(None, None, controls.randomize, js="() => false", **PRIVATE)  # a seed that is typed is kept
        draw.click(None, controls.shared(), js=SHARE, **PRIVATE)
        asked = draw.click(self.ask, self.comparison, self._wait, queue=False, show_progress="hidden", **PRIVATE)
        asked.then(explained(self.draw), trigger_mode="always_last", **self._drawing)
        restored = self._gallery.select(explained(self.from_gallery), self._history, controls.all(), **PRIVATE)
        restored.success(None, js=DRAW, **PRIVATE)
        dropped.upload(explained(self.from_file), dropped, controls.all(), **PRIVATE).success(None, js=DRAW, **PRIVATE)
        controls.student.input(explained(self.chosen), controls.student, controls.of_student(), **PRIVATE)

    def opened(self, page: gr.Blocks) -> None:
        """Let the page read its link and draw when it opens."""
        link = page.load(explained(self.from_link), None, self.controls.all(), show_progress="hidden", **PRIVATE)
        asked = link.then(self.ask, self.comparison, self._wait, queue=False, show_progress="hidden", **PRIVATE)
        asked.then(explained(self.open), **self._drawing)
        # No `cancels`: Gradio would drop what is asked for before it has ended the older event.
        stopped = [self.comparison, self._wait]
        self._stop.click(self.stop, stopped, self._stage, queue=False, show_progress="hidden", **PRIVATE)

    def _read(self, values: dict[Any, Any]) -> DrawRequest:
        """The request in the values of the components.

        Raises:
            TDMError: a value is wrong.
        """
        controls = self.controls
        width, height = parse_size(values[controls.size])
        fields = {
            name: values[getattr(controls, name)] for name in ("prompt", "steps", "seed", "student", "base_first")
        }
        first = self.engine.settings({**fields, "width": width, "height": height})
        count = whole("the number of images", values[self._batch], 1, MOST_PICTURES)
        pictures = [self.engine.settings({**first.to_dict(), "seed": first.seed + i}) for i in range(count)]
        return DrawRequest(pictures, bool(values[self._compare]), values[self._history])

    def draw(self, values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        """Draw and stream: the stage at every step, and at the end the slider, the download and the gallery."""
        comparison: Comparison | None = values[self.comparison]
        wait: Wait = values[self._wait]
        if wait.stopped:
            yield {self._stage: gr.skip()}  # Gradio empties the outputs of a generator that yields nothing
            return
        try:
            request = self._read(values)
            if words := unknown_words(self.engine, request.pictures[0].prompt):
                gr.Info(f"this model does not know {', '.join(words[:5])} and leaves that out")
            comparison, seed = Comparison(self.engine, request.pictures, request.compare), request.pictures[0].seed
            yield {
                self._stage: comparison.html(),
                self._slider: gr.update(value=None, visible=comparison.race),
                self.comparison: comparison,
                # Only a seed that was chosen here: the visitor may be typing the next one already.
                self.controls.seed: gr.skip() if values[self.controls.seed] == seed else seed,
            }
            wait.over = True
            if wait.stopped:
                comparison.ended = "Stopped before it began."
            yield from self._stream(comparison, request)
        except Exception as error:
            if comparison is not None:
                yield {self._stage: comparison.html(f"Not drawn: {error_line(error)}")}
            raise

    def give_way(self, comparison: Comparison | None) -> None:
        """End the drawing of a visitor who asks for another picture."""
        if comparison is not None and not comparison.finished:  # a finished one may be every visitor's first screen
            comparison.ended = "Another picture was asked for."

    def ask(self, older: Comparison | None) -> Wait:
        """Ask for a drawing in the place of what the visitor asked for before."""
        self.give_way(older)
        return Wait()

    def stop(self, comparison: Comparison | None, wait: Wait | None) -> Any:
        """End the drawing of a visitor who presses Stop, and say on the stage how far it came."""
        if comparison is not None and not (comparison.finished or comparison.ended):
            comparison.ended = f"Stopped. {comparison.progress}"
            return comparison.html()
        if wait is None or wait.over or wait.stopped:
            gr.Info("nothing is being drawn")
            return gr.skip()
        wait.stopped = True
        shown = comparison or Comparison(self.engine, [self.first], race=True)
        return shown.html("Stopped before it began.")

    def _stream(self, comparison: Comparison, request: DrawRequest) -> Iterator[dict[Any, Any]]:
        files: list[str] = []
        for _ in comparison.run():
            yield {self._stage: comparison.html()}
            done = sum(frame.final for frame in comparison.students)
            if len(files) < done:
                files.append(str(self.pictures.save(comparison.students[done - 1].picture, request.pictures[done - 1])))
                yield self._shelf(files, request.history)
        if comparison.ended:  # an update from before may reach the page after what `stop` returned
            yield {self._stage: comparison.html()}
        if comparison.finished and comparison.race:
            yield self._slide(comparison)

    def open(self, values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        """Draw what a visitor sees first. Without a link's settings it is the same for all, and drawn once."""
        opening = self._opening
        if opening is None or self._read(values).pictures != [self.first]:
            yield from self.draw(values)
            return
        yield {self._stage: opening.html(), self.comparison: opening}
        values[self._wait].over = True
        file = self.pictures.save(opening.students[0].picture, self.first)
        yield self._shelf([str(file)], values[self._history])
        yield self._slide(opening)

    def _shelf(self, files: list[str], history: list[str]) -> dict[Any, Any]:
        """The download of the newest picture, and the gallery: new pictures come first, known ones keep their place."""
        kept = [path for path in history if Path(path).is_file()]
        shelf = [*(path for path in reversed(files) if path not in kept), *kept][:REMEMBERED]
        captions = [(path, _caption(path)) for path in shelf]
        return {
            self._download: gr.update(value=files[-1], visible=True),
            self._gallery: gr.update(value=captions, visible=True, selected_index=None),
            self._history: shelf,
        }

    def _slide(self, comparison: Comparison) -> dict[Any, Any]:
        if comparison.wanted == [self.first] and self._opening is None:
            self._opening = comparison
        assert comparison.teacher is not None
        pair = comparison.students[0].picture, comparison.teacher.picture
        return {self._slider: gr.update(value=pair, visible=True)}

    def from_gallery(self, history: list[str], event: gr.SelectData) -> list[Any]:
        """Put the settings of a picture of the gallery into the page."""
        index = event.index if isinstance(event.index, int) else -1
        if not 0 <= index < len(history):
            raise TDMError("that picture was removed; draw it again from its settings")
        return self.from_file(history[index])

    def from_file(self, path: str | None) -> list[Any]:
        """Put the settings of a dropped picture into the page."""
        if path is None:
            raise TDMError("no file came; drop a PNG")
        fields = read_settings(path)
        if fields["student"] and fields["student"] not in self.engine.catalogue.names():
            gr.Warning(f"its student, {str(fields['student'])[:60]}, is not here; {self.engine.catalogue.first} draws")
            fields["student"] = None
        if more := ", ".join(sorted(fields.keys() - Settings.__dataclass_fields__.keys()))[:60]:
            gr.Warning(f"it was made with {more}, which this page does not have; it draws without")
        return self.controls.updates(self.engine, self.engine.settings(fields), randomize=False)

    def chosen(self, student: Any) -> list[Any]:
        """Put another student and its steps and sizes into the page; prompt and seed stay, to compare."""
        settings = self.engine.settings({"prompt": self.first.prompt, "student": student})
        updates = self.controls.updates(self.engine, settings, randomize=False)
        by_control = dict(zip(self.controls.all(), updates, strict=True))
        return [by_control[control] for control in self.controls.of_student()]

    def from_link(self, request: gr.Request) -> list[Any]:
        """Put the settings of the page's address into the page; those of a broken link are left out, with a warning."""
        query = {name: text for name, text in dict(request.query_params).items() if text}
        fields: dict[str, Any] = {name: query[name] for name in ("prompt", "student") if name in query}
        fields |= {name: _number(query[name]) for name in ("steps", "seed", "width", "height") if name in query}
        fields |= {"base_first": query["base_first"] == "true"} if "base_first" in query else {}
        try:
            settings = self.engine.settings({"prompt": self.first.prompt} | fields)
        except TDMError as error:
            # Until it is closed: the page may draw for longer than a notice stays by itself.
            gr.Warning(f"the link's settings are left out: {error}", duration=None)
            settings, fields = self.first, {}
        return self.controls.updates(self.engine, settings, randomize="seed" not in fields)


def _number(text: str) -> Any:
    return int(text) if text.isdecimal() and len(text) < 20 else text


def _caption(path: str) -> str:
    try:
        s = read_settings(path)
    except TDMError:
        return Path(path).stem
    return f"{s['prompt']}, seed {s['seed']}, {s['steps']} steps"
