"""The prompts of a run: a text file's lines, or the grammar of the bundled world; and those that measure it."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

from ...errors import TDMError
from ..worlds.stickers.captions import caption
from ..worlds.stickers.scene import Scene, random_scene, scenes

STICKERS = "stickers"


def training_prompts(source: str, count: int) -> list[str]:
    """The prompts that batches are drawn from, the same in every run.

    Args:
        source: a text file with one prompt a line, which is used whole, or "stickers".
        count: how many of the endless grammar's prompts (training combinations only).

    Raises:
        TDMError: no such file, or nothing in it.
    """
    if source == STICKERS:
        if count < 1:
            raise TDMError(f"task.prompt_count must be positive, not {count}")
        rng = random.Random(0)
        return [caption(random_scene(rng, "train"), rng) for _ in range(count)]
    path = Path(source)
    if not path.is_file():
        raise TDMError(f"no prompt file {source}; give a text file with one prompt a line, or {STICKERS!r}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise TDMError(f"{source} holds no prompts")
    return lines


def held_out(count: int) -> tuple[list[str], list[Scene]]:
    """Prompts of combinations that are never trained on, and what they ask for."""
    wanted = list(islice(scenes(1, "held_out"), count))
    rng = random.Random(1)
    return [caption(scene, rng) for scene in wanted], wanted
