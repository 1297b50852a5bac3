"""Read a picture of the Stickers world back: stickers by colour, kind and place, and the background.

No learned part: pixels near a palette colour form connected blobs, each blob is compared with drawn templates of every
kind, and the rest of the picture is compared with drawn backgrounds. It reads drawn pictures almost perfectly and
refuses blurs and half shapes, so an accuracy says that a generated picture really shows what was asked for.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from .draw import MAX_TILT, PALETTE, SIZE, draw_sticker, paint_background
from .scene import BACKGROUNDS, COLOURS, KINDS, Scene

COLOUR_REACH = (
    44.0  # RGB distance to a palette colour up to which a pixel counts as it; red mixed with rim is 45 from pink
)
SMALLEST = 24  # pixels of the smallest blob that counts as a sticker
SPECK = 10  # blobs of SPECK to SMALLEST pixels are debris that no drawn picture has
LEAST_OVERLAP = 0.62  # overlap with the best template below which a blob is no sticker
GRID = 20  # side of the templates


@dataclass(frozen=True)
class ReadSticker:
    """One sticker read from a picture; ``kind`` is None for a blob that looks like none. Centre in pixels."""

    colour: str
    kind: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str
    stickers: tuple[ReadSticker, ...]


@dataclass(frozen=True)
class Verdict:
    """Which parts of a scene a picture gets right; ``relation`` is None for scenes without one."""

    background: bool
    count: bool
    colour: bool
    kind: bool
    relation: bool | None

    @property
    def correct(self) -> bool:
        """Whether every part is right: the strict accuracy that this project reports."""
        return self.background and self.count and self.colour and self.kind and self.relation is not False


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Crop a mask to its bounding box and resize to (GRID, GRID), values in [0, 1]."""
    ys, xs = np.nonzero(mask)
    crop = Image.fromarray(mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.uint8) * 255)
    return np.asarray(crop.resize((GRID, GRID), Image.Resampling.BOX), np.float32) / 255.0


@functools.cache
def _templates() -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Every kind at several tilts and sizes, flattened (T, GRID * GRID), and the kind of each."""
    shapes, names = [], []
    for kind in KINDS:
        for tilt in np.linspace(-MAX_TILT, MAX_TILT, 5):
            for radius in (7.0, 12.0):
                canvas = Image.new("RGB", (48 * 8, 48 * 8))
                pen, centre = ImageDraw.Draw(canvas), (24 * 8.0, 24 * 8.0)
                draw_sticker(pen, kind, (255, 255, 255), centre, radius * 8, float(tilt), rim=0.0)
                shapes.append(_normalised(np.asarray(canvas.reduce(8).convert("L")) > 127).ravel())
                names.append(kind)
    return np.stack(shapes), tuple(names)


def _kind_of(mask: NDArray[np.bool_]) -> str | None:
    shapes, names = _templates()
    shape = _normalised(mask).ravel()
    overlap = np.minimum(shapes, shape).sum(1) / np.maximum(shapes, shape).sum(1)
    best = int(overlap.argmax())
    return names[best] if overlap[best] >= LEAST_OVERLAP else None


def _background_features(picture: NDArray[np.float32], free: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Median colour of the free pixels in four horizontal bands, (12,)."""
    bands = []
    for rows in np.array_split(np.arange(SIZE), 4):
        pixels = picture[rows][free[rows]]
        bands.append(np.median(pixels, axis=0) if len(pixels) else np.full(3, np.nan))
    return np.concatenate(bands)


@functools.cache
def _background_centres() -> NDArray[np.float32]:
    rng = random.Random("backgrounds")
    free = np.ones((SIZE, SIZE), bool)
    return np.stack(
        [
            np.mean(
                [
                    _background_features(np.asarray(paint_background(rng, name, SIZE), np.float32), free)
                    for _ in range(64)
                ],
                axis=0,
            )
            for name in BACKGROUNDS
        ]
    )


def _background_of(picture: NDArray[np.float32], free: NDArray[np.bool_]) -> str:
    distance = np.nanmean((_background_centres() - _background_features(picture, free)) ** 2, axis=1)
    return BACKGROUNDS[int(distance.argmin())]


def read(pictures: Tensor) -> list[Reading]:
    """Read pictures.

    Args:
        pictures: uint8 (N, 3, 64, 64).
    """
    if pictures.dtype != torch.uint8 or pictures.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"pictures must be uint8 (N, 3, {SIZE}, {SIZE}), not {pictures.dtype} {tuple(pictures.shape)}")
    palette = torch.tensor([PALETTE[c] for c in COLOURS], dtype=torch.float32)
    readings = []
    for picture in pictures.permute(0, 2, 3, 1).float():
        near, which = torch.cdist(picture.reshape(-1, 3), palette).min(-1)
        taken = (near < COLOUR_REACH).view(SIZE, SIZE).numpy()
        colours = which.view(SIZE, SIZE).numpy()
        stickers = []
        for index in np.unique(colours[taken]):
            regions, count = ndimage.label(taken & (colours == index))
            for region in range(1, count + 1):
                blob = regions == region
                area = int(blob.sum())
                if area >= SPECK:
                    y, x = (float(v.mean()) for v in np.nonzero(blob))
                    kind = _kind_of(blob) if area >= SMALLEST else None
                    stickers.append(ReadSticker(COLOURS[index], kind, x, y))
        readings.append(Reading(_background_of(picture.numpy(), ~taken), tuple(stickers)))
    return readings


def _stands(relation: str, first: list[ReadSticker], second: list[ReadSticker]) -> bool:
    """Whether every sticker of ``first`` lies on the named side of every one of ``second``."""
    if relation in ("left of", "right of"):
        a, b = [s.x for s in first], [s.x for s in second]
    else:
        a, b = [s.y for s in first], [s.y for s in second]
    return max(a) < min(b) if relation in ("left of", "above") else min(a) > max(b)


def judge(reading: Reading, scene: Scene) -> Verdict:
    """Compare a reading with the scene that was asked for. Every sticker counts: extra ones and debris are wrong."""
    wanted = sorted((g.colour, g.kind) for g in scene.groups for _ in range(g.count))
    pairs = sorted((s.colour, s.kind or "?") for s in reading.stickers)
    relation: bool | None = None
    if scene.relation is not None:
        groups = [[s for s in reading.stickers if (s.colour, s.kind) == (g.colour, g.kind)] for g in scene.groups]
        relation = all(groups) and _stands(scene.relation, groups[0], groups[1])
    return Verdict(
        background=reading.background == scene.background,
        count=len(pairs) == len(wanted),
        colour=sorted(c for c, _ in pairs) == sorted(c for c, _ in wanted),
        kind=pairs == wanted,
        relation=relation,
    )


def verify(pictures: Tensor, scenes: list[Scene]) -> list[Verdict]:
    """:func:`judge` for a batch: uint8 pictures (N, 3, 64, 64) against N scenes."""
    return [judge(reading, scene) for reading, scene in zip(read(pictures), scenes, strict=True)]
