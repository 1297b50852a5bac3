"""Files that are there whole or not at all, and one clear line when the disk says no."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import TDMError


def user_cache() -> Path:
    """The folder of what can be made again: encoded prompts, pictures of teachers, and unfinished runs of studies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdm"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever the system refuses inside (disk full, file too large, no permission) becomes one line about ``path``.

    Raises:
        TDMError: the write failed.
    """
    try:
        yield
    except OSError as error:
        raise TDMError(
            f"cannot write {path}: {error.strerror or error}; make room, then resume from the last checkpoint"
        ) from error


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """An open file that takes the place of ``path`` when the block ends. A process killed at any moment, or a machine
    that loses power, leaves the old file or the new one, each whole.

    Args:
        shared: several processes may write it at the same time; the last to end wins.

    Raises:
        TDMError: the write failed; the old file is still there.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # the content is on disk before the name points to it
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk it would be in the way of everything else
            raise
        if hasattr(os, "O_DIRECTORY"):  # and so is the name; Windows has no way to say so
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def save_tensors(payload: dict[str, Any], path: Path) -> None:
    """``torch.save`` that replaces ``path`` whole; read it with ``weights_only=True``.

    Raises:
        TDMError: the write failed; the old file is still there.
    """
    with replacing(path) as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:  # torch's writer stumbles over the system's refusal and reports the stumbling
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
