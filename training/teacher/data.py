"""Captioned pictures of the Stickers world as tensors."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..world.captions import caption
from ..world.draw import Style, draw
from ..world.scene import Scene, Split, scenes


def pictures(
    count: int, seed: int, split: Split = "train", style: Style = "sticker"
) -> tuple[Tensor, list[str], list[Scene]]:
    """``count`` drawn pictures, their captions and scenes; the same seed gives the same ones, in every style.

    Returns:
        uint8 pictures of shape (count, 3, 64, 64), the captions, and the scenes.
    """
    rng = random.Random(f"pictures-{split}-{seed}")
    drawn, texts, held = [], [], []
    for scene, _ in zip(scenes(seed, split), range(count), strict=False):
        drawn.append(np.asarray(draw(scene, rng, style)))
        texts.append(caption(scene, rng))
        held.append(scene)
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous(), texts, held


def to_model(pictures_u8: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return pictures_u8.float() / 127.5 - 1.0


def to_u8(pictures_float: Tensor) -> Tensor:
    """Float [-1, 1] to uint8 [0, 255], clipped."""
    return ((pictures_float.float().clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)


def replace_folder(finished: Path, target: Path) -> None:
    """Put a finished folder in the place of ``target``; what was there goes only once the new one is complete."""
    if target.exists():
        shutil.rmtree(target)
    finished.rename(target)
