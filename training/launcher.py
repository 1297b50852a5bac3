"""What torchrun, accelerate launch or Slurm started: one process, or one of several. Imports no torch."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(code: int) -> NoReturn:
    """End this process, one of several, without taking the interpreter apart.

    FSDP2 keeps its process group to the end, and with it gloo's threads (torch 2.13). One of them that lets go of a
    tensor while the interpreter ends aborts the process, whereupon the launcher stops the others, the one that still
    writes among them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
