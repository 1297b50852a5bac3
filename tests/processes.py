"""`tdm` commands in processes of their own, which can be killed and starved of disk.

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
    ["tdm.training.export", "tdm.training.mixture", "tdm.cli.generate", "matplotlib.pyplot"]
)


def start(argv: Sequence[str], stderr: Path, largest_file: int | None = None) -> ForkServerProcess:
    """`tdm ARGV`, its stderr added to a file; files may grow to ``largest_file`` bytes, as on a disk that fills."""
    process = _context.Process(target=_run, args=(list(argv), stderr, largest_file))
    process.start()
    return process


def finish(argv: Sequence[str], stderr: Path, largest_file: int | None = None) -> int:
    """Run `tdm ARGV` to its end; the exit code."""
    process = start(argv, stderr, largest_file)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(argv: list[str], stderr: Path, largest_file: int | None) -> None:
    import torch
    from tdm.cli import main

    torch.set_num_threads(1)
    with stderr.open("a") as file:
        os.dup2(file.fileno(), 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(argv))
