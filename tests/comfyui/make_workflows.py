"""Writes `example_workflows`: `python -m tdm.tests.comfyui.make_workflows`, in the environment of `make test`.

The real front end makes each workflow of its prompt, and takes its picture, with the result where it can be run here.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path

from ..browser import chromium
from .front_end import FrontEnd
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
                write(front_end, name, workflow)
        finally:
            server.stop()


def write(front_end: FrontEnd, name: str, workflow: Workflow) -> None:
    """The two files of a workflow."""
    front_end.open(laid_out(workflow, front_end.from_prompt(workflow.graph)))
    saved = front_end.saved()
    saved["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, name))
    del saved["extra"]["ds"]  # where this window stands on the canvas: each finds its own place
    (FOLDER / f"{name}.json").write_text(json.dumps(saved, indent=1) + "\n")
    if not workflow.files:
        front_end.forget()
        front_end.run()
    front_end.picture(FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    main()
