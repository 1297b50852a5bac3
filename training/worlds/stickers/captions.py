"""Sentences for a scene: a small grammar with paraphrases, and its whole vocabulary."""

from __future__ import annotations

import random

from .scene import COLOURS, KINDS, MAX_COUNT, Group, Scene

NUMBERS = {1: ("a", "one"), 2: ("two",), 3: ("three",)}
NAMES = {kind: (kind,) for kind in KINDS} | {"ball": ("ball", "circle"), "square": ("square", "box")}
PLURALS = {"box": "boxes", "cross": "crosses"}
PLACES = {
    "night": ("at night", "in the night sky", "in the dark"),
    "meadow": ("in a meadow", "on the grass", "in the green hills"),
    "beach": ("on the beach", "on the sand"),
    "sea": ("at sea", "on the water", "over the waves"),
    "snow": ("in the snow", "on a winter day"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}
TEMPLATES = ("{what} {place}", "{what} {place}", "{place}, {what}", "a picture of {what} {place}", "{what}, {place}")


def _phrase(rng: random.Random, group: Group) -> str:
    name = rng.choice(NAMES[group.kind])
    number = rng.choice(NUMBERS[group.count])
    colour = group.colour
    if group.count > 1:
        name = PLURALS.get(name, name + "s")
    elif number == "a" and colour[0] in "aeiou":
        number = "an"
    return f"{number} {colour} {name}"


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the sentences that describe ``scene``, in lower case."""
    what = _phrase(rng, scene.groups[0])
    if scene.relation is not None:
        what = f"{what} {rng.choice(RELATION_WORDS[scene.relation])} {_phrase(rng, scene.groups[1])}"
    return rng.choice(TEMPLATES).format(what=what, place=rng.choice(PLACES[scene.background]))


def vocabulary() -> list[str]:
    """Every word the grammar can write, sorted."""
    words: set[str] = {"an"}
    for count in range(1, MAX_COUNT + 1):
        for kind in KINDS:
            for name in NAMES[kind]:
                words |= {name, PLURALS.get(name, name + "s")}
        words |= set(NUMBERS[count])
    for texts in (*PLACES.values(), *RELATION_WORDS.values(), TEMPLATES):
        for text in texts:
            words |= set(text.replace("{what}", "").replace("{place}", "").replace(",", " ").split())
    words |= set(COLOURS)
    return sorted(words)
