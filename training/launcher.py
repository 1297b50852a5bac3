"""What torchrun, accelerate launch or Slurm started, one process or one of several, and how it ends. Without torch."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from ..errors import TDMError

PLACE = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher says besides WORLD_SIZE


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    size = os.environ.get("WORLD_SIZE", "").strip()
    return size.isdecimal() and int(size) > 1


def require_place() -> None:
    """Check that one process of several was told where the others are.

    Raises:
        TDMError: a variable of the environment is missing.
    """
    if missing := [name for name in PLACE if not os.environ.get(name, "").strip()]:
        raise TDMError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start the processes with "
            "torchrun or accelerate launch, or unset WORLD_SIZE for one process"
        )


def leave(code: int) -> NoReturn:
    """End this process without taking the interpreter apart.

    A thread in the middle of torch aborts the process while that happens: Python unwinds the thread, and torch's frames
    do not allow it. In the demo that is a thread that draws. In one process of several it is gloo's: FSDP2 keeps its
    process group to the end (torch 2.13), and the launcher then stops the others, the one that still writes among them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
