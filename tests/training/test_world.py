"""The Stickers world: the verifier reads drawn pictures and refuses wrong ones; captions and splits keep their word."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from tdm.training.worlds.stickers.captions import caption, vocabulary
from tdm.training.worlds.stickers.draw import STYLES, draw, paint_background
from tdm.training.worlds.stickers.scene import BACKGROUNDS, COLOURS, HELD_OUT, KINDS, Group, Scene, scenes
from tdm.training.worlds.stickers.verify import judge, read, verify
from tdm.training.worlds.teacher.data import pictures


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, list[Scene]]:
    splits = [pictures(200, 11, split) for split in ("train", "held_out")]
    return torch.cat([p for p, _, _ in splits]), [scene for _, _, wanted in splits for scene in wanted]


def test_verifier_reads_drawn_pictures(drawn: tuple[torch.Tensor, list[Scene]]) -> None:
    verdicts = verify(*drawn)
    assert sum(v.correct for v in verdicts) / len(verdicts) >= 0.98


def change(scene: Scene, what: str, rng: random.Random) -> Scene:
    """The scene with one thing changed."""
    first, *rest = scene.groups
    if what == "background":
        return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    if what == "relation":
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return replace(scene, relation=opposite[scene.relation or ""])
    if what == "count":
        first = replace(first, count=first.count % 3 + 1)
    if what == "colour":
        first = replace(first, colour=rng.choice([c for c in COLOURS if c != first.colour]))
    if what == "kind":
        first = replace(first, kind=rng.choice([k for k in KINDS if k != first.kind]))
    return replace(scene, groups=(first, *rest))


@pytest.mark.parametrize("what", ["background", "relation", "count", "colour", "kind"])
def test_verifier_refuses_a_picture_with_one_thing_wrong(drawn: tuple[torch.Tensor, list[Scene]], what: str) -> None:
    rng = random.Random(0)
    wanted = [(p, s) for p, s in zip(*drawn, strict=True) if what != "relation" or s.relation is not None]
    changed = [change(scene, what, rng) for _, scene in wanted]
    verdicts = verify(torch.stack([p for p, _ in wanted]), changed)
    assert sum(v.correct for v in verdicts) == 0
    assert sum(getattr(v, what) for v in verdicts) <= 0.01 * len(verdicts)


def test_verifier_refuses_blurs_noise_and_halves(drawn: tuple[torch.Tensor, list[Scene]]) -> None:
    pictures_u8, wanted = drawn[0][:100], drawn[1][:100]
    blurred = []
    for p in pictures_u8:
        image = Image.fromarray(p.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(4))
        blurred.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1))
    noise = torch.randint(0, 256, pictures_u8.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    halves = torch.cat([pictures_u8[:, :, :32], pictures_u8[:, :, :32].flip(2)], 2)
    for wrong, most in ((torch.stack(blurred), 0.1), (noise, 0.0), (halves, 0.15)):
        assert sum(v.correct for v in verify(wrong, wanted)) <= most * len(wanted)


def test_debris_and_extra_stickers_count_as_wrong() -> None:
    scene = Scene("snow", (Group(1, "red", "ball"),))
    picture = torch.from_numpy(np.array(draw(scene, random.Random(0)))).permute(2, 0, 1)
    assert judge(read(picture[None])[0], scene).correct
    picture[:, 2:6, 2:6] = torch.tensor([34, 84, 214], dtype=torch.uint8).view(3, 1, 1)
    assert not judge(read(picture[None])[0], scene).correct


def test_splits_keep_their_word() -> None:
    train = list(islice(scenes(0, "train"), 2000))
    held = list(islice(scenes(0, "held_out"), 500))
    assert not any((g.colour, g.kind) in HELD_OUT for s in train for g in s.groups)
    assert all(any((g.colour, g.kind) in HELD_OUT for g in s.groups) for s in held)
    pairs = {(g.colour, g.kind) for s in train for g in s.groups}
    assert len(pairs) == len(COLOURS) * len(KINDS) - len(HELD_OUT)


def test_same_seed_same_pictures() -> None:
    a, b = pictures(8, 3), pictures(8, 3)
    assert torch.equal(a[0], b[0])
    assert a[1:] == b[1:]
    assert not torch.equal(a[0], pictures(8, 4)[0])


def test_stickers_are_drawn_as_those_that_the_bundled_model_learned_from() -> None:
    drawn = pictures(24, 3)[0].numpy().tobytes()
    assert hashlib.sha256(drawn).hexdigest() == "8e60c918d3334a80f8070870cb31c6682ddfc99f048752e543f47b752a112df3"


def test_postcards_are_the_same_scenes_in_another_style_and_are_read_as_well() -> None:
    stickers, texts, wanted = pictures(200, 11, "held_out")
    postcards, same_texts, same_wanted = pictures(200, 11, "held_out", "postcard")
    assert (same_texts, same_wanted) == (texts, wanted)
    assert sum(v.correct for v in verify(postcards, wanted)) >= 0.95 * len(wanted)
    white = torch.stack([(p >= 250).all(1).float()[:, 0].mean(1) for p in (stickers, postcards)])  # the topmost row
    assert white[0].max() < 0.1
    assert white[1].min() == 1
    for name in ("meadow", "sea"):
        inside = np.asarray(paint_background(random.Random(0), name, 64, STYLES["postcard"]))[2:-2, 2:-2]
        assert (inside == inside[:, :1]).all()  # straight bands


def test_one_scene_has_many_pictures_and_many_captions() -> None:
    scene = next(scenes(1, "train"))
    rng = random.Random(0)
    assert len({draw(scene, rng).tobytes() for _ in range(10)}) == 10
    texts = {caption(scene, rng) for _ in range(200)}
    assert len(texts) > 10
    assert {word for text in texts for word in text.replace(",", "").split()} <= set(vocabulary())
