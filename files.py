"""Files and folders that appear whole or not at all, and one clear line when the disk refuses."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import TDMError

MORE_ROOM = "free some space, or write to another place"
RESUME = "make room, then resume from the last checkpoint"
DAY = 24 * 3600  # seconds


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
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise TDMError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
    except SafetensorError as error:
        # Its writer states the system's refusal in words: "... I/O error: File too large (os error 27)".
        if (refusal := re.search(r"I/O error: (.+) \(os error \d+\)", str(error))) is None:
            raise
        raise TDMError(f"cannot write {path}: {refusal[1]}; {remedy}") from error


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
    temporary = _hidden(path, f"{uuid.uuid4().hex}.{_owner()}.tmp" if shared else "tmp")
    with writing(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
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
    _remove_leftovers(target)
    if target.is_file():
        raise TDMError(f"{target} is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise TDMError(f"{target} exists; pass force=True to replace it")
    unfinished, replaced = (_hidden(target, f"{_owner()}.{end}") for end in ("tmp", "old"))
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


def _hidden(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{ending}")


def _owner() -> str:
    """This process, as the names of temporary files have it."""
    return f"{os.getpid()}@{platform.node()}"


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of writing ``path``: of this machine at once, of another one after a day."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*@*"):
        owner = re.search(r"\.(\d+)@(.*)\.(tmp|old)$", leftover.name)
        if owner is None or not _is_over(int(owner[1]), owner[2], leftover):
            continue
        if owner[3] == "old" and not path.exists():  # killed between the two renames: what was there comes back
            with contextlib.suppress(FileNotFoundError):  # another process did so
                leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_over(process: int, machine: str, leftover: Path) -> bool:
    if machine == platform.node() and os.name != "nt":  # on Windows signal 0 is Ctrl-C
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # somebody else's, and alive
            pass
        return False
    try:
        return time.time() - leftover.lstat().st_mtime > DAY
    except FileNotFoundError:  # it has its own name now
        return False


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
