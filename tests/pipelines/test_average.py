"""The mean of students is the mean of what they add to the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tdm.cli import main
from tdm.errors import TDMError
from tdm.pipelines.loras.average import mean, reduce, stack
from tdm.pipelines.loras.merge import merge
from tdm.pipelines.loras.pairs import Lora, state_dict_of
from tdm.pipelines.students.average import average
from tdm.pipelines.students.file import Student, read_student, save_student
from tdm.tests.commands import refused
from tdm.tests.pipelines.students import Make, error, latents, load, without_student
from torch import Tensor


def random_lora(rank: int, seed: int, dtype: torch.dtype = torch.float64, kernel: tuple[int, ...] = ()) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, 12, *kernel, generator=generator, dtype=torch.float64)
    B = torch.randn(9, rank, *[1] * len(kernel), generator=generator, dtype=torch.float64)
    return Lora(A.to(dtype), B.to(dtype))


def product(lora: Lora) -> Tensor:
    return lora.B.double().flatten(1) @ lora.A.double().flatten(1)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_stack_is_the_mean_of_the_products(dtype: torch.dtype, rounding: float, kernel: tuple[int, ...]) -> None:
    loras, weights = [random_lora(rank, rank, dtype, kernel) for rank in (2, 3, 1)], [0.5, 0.3, 0.2]
    expected = sum(weight * product(lora) for lora, weight in zip(loras, weights, strict=True))
    stacked = stack(loras, weights)
    assert stacked.rank == 6
    assert relative(product(stacked), expected) < rounding
    whole, singular = reduce(stacked, 6)
    assert relative(product(whole), expected) < rounding
    assert (whole.A.shape[1:], whole.B.shape[2:], whole.A.dtype) == (loras[0].A.shape[1:], loras[0].B.shape[2:], dtype)
    assert torch.allclose(singular, torch.linalg.svdvals(expected)[:6])


def test_a_smaller_rank_keeps_the_most_that_any_can() -> None:
    exact = stack([random_lora(4, 0), random_lora(4, 1)], [0.5, 0.5])
    u, s, v = torch.linalg.svd(product(exact), full_matrices=False)
    for rank in (1, 3, 8):
        kept = reduce(exact, rank)[0]
        assert kept.rank == rank
        assert relative(product(kept), u[:, :rank] @ s[:rank].diag() @ v[:rank]) < 1e-13
    layers = {"a": random_lora(4, 0), "b": random_lora(2, 5)}
    others = {"a": random_lora(4, 1), "b": random_lora(3, 6)}
    both = [{"unet": layers}, {"unet": others}]
    average = mean(both, [1, 3], rank=2)
    missed = whole = 0.0
    for name in layers:
        right = (product(layers[name]) + 3 * product(others[name])) / 4
        missed += float((right - product(average.layers["unet"][name])).square().sum())
        whole += float(right.square().sum())
    assert average.kept == pytest.approx((1 - missed / whole) ** 0.5, rel=1e-12)
    assert {name: lora.rank for name, lora in mean(both, [1, 1]).layers["unet"].items()} == {"a": 4, "b": 3}


def test_the_mean_of_one_lora_with_itself_is_that_lora() -> None:
    lora = {"unet": {"a": random_lora(3, 0)}}
    average = mean([lora, lora], [2, 5])
    assert relative(product(average.layers["unet"]["a"]), product(lora["unet"]["a"])) < 1e-13
    assert average.kept == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("family", ["sd15", "pixart"])
def test_a_pipeline_with_the_mean_equals_one_with_averaged_weights(family: str, make: Make, tmp_path: Path) -> None:
    files = [make(family, f"{seed}.safetensors", seed=seed) for seed in (0, 1)]
    arguments = [*map(str, files), "--weights", "1", "3", "--rank", "4", "--out", str(tmp_path / "mean.safetensors")]
    assert main(["average", *arguments]) == 0
    pipe = load(tmp_path / "mean.safetensors")
    drawn = latents(pipe, family)

    pipe.load_student(files[0])
    clean = without_student(pipe)
    clean.unload_lora_weights()
    network = getattr(clean, clean.family.denoiser)
    for file, share in zip(files, (0.25, 0.75), strict=True):
        (layers,) = read_student(file).layers.values()
        merge(network, {name: lora.scaled(share) for name, lora in layers.items()})
    assert error(drawn, latents(clean, family)) < 1e-5
    assert error(drawn, latents(load(files[0]), family)) > 1e-2
    assert error(drawn, latents(load(files[1]), family)) > 1e-3


def test_the_file_says_what_it_is_and_keeps_the_notes_that_all_have(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make("sd15", "a.safetensors", notes={"method": "TDM", "training": "seed 0"})
    two = make("sd15", "b.safetensors", seed=1, notes={"method": "TDM", "training": "seed 1"})
    out = tmp_path / "mean.safetensors"
    assert main(["average", str(one), str(two), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    recipe, tensors = read_student(out).recipe, load_file(out)
    assert recipe is not None
    assert recipe.notes == {"method": "TDM", "average": "of 2 students, weights 1 : 1"}
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {2}
    expected, kept = average([read_student(one), read_student(two)])
    assert expected.recipe == recipe
    assert f"{kept:.2%}" in printed
    assert 0.3 < kept < 0.999
    (layers,) = expected.layers.values()
    assert all(torch.equal(tensors[f"unet.{key}"], value) for key, value in state_dict_of(layers).items())


def test_what_cannot_be_averaged_is_one_line(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, out = str(make("sd15", "a.safetensors")), str(tmp_path / "mean.safetensors")
    two = str(make("sd15", "b.safetensors", seed=1))
    other = str(make("sd15", "grid.safetensors", trained_timesteps={4: [999, 700, 500, 300]}))
    pixart = str(make("pixart", "pixart.safetensors"))
    student = read_student(one)
    fewer = {component: dict(list(layers.items())[1:]) for component, layers in student.layers.items()}
    save_student(tmp_path / "fewer.safetensors", Student(student.recipe, fewer))
    (tmp_path / "run").mkdir()
    for arguments, message in (
        ([one], "two students or more"),
        ([one, other], "trained_timesteps is"),
        ([one, pixart], "base_model is"),
        ([one, str(tmp_path / "fewer.safetensors")], "is not in all of them"),
        ([one, two, "--weights", "1"], "as many weights"),
        ([one, two, "--weights", "1", "0"], "above 0"),
        ([one, two, "--rank", "0"], "at least 1"),
        ([one, str(tmp_path / "run")], "not the folder of a run"),
        ([one, str(tmp_path / "none.safetensors")], "none.safetensors"),
    ):
        assert message in refused(["average", *arguments, "--out", out], capsys)
    assert not Path(out).exists()
    before = Path(two).read_bytes()
    assert "--force" in refused(["average", one, two, "--out", two], capsys)
    assert Path(two).read_bytes() == before


def test_layers_of_other_widths_are_refused() -> None:
    narrow = Lora(torch.ones(2, 11), torch.ones(9, 2))
    with pytest.raises(TDMError, match=r"'unet\.a' is not in all of them with one shape"):
        mean([{"unet": {"a": random_lora(2, 0)}}, {"unet": {"a": narrow}}], [1, 1])
