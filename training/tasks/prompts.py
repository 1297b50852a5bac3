"""The prompts of a run: a text file's lines, or the grammar of the bundled world; and those that measure it."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

from ...errors import TDMError
from ..worlds.stickers.captions import caption
from ..worlds.stickers.scene import Scene, random_scene, scenes

STICKERS = "stickers"
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods")


def training_prompts(source: str, count: int) -> list[str]:
    """The prompts that batches are drawn from, the same in every run.

    Args:
        source: a text file in UTF-8 with one prompt a line, which is used whole, or "stickers".
        count: how many of the endless grammar's prompts (training combinations only).

    Raises:
        TDMError: no such file, nothing in it, a table, or text in another encoding.
    """
    if source == STICKERS:
        if count < 1:
            raise TDMError(f"task.prompt_count must be positive, not {count}")
        rng = random.Random(0)
        return [caption(random_scene(rng, "train"), rng) for _ in range(count)]
    path = Path(source)
    if not path.is_file():
        raise TDMError(f"no prompt file {source}; give a text file with one prompt a line, or {STICKERS!r}")
    # Not splitlines(): a caption may hold a line separator of Unicode.
    lines = [line.strip() for line in _text(path).split("\n") if line.strip()]
    if not lines:
        raise TDMError(f"{source} holds no prompts")
    if path.suffix.lower() in TABLES or _is_json(lines):
        raise TDMError(
            f"{source} is a table, whose lines are no prompts; write its caption column to a text file, one prompt a "
            "line"
        )
    return lines


def _text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        TDMError: it is not text in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TDMError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8, one prompt a line") from None
    except OSError as error:
        raise TDMError(f"cannot read {path}: {error.strerror}") from None
    if "\0" in text:  # UTF-16 without a mark, or no text at all
        raise TDMError(f"{path} is not UTF-8 text (it holds NUL); save it as UTF-8, one prompt a line")
    return text


def _is_json(lines: list[str]) -> bool:
    """Whether a file is one JSON value, or has one in its first line."""
    if not lines[0].startswith(("{", "[")):
        return False
    for text in (lines[0], "\n".join(lines)):
        try:
            return isinstance(json.loads(text), dict | list)
        except ValueError:
            continue
    return False


def held_out(count: int) -> tuple[list[str], list[Scene]]:
    """Prompts of combinations that are never trained on, and what they ask for."""
    wanted = list(islice(scenes(1, "held_out"), count))
    rng = random.Random(1)
    return [caption(scene, rng) for scene in wanted], wanted
