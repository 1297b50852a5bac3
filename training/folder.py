"""The folder of a run: refused before anything is loaded, and held by one run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import TDMError
from ..files import writing
from .checkpoint import check_settings, read_checkpoint
from .config import DistillConfig
from .start import check_start

LOCK = ".lock"


def check_run(folder: Path, config: DistillConfig, *, resume: bool) -> None:
    """What can be refused without the base: an earlier run in the folder, other settings, no earlier student.

    Args:
        folder: of the run.
        config: of the run.
        resume: go on from the folder's checkpoint.

    Raises:
        TDMError: the run cannot begin, or cannot be resumed.
    """
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise TDMError(f"{folder} already holds a run; resume it, or choose another folder")
    if resume and not checkpoint.exists():
        raise TDMError(f"{folder} holds no run to resume: checkpoint.pt is missing")
    if config.start_from is not None:
        check_start(config.start_from)
    if resume:
        try:
            payload = read_checkpoint(checkpoint, mmap=True)
        except TDMError:
            return  # an older one may do; the run itself looks for it
        check_settings(checkpoint, payload, config)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder for the length of a `with`; the system lets go of it when the process ends in any way.

    Raises:
        TDMError: another run holds it, or no file can be written there.
    """
    lock = FileLock(folder / LOCK)
    with writing(folder / LOCK):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise TDMError(f"another run is already training in {folder}; wait, or choose another --out") from None
    try:
        yield
    finally:
        lock.release()
