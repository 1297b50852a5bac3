"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TDMError


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """A name beside `path` to write a folder under, which takes the place of `path` when the `with` ends well.

    Raises:
        TDMError: `path` is a file, or a folder that is not empty and `force` is False.
    """
    target = Path(path).absolute()
    if target.is_file():
        raise TDMError(f"{target} is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise TDMError(f"{target} exists; pass force=True to replace it")
    unfinished, replaced = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        yield unfinished
        if target.exists():
            target.rename(replaced)
        unfinished.rename(target)
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
