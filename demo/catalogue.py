"""The students of the demo: the one that it was started with, and the files below its folders.

A visitor names one by what this list calls it, never by a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import TDMError

SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")  # what a LoRA comes in
RUN_FILES = ("checkpoint", "best")  # of `tdm distill`: no students
MOST = 500  # files listed


class Catalogue:
    """Students by name.

    Args:
        first: the value of `--student` or `--model`, or "bundled".
        folders: the folders, by the first part of their students' names. A missing folder is empty.
    """

    def __init__(self, first: str, folders: Mapping[str, Path]) -> None:
        self.first = Path(first).name if Path(first).exists() else first
        self._first = first
        self.folders = dict(folders)

    def names(self) -> list[str]:
        """Names of all students; the one that the demo was started with comes first."""
        return [self.first, *self._files()]

    def source(self, name: str | None) -> str:
        """Return what `load_student` takes for a name; None and "" name the first student.

        Raises:
            TDMError: there is no such student.
        """
        if not name or name == self.first:
            return self._first
        path = self._files().get(name) if isinstance(name, str) else None
        if path is None:
            raise TDMError(f"there is no student {str(name)[:80]!r} here; the tab Models lists those that are")
        return str(path)

    def _files(self) -> dict[str, Path]:
        paths = {f"{kind}/{path.relative_to(folder).as_posix()}": path for kind, folder, path in self._paths()}
        return dict(sorted(paths.items())[:MOST])

    def _paths(self) -> Iterator[tuple[str, Path, Path]]:
        for kind, folder in self.folders.items():
            root = folder.resolve()
            for path in folder.rglob("*"):
                # A link may point anywhere: what it points to must be in the folder, too.
                listed = path.suffix in SUFFIXES and not path.stem.startswith((".", *RUN_FILES))
                if listed and path.is_file() and path.resolve().is_relative_to(root):
                    yield kind, folder, path
