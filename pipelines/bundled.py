"""Where the model is that ships with this package. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ..errors import TDMError

BUNDLED = "bundled"
INDEX = "model_index.json"
BUNDLED_TEACHER = Path(__file__).parents[1] / BUNDLED / "teacher"


def bundled_path() -> Path:
    """The folder of the model that ships with this package: `teacher/` and `student.safetensors`.

    Raises:
        TDMError: this installation has none.
    """
    if not (BUNDLED_TEACHER / INDEX).is_file():
        raise TDMError(f"this installation has no bundled model: {BUNDLED_TEACHER} is missing")
    return BUNDLED_TEACHER.parent
