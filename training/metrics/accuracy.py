"""What of a prompt of the bundled world a picture gets right, read back by its verifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..worlds.stickers.scene import HELD_OUT, Scene
from ..worlds.stickers.verify import verify

ALL = "all"  # everything that the prompt says: the strict accuracy that this project reports
ATTRIBUTES = ("background", "count", "colour", "kind", "relation")


def accuracies(pictures: Tensor, wanted: Sequence[Scene]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which pictures are right, by attribute and by held-out combination.

    Args:
        pictures: uint8 (N, 3, 64, 64).
        wanted: their N scenes.

    Returns:
        (`ALL` and ``ATTRIBUTES``, held-out combinations such as "red moon"), each as bool (n,): of the pictures that
        were asked for it, those that have it right. A combination is right where the whole picture is. What nobody
        asked for is left out.
    """
    verdicts = verify(pictures, list(wanted))
    attributes = {ALL: [v.correct for v in verdicts]}
    for name in ATTRIBUTES:
        attributes[name] = [value for v in verdicts if (value := getattr(v, name)) is not None]
    combinations = {
        f"{colour} {kind}": [
            v.correct
            for v, scene in zip(verdicts, wanted, strict=True)
            if any((group.colour, group.kind) == (colour, kind) for group in scene.groups)
        ]
        for colour, kind in sorted(HELD_OUT)
    }
    return _tensors(attributes), _tensors(combinations)


def _tensors(verdicts: dict[str, list[bool]]) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in verdicts.items() if values}
