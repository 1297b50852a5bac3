"""What a picture of the Stickers world holds: one or two groups of stickers on a background."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

KINDS = ("ball", "square", "triangle", "star", "heart", "moon", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
BACKGROUNDS = ("night", "meadow", "beach", "sea", "snow")
RELATIONS = ("left of", "right of", "above", "below")
MAX_STICKERS = 4
MAX_COUNT = 3

# One pair per colour that no training picture shows, although every colour and every kind is seen with others:
# right answers on these can only come from composing what was learned.
HELD_OUT = frozenset(
    {
        ("red", "moon"),
        ("orange", "heart"),
        ("yellow", "square"),
        ("green", "star"),
        ("blue", "triangle"),
        ("purple", "ball"),
        ("pink", "cross"),
    }
)

Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class Group:
    """``count`` stickers of one kind and colour."""

    count: int
    colour: str
    kind: str

    @property
    def held_out(self) -> bool:
        return (self.colour, self.kind) in HELD_OUT


@dataclass(frozen=True)
class Scene:
    """A background and one group, or two groups of which the first stands ``relation`` the second."""

    background: str
    groups: tuple[Group, ...]
    relation: str | None = None

    @property
    def held_out(self) -> bool:
        return any(group.held_out for group in self.groups)


def _random_group(rng: random.Random, room: int) -> Group:
    return Group(rng.randint(1, min(MAX_COUNT, room)), rng.choice(COLOURS), rng.choice(KINDS))


def random_scene(rng: random.Random, split: Split = "train") -> Scene:
    """Draw a scene: a quarter has one group, the rest two that differ in colour or kind, at most 4 stickers in all.

    ``train`` scenes hold no pair of :data:`HELD_OUT`, ``held_out`` scenes at least one, ``all`` asks for neither.
    """
    while True:
        first = _random_group(rng, MAX_STICKERS)
        groups: tuple[Group, ...] = (first,)
        relation = None
        if rng.random() >= 0.25:
            groups = (first, _random_group(rng, MAX_STICKERS - first.count))
            relation = rng.choice(RELATIONS)
        scene = Scene(rng.choice(BACKGROUNDS), groups, relation)
        if len({(g.colour, g.kind) for g in groups}) < len(groups):
            continue
        if split == "all" or scene.held_out == (split == "held_out"):
            return scene


def scenes(seed: int, split: Split = "train") -> Iterator[Scene]:
    """An endless stream of scenes; the same seed gives the same stream."""
    rng = random.Random(f"stickers-{split}-{seed}")
    while True:
        yield random_scene(rng, split)
