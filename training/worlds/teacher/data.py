"""Captioned pictures of the Stickers world as tensors."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from ..stickers.captions import caption
from ..stickers.draw import Style, draw
from ..stickers.scene import Scene, Split, scenes


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
    """uint8 pictures of any shape, in [0, 255], to float32 in [-1, 1]."""
    return pictures_u8.float() / 127.5 - 1.0
