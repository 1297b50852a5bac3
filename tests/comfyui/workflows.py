"""The example workflows as prompts. `make_workflows.py` has the front end write them to `example_workflows`."""

from __future__ import annotations

from pathlib import Path

from .bundled_workflows import BUNDLED
from .install import REPOSITORY
from .released_workflows import RELEASED
from .workflow import Workflow

FOLDER = REPOSITORY / "example_workflows"

# Under the names of their files, which are their titles in the template browser.
WORKFLOWS: dict[str, Workflow] = BUNDLED | RELEASED


def stand_ins(models: Path) -> None:
    """Empty files in the place of those that the workflows name: the front end asks which there are."""
    for named in {named for workflow in WORKFLOWS.values() for named in workflow.files}:
        file = models / (f"{named}model_index.json" if named.endswith("/") else named)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
