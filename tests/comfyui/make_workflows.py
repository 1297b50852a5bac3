"""Writes `example_workflows`: `python -m tdm.tests.comfyui.make_workflows`, in the environment of `make test`.

The real front end makes each workflow of its prompt. Its thumbnail is what it draws, or its title where the weights are
not here. One graph becomes the picture of the ComfyUI guide.
"""

from __future__ import annotations

import json
import tempfile
import textwrap
import uuid
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..browser import chromium
from .front_end import FrontEnd
from .install import REPOSITORY
from .layout import laid_out
from .server import Server
from .workflow import Workflow
from .workflows import FOLDER, WORKFLOWS, stand_ins


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        server = Server(Path(folder) / "server")
        try:
            stand_ins(server.models)
            front_end = FrontEnd(browser, server.address)
            for name, workflow in WORKFLOWS.items():
                write(front_end, server, name, workflow)
                if name == "tdm-bundled":
                    front_end.page.wait_for_timeout(2000)  # until the picture has come
                    front_end.picture(REPOSITORY / "docs" / "comfyui.jpg")
        finally:
            server.stop()


def write(front_end: FrontEnd, server: Server, name: str, workflow: Workflow) -> None:
    """The two files of a workflow."""
    front_end.open(laid_out(workflow, front_end.from_prompt(workflow.graph)))
    saved = front_end.saved()
    saved["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, name))
    del saved["extra"]["ds"]  # where this window stands on the canvas: each finds its own place
    (FOLDER / f"{name}.json").write_text(json.dumps(saved, indent=1) + "\n")
    if workflow.files:
        thumbnail = _card(workflow.title)
    else:
        before = set(server.output.rglob("*.png"))
        front_end.forget()
        front_end.run()
        thumbnail = _grid([Image.open(file) for file in sorted(set(server.output.rglob("*.png")) - before)])
    thumbnail.save(FOLDER / f"{name}.jpg", quality=85)


_SIDE = 512


def _grid(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in rows of as many as there are rows, about `_SIDE` wide."""
    columns = round(len(pictures) ** 0.5)
    width, height = pictures[0].size
    whole = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % columns * width, i // columns * height))
    return whole.resize((_SIDE, round(_SIDE * whole.height / whole.width)), Image.Resampling.LANCZOS)


def _card(title: str) -> Image.Image:
    """A title in large letters."""
    card = Image.new("RGB", (_SIDE, _SIDE), "#1d2433")
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(56)
    text = textwrap.fill(title, 15)
    draw.multiline_text((_SIDE / 2, _SIDE / 2), text, "#f2f4f8", font, anchor="mm", align="center", spacing=14)
    return card


if __name__ == "__main__":
    main()
