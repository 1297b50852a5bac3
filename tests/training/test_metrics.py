"""The measures against closed forms, and on pictures whose relation is known."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tdm.training.metrics import (
    accuracies,
    agreement,
    bootstrap_interval,
    colour_ratios,
    distance,
    diversity,
    energy_distance,
    features,
    frechet_distance,
    measured,
    power_ratios,
    power_spectrum,
    sliced_wasserstein,
    spectrum,
    spread,
)
from tdm.training.metrics.bootstrap import ratio
from tdm.training.metrics.distances import picture_frechet, picture_sliced_wasserstein
from tdm.training.metrics.spectrum import octaves
from tdm.training.worlds.stickers.draw import draw
from tdm.training.worlds.stickers.scene import Group, Scene
from tdm.training.worlds.teacher.data import pictures
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


# ---------------------------------------------------------------------- distances of points


def gaussian(n: int, mean: list[float], deviations: list[float], seed: int) -> torch.Tensor:
    noise = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.tensor(mean, dtype=torch.float64) + noise * torch.tensor(deviations, dtype=torch.float64)


def test_sliced_wasserstein_of_shifted_gaussians_is_the_closed_form() -> None:
    """In a direction u the distance is |u mu|, whose mean square is |mu|^2 / D."""
    mu, ones = [3.0, 4.0, 0.0, 0.0], [1.0] * 4
    x, y = gaussian(2000, [0.0] * 4, ones, 0), gaussian(1500, mu, ones, 1)
    assert sliced_wasserstein(x, y, 2000) == pytest.approx(5 / math.sqrt(4), rel=0.03)
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-9)
    assert sliced_wasserstein(x, gaussian(1500, [0.0] * 4, ones, 2)) < 0.1


def test_sliced_wasserstein_of_a_moved_set_is_exact_also_for_sets_of_other_sizes() -> None:
    x = gaussian(60, [0.0], [1.0], 0)
    assert sliced_wasserstein(x, x + 2.5) == pytest.approx(2.5, rel=1e-12)
    assert sliced_wasserstein(x, (x + 2.5).repeat_interleave(2, 0)) == pytest.approx(2.5, rel=1e-12)
    # Mass 1/2 at 0 and 1 against 1/3 at 0, 1 and 2: 1/6 goes from 0 to 1, 1/3 from 1 to 2, each over a distance of 1.
    two, three = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    assert sliced_wasserstein(two, three) == pytest.approx(math.sqrt(1 / 6 + 1 / 3), rel=1e-12)


def exactly(points: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
    """The points moved and stretched until mean and covariance are these to rounding."""
    points = points - points.mean(0)
    white = points @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(points.T))).T
    return mean + white @ torch.linalg.cholesky(cov).T


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """For covariances that commute it is the sum of the squared differences of means and of deviations."""
    x, y = gaussian(200, [0.0] * 3, [1.0] * 3, 0), gaussian(150, [0.0] * 3, [1.0] * 3, 1)
    turn = torch.linalg.qr(gaussian(3, [0.0] * 3, [1.0] * 3, 2)).Q
    one, two = torch.tensor([0.5, 2.0, 1.0]).double(), torch.tensor([1.5, 0.25, 1.0]).double()
    mean_x, mean_y = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 0.0, 0.5]).double()
    x = exactly(x, mean_x, turn @ one.square().diag() @ turn.T)
    y = exactly(y, mean_y, turn @ two.square().diag() @ turn.T)
    expected = (mean_x - mean_y).square().sum() + (one - two).square().sum()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    # In one dimension too, where it is (mu_x - mu_y)^2 + (sigma_x - sigma_y)^2.
    assert frechet_distance(3 * x[:, :1], x[:, :1]) == pytest.approx(
        float((2 * x[:, 0].mean()).square() + (2 * x[:, 0].std()).square()), rel=1e-10
    )
    with pytest.raises(ValueError, match="a covariance in 3 dimensions needs more points than 3"):
        frechet_distance(x[:3], y)


def test_frechet_distance_of_covariances_that_do_not_commute_is_scipys() -> None:
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(100, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double()
        for _ in range(2)
    )
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    assert float((cov_x @ cov_y - cov_y @ cov_x).abs().max()) > 1
    cross = np.trace(sqrtm((cov_x @ cov_y).numpy())).real
    expected = float((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace()) - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_distances_of_pictures_see_a_blur_and_equal_pictures_are_near() -> None:
    drawn, others = pictures(128, 1)[0], pictures(128, 2)[0]
    blurred = F.avg_pool2d(others.float(), 3, 1, 1).to(torch.uint8)
    for measure in (picture_frechet, picture_sliced_wasserstein):
        assert measure(blurred, drawn) > 2 * measure(others, drawn)
        assert measure(drawn, drawn) == pytest.approx(0, abs=1e-6)


def test_features_of_small_and_of_many_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = pictures(4, 1)[0]
    small = drawn[..., ::4, ::4]
    assert torch.equal(features(small), features(small.repeat_interleave(4, 2).repeat_interleave(4, 3)))
    whole = features(drawn)
    monkeypatch.setattr(sys.modules[features.__module__], "CHUNK", 3 * 64 * 64)  # pixels: three pictures and one
    torch.testing.assert_close(features(drawn), whole, rtol=1e-5, atol=1e-5)


def test_spread_of_points_is_their_mean_distance() -> None:
    assert float(spread(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]))) == pytest.approx(10 / 3)
    assert spread(torch.zeros(5, 3, 2)).shape == (5,)


# ---------------------------------------------------------------------- spectrum


def test_the_spectrum_of_white_noise_is_its_variance_in_every_band() -> None:
    noise = 3 * torch.randn(40, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = power_spectrum(noise + 50).mean(0)
    assert octaves(64, 96) == ["2-4 px", "4-8 px", "8-16 px", "16-32 px", "32-64 px"]
    torch.testing.assert_close(spectrum, torch.full((5,), 9.0, dtype=torch.float64), rtol=0.15, atol=0)


def test_a_wave_is_in_the_band_of_its_length_with_its_power() -> None:
    for waves, band in ((20, 0), (12, 1), (6, 2)):  # of 64 pixels
        x = torch.arange(64, dtype=torch.float64)
        wave = 100 * torch.sin(2 * math.pi * waves * (x[:, None] * 0.6 + x * 0.8) / 64)  # aslant
        power = power_spectrum(wave.expand(1, 3, 64, 64))[0]
        assert power[band] > 0.99 * power.sum()
        inside = power[band] * cells(band)
        assert float(inside) == pytest.approx(64 * 64 * 100**2 / 2, rel=0.02)  # Parseval, both signs of the frequency


def cells(band: int) -> int:
    """Fourier coefficients of 64 x 64 pixels whose wavelength is in an octave."""
    k = torch.fft.fftfreq(64) * 64
    wavelength = 64 / (k[:, None].square() + k.square()).sqrt()
    return int(((wavelength >= 2 ** (band + 1)) & (wavelength < 2 ** (band + 2))).sum())


def test_a_blur_takes_from_the_fine_bands_alone() -> None:
    drawn = pictures(16, 1)[0]
    blurred = F.avg_pool2d(drawn.float(), 3, 1, 1)
    ratios = power_spectrum(blurred).mean(0) / power_spectrum(drawn).mean(0)
    assert ratios[0] < 0.3 < ratios[1] < ratios[2] < ratios[3]
    assert ratios[-1] > 0.9


def test_ratios_of_power_are_named_by_their_octave_and_come_together_in_the_sharpness() -> None:
    drawn = pictures(16, 1)[0]
    blurred = F.avg_pool2d(drawn.float(), 3, 1, 1).byte()
    ratios = power_ratios(blurred, drawn)
    assert list(ratios) == ["sharpness", "power_2-4px", "power_4-8px", "power_8-16px"]
    sharpness, *octaves_of_it = ratios.values()
    assert math.prod(octaves_of_it) == pytest.approx(sharpness**3)
    assert octaves_of_it == pytest.approx(
        (power_spectrum(blurred).mean(0) / power_spectrum(drawn).mean(0))[:3].tolist()
    )


def test_a_spectrum_is_of_each_picture_however_many_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = pictures(5, 1)[0]
    together = power_spectrum(drawn)
    monkeypatch.setattr(spectrum, "CHUNK", 2 * 64 * 64)
    torch.testing.assert_close(power_spectrum(drawn), together, rtol=1e-12, atol=0)
    assert power_spectrum(drawn[..., :3, :]).shape == (5, 0)


# ---------------------------------------------------------------------- agreement, accuracy


def test_agreement_is_nothing_for_the_teacher_itself_and_one_for_another_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    same, unrelated = torch.randn(2, 500, 2, generator=generator)
    others = torch.randn(500, 4, 2, generator=generator)
    assert float(ratio(agreement(same, same, others))) == 0
    assert float(ratio(agreement(unrelated, same, others))) == pytest.approx(1, abs=0.05)
    near = same + 0.1 * (unrelated - same)
    assert float(ratio(agreement(near, same, others))) == pytest.approx(0.1, abs=0.01)
    shown = torch.tensor([[[0, 0, 0, 0]]], dtype=torch.uint8)  # pictures: no difference wraps around
    assert agreement(shown + 3, shown, shown[None] + 255).tolist() == [[6.0, 510.0]]


def test_accuracies_name_what_is_wrong() -> None:
    scenes = [
        Scene("sea", (Group(1, "red", "moon"),)),
        Scene("night", (Group(1, "pink", "cross"), Group(1, "blue", "ball")), "left of"),
    ]
    drawn = torch.from_numpy(np.stack([np.asarray(draw(scene, random.Random(0))) for scene in scenes])).permute(
        0, 3, 1, 2
    )
    attributes, combinations = accuracies(drawn, scenes)
    assert attributes["all"].tolist() == [True, True]
    assert attributes["relation"].tolist() == [True]  # of the one that has one
    assert {name: v.tolist() for name, v in combinations.items()} == {"pink cross": [True], "red moon": [True]}
    asked = [replace(scenes[0], background="snow"), replace(scenes[1], relation="right of")]
    attributes, combinations = accuracies(drawn, asked)
    assert attributes["background"].tolist() == [False, True]
    assert attributes["relation"].tolist() == [False]
    assert attributes["kind"].tolist() == [True, True]
    assert attributes["all"].tolist() == [False, False]
    assert combinations["red moon"].tolist() == [False]


# ---------------------------------------------------------------------- intervals


def test_the_interval_of_a_mean_is_the_normal_one_and_the_same_each_time() -> None:
    values = normal(400, 5.0, 0)[:, 0]
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.02)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.02)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)
    wider = bootstrap_interval(values, level=0.99)
    assert wider[0] < low < high < wider[1]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_interval((torch.rand(100, generator=generator) < 0.8).double())
        covered += low <= 0.8 <= high
    assert 88 <= covered <= 99


def test_an_interval_of_a_ratio_keeps_pairs_together() -> None:
    first = normal(200, 10.0, 0)
    same = torch.cat([2 * first, first], 1)
    assert bootstrap_interval(same, ratio) == pytest.approx((2.0, 2.0))
    value = measured(torch.cat([2 * first, normal(200, 10.0, 1)], 1), ratio)
    assert value.low < value.value < value.high
    assert value.high - value.low > 0.02


def test_an_interval_of_few_values_is_within_them_and_of_none_is_refused() -> None:
    assert bootstrap_interval(torch.tensor([0.1, 0.3, 0.2])) == pytest.approx((0.1, 0.3), abs=0.034)
    for values in (torch.tensor([]), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="needs values, all of them finite"):
            bootstrap_interval(values)
