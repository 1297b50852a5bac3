"""Files and folders that appear whole or not at all, and one clear line when the disk refuses."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import TDMError

MORE_ROOM = "free some space, or write to another place"
RESUME = "make room, then resume from the last checkpoint"


def user_cache() -> Path:
    """The folder of what can be made again: encoded prompts, pictures of teachers, and unfinished runs of studies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdm"


@contextmanager
def writing(path: Path, remedy: str = MORE_ROOM) -> Iterator[None]:
    """Turn what the system refuses inside (disk full, file too large, no permission) into one line about ``path``.

    Args:
        remedy: the end of that line, which says what to do.

    Raises:
        TDMError: the write failed.
    """
    try:
        yield
    except OSError as error:
        raise TDMError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


@contextmanager
def replacing(path: Path, *, shared: bool = False, remedy: str = MORE_ROOM) -> Iterator[BinaryIO]:
    """An open file that takes the place of ``path`` when the block ends. A process killed at any moment, or a machine
    that loses power, leaves the old file or the new one, each whole.

    Args:
        shared: several processes may write it at the same time; the last to end wins.
        remedy: as in `writing`.

    Raises:
        TDMError: the write failed; the old file is still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if shared else f".{path.name}.tmp")
    with writing(path, remedy):
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
        _sync_folder(path.parent)


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """A name next to `path` to write a folder under, which takes the place of `path` when the `with` ends well.

    Raises:
        TDMError: `path` is a file, or a folder that is not empty and `force` is False; or the write failed, and what
            was there is still there.
    """
    target = Path(path).absolute()
    if target.is_file():
        raise TDMError(f"{target} is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise TDMError(f"{target} exists; pass force=True to replace it")
    unfinished, replaced = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        with writing(target):
            yield unfinished
            for folder, _, names in os.walk(unfinished):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fsync(file.fileno())
            if target.exists():
                target.rename(replaced)
            unfinished.rename(target)
            _sync_folder(target.parent)
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """The names in a folder are on disk, too; Windows has no way to ask for that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_tensors(payload: dict[str, Any], path: Path) -> None:
    """``torch.save`` that replaces ``path`` whole; read it with ``weights_only=True``.

    Raises:
        TDMError: the write failed; the old file is still there.
    """
    import torch

    with replacing(path, remedy=RESUME) as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:  # torch's writer stumbles over the system's refusal and reports the stumbling
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
