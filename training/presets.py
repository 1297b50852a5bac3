"""The configurations that ship: one per model family, and to put behind it one per memory class and per objective.

    tdm distill sdxl 24gb task.prompts=prompts.txt student.lr=2e-4
    tdm distill sdxl unify 24gb task.prompts=prompts.txt

A configuration is named by its file, or by the bare name of one of these. The first line of each says what it is for.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from ..errors import TDMError

FOLDER = Path(__file__).parent / "configs"
MEMORY = ("12gb", "16gb", "24gb", "node", "nodes")  # say what a run may cost; smallest first


def presets() -> dict[str, str]:
    """What each preset is for, by name."""
    return {path.stem: _first_comment(path) for path in sorted(FOLDER.glob("*.yaml"))}


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().rstrip("\n").removeprefix("# ")


# Those that say how it learns. Without one it is TDM.
OBJECTIVES = tuple(name for name, line in presets().items() if line.startswith("Objective: "))
BEHIND = (*MEMORY, *OBJECTIVES)  # do not say what is distilled


def find_config(name: str | Path) -> Path:
    """The file of a configuration: itself, or the preset of that name.

    Raises:
        TDMError: there is neither; of a mistyped preset the message has the nearest.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix or path.parent != Path():
        raise TDMError(f"no configuration file {name}")
    known = list(presets())
    if str(name) in known:
        return FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(str(name), known, n=1)
    raise TDMError(
        f"{name} is neither a file nor a preset; " + (f"did you mean {near[0]}?" if near else f"presets: {known}")
    )
