"""`tdm` commands in separate processes, which can be killed or run out of disk space.

They are forked from a process that has imported everything already, so that each starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["tdm.training.export", "tdm.training.tasks.mixture", "tdm.cli.generate", "matplotlib.pyplot"]
)


def start(
    argv: Sequence[str], stderr: Path, largest_file: int | None = None, missing: str | None = None
) -> ForkServerProcess:
    """`tdm ARGV`, its stderr added to a file.

    Args:
        largest_file: files may grow to so many bytes, as on a disk that fills.
        missing: a package that cannot be imported, as where it is not installed.
    """
    process = _context.Process(target=_run, args=(list(argv), stderr, largest_file, missing))
    process.start()
    return process


def finish(argv: Sequence[str], stderr: Path, largest_file: int | None = None, missing: str | None = None) -> int:
    """Run `tdm ARGV` to its end, as :func:`start` does; the exit code."""
    process = start(argv, stderr, largest_file, missing)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(argv: list[str], stderr: Path, largest_file: int | None, missing: str | None) -> None:
    import torch
    from tdm.cli import main

    torch.set_num_threads(1)
    if missing is not None:
        sys.modules[missing] = None  # type: ignore[assignment]  # what Python itself takes for "not there"
    with stderr.open("a") as file:
        os.dup2(file.fileno(), 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(argv))
