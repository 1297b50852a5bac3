"""Draw a scene as a 64x64 picture: paper stickers with a white rim on a painted background.

Everything the caption does not say varies: place, size, tilt and shade of each sticker, horizon, hills, waves and
stars. Drawn at four times the size with Pillow and box-filtered down.

There is a second style of drawing, for base models that are fine-tuned to it: postcards, with a white margin, straight
bands in the place of hills and waves, and upright stickers. It stays within what the bundled VAE can draw, which is
little other than stickers: it gives every shape its white rim, and pulls other colours towards those it knows.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from .scene import Scene

SIZE = 64
SUPERSAMPLE = 4
RIM = 1.3  # white rim, in pixels of the final picture
MAX_TILT = 14.0  # degrees

PALETTE = {
    "red": (214, 30, 40),
    "orange": (246, 128, 20),
    "yellow": (252, 212, 20),
    "green": (24, 138, 60),
    "blue": (34, 84, 214),
    "purple": (122, 44, 164),
    "pink": (246, 120, 186),
}

Point = tuple[float, float]
Style = Literal["sticker", "postcard"]


@dataclass(frozen=True)
class Drawing:
    """How a style draws: what differs between the styles."""

    waves: float = 1.0  # of hills and waves: 0 are straight bands
    tilt: float = 1.0  # of the stickers: 0 are upright
    margin: float = 0.0  # white, around the picture and under the stickers, in pixels


STYLES: dict[Style, Drawing] = {"sticker": Drawing(), "postcard": Drawing(waves=0.0, tilt=0.0, margin=2.0)}


def _polar(radii: list[float], start: float = -90.0) -> list[Point]:
    turns = [math.radians(start + 360.0 * i / len(radii)) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, turns, strict=True)]


def _heart() -> list[Point]:
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        x = 16 * math.sin(t) ** 3
        y = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        points.append((x / 16.0, (y + 1.5) / 16.0))
    return points


def _moon() -> list[Point]:
    """A crescent that opens to the right: an outer arc, and back along an inner one of a circle shifted right."""
    shift, inner = 0.55, 0.80
    x = (1 + shift**2 - inner**2) / (2 * shift)
    y = math.sqrt(1 - x * x)
    outer_from, inner_from = math.atan2(y, x), math.atan2(y, x - shift)
    outer = [outer_from + (2 * math.pi - 2 * outer_from) * i / 30 for i in range(31)]
    back = [-inner_from - (2 * math.pi - 2 * inner_from) * i / 24 for i in range(1, 24)]
    points = [(math.cos(a), math.sin(a)) for a in outer]
    points += [(shift + inner * math.cos(a), inner * math.sin(a)) for a in back]
    return [(px + 0.2, py) for px, py in points]


def _cross() -> list[Point]:
    arm, w = 1.0, 0.36
    return [(-w, -arm), (w, -arm), (w, -w), (arm, -w), (arm, w), (w, w), (w, arm), (-w, arm), (-w, w), (-arm, w),
            (-arm, -w), (-w, -w)]  # fmt: skip


# Outlines of radius about 1, chosen so that all kinds look equally large.
OUTLINES: dict[str, list[Point]] = {
    "ball": _polar([0.92] * 36),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": _polar([1.12, 0.5] * 5),
    "heart": _heart(),
    "moon": _moon(),
    "ring": _polar([1.0] * 36),
    "cross": _cross(),
}
RING_HOLE = 0.52


def polygon(kind: str, centre: Point, radius: float, tilt: float) -> list[Point]:
    """The polygon of a sticker; ``tilt`` in degrees, everything else in pixels."""
    c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    return [(centre[0] + radius * (c * x - s * y), centre[1] + radius * (s * x + c * y)) for x, y in OUTLINES[kind]]


def draw_sticker(
    pen: ImageDraw.ImageDraw,
    kind: str,
    colour: tuple[int, int, int],
    centre: Point,
    radius: float,
    tilt: float,
    rim: float = RIM,
) -> None:
    """Draw one sticker; all lengths in pixels of the canvas that ``pen`` draws on."""
    shape = polygon(kind, centre, radius, tilt)
    if kind == "ring":
        hole = radius * RING_HOLE
        for r, width, fill in (
            (radius + rim, radius - hole + 2 * rim, (255, 255, 255)),
            (radius, radius - hole, colour),
        ):
            box = [centre[0] - r, centre[1] - r, centre[0] + r, centre[1] + r]
            pen.ellipse(box, outline=fill, width=round(width))
        return
    if rim > 0:
        pen.line([*shape, shape[0], shape[1]], fill=(255, 255, 255), width=round(2 * rim), joint="curve")
    pen.polygon(shape, fill=colour)


def _shade(rng: random.Random, colour: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    common = rng.uniform(-amount, amount)
    r, g, b = (int(min(255, max(0, c + common + rng.uniform(-amount, amount) / 2))) for c in colour)
    return r, g, b


def _gradient(size: int, top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    t = np.linspace(0.0, 1.0, size)[:, None, None]
    column = (1 - t) * np.array(top) + t * np.array(bottom)
    return Image.fromarray(np.repeat(column.round().astype(np.uint8), size, axis=1), "RGB")


def _hill(
    rng: random.Random,
    pen: ImageDraw.ImageDraw,
    size: int,
    level: float,
    colour: tuple[int, int, int],
    drawing: Drawing,
) -> None:
    """A rolling band from ``level`` (0 top, 1 bottom) down to the lower edge."""
    phase, waves, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.3), drawing.waves * rng.uniform(0.02, 0.07)
    crest = [
        (x * size / 16, size * (level + height * math.sin(phase + 2 * math.pi * waves * x / 16))) for x in range(17)
    ]
    pen.polygon([*crest, (size, size), (0, size)], fill=colour)


def paint_background(rng: random.Random, name: str, size: int, drawing: Drawing = STYLES["sticker"]) -> Image.Image:
    """An RGB picture of ``size`` pixels a side."""
    horizon = rng.uniform(0.45, 0.65)
    if name == "night":
        picture = _gradient(size, _shade(rng, (14, 18, 58), 6), _shade(rng, (52, 44, 100), 8))
        pen = ImageDraw.Draw(picture)
        for _ in range(rng.randint(10, 20)):
            x, y, r = rng.uniform(0, size), rng.uniform(0, 0.85 * size), size / 64 * rng.uniform(0.35, 0.8)
            pen.ellipse([x - r, y - r, x + r, y + r], fill=(236, 236, 214))
        _hill(rng, pen, size, rng.uniform(0.82, 0.92), _shade(rng, (16, 20, 38), 4), drawing)
    elif name == "meadow":
        picture = _gradient(size, _shade(rng, (176, 214, 240), 8), _shade(rng, (226, 240, 248), 6))
        pen = ImageDraw.Draw(picture)
        _hill(rng, pen, size, horizon, _shade(rng, (176, 212, 150), 8), drawing)
        _hill(rng, pen, size, horizon + rng.uniform(0.12, 0.22), _shade(rng, (152, 196, 122), 8), drawing)
    elif name == "beach":
        picture = _gradient(size, _shade(rng, (250, 226, 206), 6), _shade(rng, (252, 240, 224), 4))
        pen = ImageDraw.Draw(picture)
        pen.rectangle([0, size * (horizon - 0.12), size, size], fill=_shade(rng, (158, 206, 214), 8))
        _hill(rng, pen, size, horizon + 0.05, _shade(rng, (232, 212, 164), 8), drawing)
    elif name == "sea":
        picture = _gradient(size, _shade(rng, (206, 224, 236), 6), _shade(rng, (228, 238, 242), 5))
        pen = ImageDraw.Draw(picture)
        for band in range(4):
            level = horizon - 0.15 + 0.17 * band
            _hill(rng, pen, size, level, _shade(rng, (118 - 14 * band, 178 - 16 * band, 200 - 12 * band), 6), drawing)
    elif name == "snow":
        picture = _gradient(size, _shade(rng, (188, 196, 214), 6), _shade(rng, (220, 226, 236), 5))
        pen = ImageDraw.Draw(picture)
        _hill(rng, pen, size, horizon, _shade(rng, (238, 242, 248), 4), drawing)
        for _ in range(rng.randint(14, 26)):
            x, y, r = rng.uniform(0, size), rng.uniform(0, size), size / 64 * rng.uniform(0.5, 1.0)
            pen.ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 255))
    else:
        raise ValueError(f"unknown background {name!r}")
    if drawing.margin:
        width = round(drawing.margin * size / SIZE)
        pen.rectangle([0, 0, size - 1, size - 1], outline=(255, 255, 255), width=width)
    return picture


def _spread(rng: random.Random, count: int, lo: float, hi: float, radius: float) -> list[float]:
    """``count`` places on [lo, hi], at least two radii and a rim apart, the slack shared out at random."""
    gap = 2 * radius + 2 * RIM + 1.0
    slack = (hi - lo) - gap * count
    cuts = sorted(rng.uniform(0, max(slack, 0)) for _ in range(count))
    return [lo + gap * (i + 0.5) + cut for i, cut in enumerate(cuts)]


def _place_group(rng: random.Random, count: int, box: tuple[float, float, float, float]) -> list[tuple[Point, float]]:
    """Centres and radii of ``count`` stickers in a row along the longer side of ``box`` (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    wide = (x1 - x0) > (y1 - y0) or ((x1 - x0) == (y1 - y0) and rng.random() < 0.5)
    length, depth = (x1 - x0, y1 - y0) if wide else (y1 - y0, x1 - x0)
    margin = 2 * RIM + 1.0
    largest = min((length / count - margin) / 2.24, (depth - margin) / 2.24)
    radius = (
        largest * rng.uniform(0.82, 1.0) if min(length, depth) < SIZE / 2 + 1 else min(largest, rng.uniform(9.0, 17.0))
    )
    along = _spread(rng, count, (x0 if wide else y0), (x1 if wide else y1), radius * 1.12)
    across_lo, across_hi = (y0, y1) if wide else (x0, x1)
    reach = radius * 1.12 + RIM + 0.5
    placed = []
    for a in along:
        b = rng.uniform(across_lo + reach, across_hi - reach)
        placed.append(((a, b) if wide else (b, a), radius * rng.uniform(0.94, 1.0)))
    return placed


def _layout(rng: random.Random, scene: Scene) -> list[list[tuple[Point, float]]]:
    if scene.relation is None:
        return [_place_group(rng, scene.groups[0].count, (0, 0, SIZE, SIZE))]
    # The group with more stickers gets a little more room.
    first, second = scene.groups[0].count, scene.groups[1].count
    cut = SIZE / 2 + rng.uniform(-1.5, 1.5)
    low, high = (0.0, cut), (cut, float(SIZE))
    if scene.relation in ("right of", "below"):
        low, high = high, low
    boxes: list[tuple[float, float, float, float]]
    if scene.relation in ("left of", "right of"):
        boxes = [(low[0], 0.0, low[1], SIZE), (high[0], 0.0, high[1], SIZE)]
    else:
        boxes = [(0.0, low[0], SIZE, low[1]), (0.0, high[0], SIZE, high[1])]
    return [_place_group(rng, n, box) for n, box in zip((first, second), boxes, strict=True)]


def draw(scene: Scene, rng: random.Random, style: Style = "sticker") -> Image.Image:
    """A 64x64 RGB picture of ``scene``; what the scene leaves open comes from ``rng``, alike in every style."""
    s, drawing = SUPERSAMPLE, STYLES[style]
    picture = paint_background(rng, scene.background, SIZE * s, drawing)
    pen = ImageDraw.Draw(picture)
    for group, places in zip(scene.groups, _layout(rng, scene), strict=True):
        for (x, y), radius in places:
            colour = _shade(rng, PALETTE[group.colour], 10)
            tilt = drawing.tilt * rng.uniform(-MAX_TILT, MAX_TILT)
            draw_sticker(pen, group.kind, colour, (x * s, y * s), radius * s, tilt, RIM * s)
    return picture.reduce(s)
