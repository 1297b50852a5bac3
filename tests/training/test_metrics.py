"""The measures against closed forms, and on pictures whose relation is known."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tdm.training.metrics import colour_ratios, distance, diversity, energy_distance
from tdm.training.teacher.data import pictures
from tdm.training.world.draw import draw
from tdm.training.world.scene import Scene
from torch.nn import functional as F


def normal(n: int, mean: float, seed: int) -> torch.Tensor:
    return mean + torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_gap(shift: float) -> float:
    """E|X - Y| for X ~ N(0, 1), Y ~ N(shift, 1): a folded normal of variance 2."""
    s = math.sqrt(2)
    return s * math.sqrt(2 / math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_energy_distance_of_normals_is_the_closed_form(shift: float) -> None:
    measured = energy_distance(normal(4000, 0.0, 0), normal(3000, shift, 1), block=700)
    assert measured == pytest.approx(2 * mean_gap(shift) - 2 * mean_gap(0.0), abs=0.01 + 0.05 * shift)


def of_prompts(scenes: list[Scene], seed: int, seeds: int = 4) -> torch.Tensor:
    """Drawn pictures (scenes, seeds, 3, 64, 64)."""
    rng = random.Random(seed)
    drawn = np.stack([[np.asarray(draw(scene, rng)) for _ in range(seeds)] for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 1, 4, 2, 3).contiguous()


def test_distance_sees_looks_and_contents() -> None:
    wanted = pictures(24, 1)[2]
    reference, same = of_prompts(wanted, 0), of_prompts(wanted, 1)
    floor, error = distance(same, reference)
    assert abs(floor) < 3 * error < 0.15
    darker = (same.float() * 0.8).to(torch.uint8)
    blurred = F.avg_pool2d(same.flatten(0, 1).float(), 3, 1, 1).to(torch.uint8).view_as(same)
    # One sticker kind in another's place, colours, numbers and background as before.
    changed = [
        replace(s, groups=(replace(s.groups[0], kind="cross" if s.groups[0].kind == "ball" else "ball"), *s.groups[1:]))
        for s in wanted
    ]
    for worse in (darker, blurred, of_prompts(changed, 1)):
        assert distance(worse, reference)[0] > 0.05


def test_diversity_is_zero_for_one_picture_and_grows_with_difference() -> None:
    drawn = pictures(16, 1)[0]
    same = drawn[:4, None].expand(4, 4, -1, -1, -1)
    assert diversity(same) == 0
    different = drawn.view(4, 4, 3, 64, 64)
    half = ((same.float() + different.float()) / 2).to(torch.uint8)
    assert 0 < diversity(half) < diversity(different)


def test_colour_ratios_name_what_changed() -> None:
    drawn = pictures(64, 1)[0]
    assert colour_ratios(drawn, drawn) == {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    darker = colour_ratios((drawn.float() * 0.9).round().to(torch.uint8), drawn)
    assert darker["brightness"] == pytest.approx(0.9, abs=0.005)
    grey = drawn.float().mean(1, keepdim=True).expand_as(drawn).to(torch.uint8)
    assert colour_ratios(grey, drawn)["saturation"] == 0
    assert colour_ratios(grey, drawn)["brightness"] == pytest.approx(1.0, abs=0.01)
