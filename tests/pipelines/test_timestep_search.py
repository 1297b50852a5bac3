"""The search for the best timesteps: exact where that can be checked, and no worse than what it replaces."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tdm.cli import main
from tdm.errors import TDMError
from tdm.pipelines.families import Size
from tdm.pipelines.schedule import NoiseSchedule, ddim_step, grid_pairs, uniform_grid
from tdm.pipelines.searched_grids import predictor, search
from tdm.pipelines.students.file import read_student
from tdm.pipelines.timestep_search import Predict, cheapest_paths, fine_levels, fine_run, path_cost, run_error
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.students import Make, latents, load
from torch import Tensor

SCHEDULES = {"flow": NoiseSchedule.flow(), "vp": NoiseSchedule.vp()}
STD = 0.4  # of the Gaussian data


def gaussian(schedule: NoiseSchedule) -> Predict:
    """The perfect network for data N(0, STD^2)."""

    def predict(x: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(torch.tensor(timestep)))
        variance = alpha**2 * STD**2 + sigma**2
        return x * alpha * STD**2 / variance, x * sigma / variance

    return predict


def true_error(schedule: NoiseSchedule, grid: list[float]) -> float:
    """Of a run on a grid for that network, against the flow's own end: both are the start times a number."""
    alphas, sigmas = (values.tolist() for values in grid_pairs(schedule, grid))
    exact = STD / math.sqrt(alphas[0] ** 2 * STD**2 + sigmas[0] ** 2)
    value = 1.0
    for t, alpha, sigma in zip(grid, alphas[1:], sigmas[1:], strict=True):
        x0, eps = gaussian(schedule)(torch.tensor(value, dtype=torch.float64), t)
        value = float(ddim_step(x0, eps, alpha, sigma))
    return abs(value / exact - 1)


def random_costs(n: int, seed: int) -> Tensor:
    costs = torch.rand(n, n + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(torch.ones(n, n + 1).triu(1).bool(), costs, torch.inf)


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_of_levels_is_cheaper(seed: int) -> None:
    n, costs = 8, random_costs(8, seed)
    paths = cheapest_paths(costs, range(1, n + 1))
    for k, (levels, cost) in paths.items():
        ways = [[0, *rest] for rest in itertools.combinations(range(1, n), k - 1)]
        assert levels == min(ways, key=lambda way: path_cost(costs, way))
        assert cost == pytest.approx(path_cost(costs, levels), abs=1e-15)
    assert paths[n].levels == list(range(n))
    assert list(cheapest_paths(costs, [5, 2])) == [5, 2]
    for wrong in ([0], [n + 1], []):
        with pytest.raises(TDMError, match="from 1 to 8"):
            cheapest_paths(costs, wrong)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_on_a_gaussian_the_found_grids_beat_the_uniform_ones_and_more_steps_are_better(kind: str) -> None:
    schedule, counts = SCHEDULES[kind], (2, 3, 4, 6, 8)
    uniform = {k: uniform_grid(k, schedule) for k in counts}
    fine = fine_levels(schedule, 200, 1.0, list(uniform.values()))
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs, x0 = fine_run(gaussian(schedule), schedule, fine, noise)
    paths = cheapest_paths(costs, counts)
    errors = [true_error(schedule, [fine[i] for i in paths[k].levels]) for k in counts]
    for k, error in zip(counts, errors, strict=True):
        assert error < 0.9 * true_error(schedule, uniform[k])
    assert errors == sorted(errors, reverse=True)
    assert [paths[k].cost for k in counts] == sorted((paths[k].cost for k in counts), reverse=True)
    for k in counts:
        grid = [fine[i] for i in paths[k].levels]
        missed = run_error(gaussian(schedule), schedule, grid, noise, x0) ** 0.5
        assert missed == pytest.approx(true_error(schedule, grid), abs=2 * true_error(schedule, fine))


def test_the_costs_are_those_of_the_steps() -> None:
    schedule = SCHEDULES["flow"]
    fine, recorded = [1000.0, 800.0, 500.0, 100.0], []
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def predict(x: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        recorded.append(timestep)
        return gaussian(schedule)(x, timestep)

    costs, x0 = fine_run(predict, schedule, fine, noise)
    assert recorded == fine
    assert costs.dtype == x0.dtype == torch.float64
    assert costs.diagonal(1).tolist() == [0.0] * 4
    assert bool((costs.isinf() == torch.ones(4, 5).tril().bool()).all())
    first_x0, first_eps = predict(noise, 1000.0)
    for j, t in enumerate([800.0, 500.0, 100.0], 1):
        state = noise.double()
        for here, there in itertools.pairwise(fine[: j + 1]):
            state = ddim_step(*(p.double() for p in predict(state.float(), here)), 1 - there / 1000, there / 1000)
        missed = ddim_step(first_x0.double(), first_eps.double(), 1 - t / 1000, t / 1000) - state
        assert float(costs[0, j]) == pytest.approx(float(missed.norm() / state.norm()) ** 2, rel=1e-6)
    assert run_error(predict, schedule, fine, noise, x0) == 0


def test_the_levels_hold_the_grids_that_are_compared_and_begin_where_they_do() -> None:
    fine = fine_levels(SCHEDULES["flow"], 32, 2.0, [[900.0, 123.4], [900.0]])
    assert fine[0] == 900
    assert 123.4 in fine
    assert 32 <= len(fine) <= 34
    assert fine == sorted(set(fine), reverse=True)
    vp = fine_levels(SCHEDULES["vp"], 16, 1.0, [])
    assert (vp[0], len(vp)) == (999, 16)
    assert all(t == int(t) for t in vp)


def test_a_network_that_gives_nan_is_an_error() -> None:
    with pytest.raises(TDMError, match="NaN"):
        fine_run(lambda x, _: (x * torch.nan, x), SCHEDULES["flow"], [1000.0, 500.0], torch.ones(2, 2))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_networks_of_all_families_are_run_as_their_pipelines_run_them(family: str, make: Make) -> None:
    pipe = load(make(family))
    size = Size(pipe.recipe.height, pipe.recipe.width, pipe.recipe.num_frames)
    noise = torch.randn(1, *pipe.family.latent_shape(pipe, size), generator=torch.Generator().manual_seed(0))
    about_text = ("max_sequence_length", "complex_human_instruction")
    options = {name: value for name, value in tiny.call_kwargs(family).items() if name in about_text}
    predict = predictor(pipe, pipe.family, [tiny.PROMPT], size, 1.0, **options)
    grid = pipe.recipe.trained_timesteps[4]
    expected = pipe.family.unpack(pipe, latents(pipe, family, latents=pipe.family.pack(noise)), size)
    assert run_error(predict, pipe.scheduler.schedule, grid, noise, expected.double()) < 1e-8


@pytest.mark.parametrize("family", ["sd15", "pixart"])
def test_guidance_makes_two_passes_as_the_pipeline_does(family: str, make: Make) -> None:
    pipe = load(make(family))
    size, options = Size(16, 16), {"max_sequence_length": 16} if family == "pixart" else {}
    noise = torch.randn(1, *pipe.family.latent_shape(pipe, size), generator=torch.Generator().manual_seed(0))
    predict = predictor(pipe, pipe.family, [tiny.PROMPT], size, 3.0, **options)
    expected = latents(pipe, family, latents=noise, guidance_scale=3.0)
    assert (
        run_error(predict, pipe.scheduler.schedule, pipe.recipe.trained_timesteps[4], noise, expected.double()) < 1e-8
    )


def test_the_search_on_a_student_compares_with_what_it_runs_on_otherwise(make: Make) -> None:
    pipe, expected_calls = load(make("sd15")), []
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    options: dict[str, Any] = {"levels": 12, "guidance_scale": 1.0, "expect": expected_calls.append}
    grids_by_steps = search(pipe, pipe.family, pipe.recipe, [tiny.PROMPT] * 3, [2, 3], **options)
    assert expected_calls == [sum(calls)]
    assert {k: list(grids) for k, grids in grids_by_steps.items()} == {
        2: ["found", "trained", "uniform"],
        3: ["found", "re-spaced", "uniform"],
    }
    for k, grids in grids_by_steps.items():
        assert grids["found"].predicted == min(grid.predicted for grid in grids.values())
        assert all(len(grid.timesteps) == k and grid.timesteps[0] == 900 for grid in grids.values())


# ---------------------------------------------------------------------- the command


def test_the_command_writes_the_grids_that_are_better_and_keeps_the_rest(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, out = make("sd15"), tmp_path / "searched.safetensors"
    (tmp_path / "prompts.txt").write_text(f"{tiny.PROMPT}\na box\n")
    arguments = ["timesteps", "--student", str(student), "--prompts", str(tmp_path / "prompts.txt"), "--levels", "12"]
    assert main([*arguments, "--steps", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    before, after = read_student(student).recipe, read_student(out).recipe
    tensors, copied = load_file(student), load_file(out)
    assert {k: after.trained_timesteps[k] for k in before.trained_timesteps} == before.trained_timesteps
    assert after.notes == before.notes | {"timesteps of K=3": "searched, not trained"}
    assert ", ".join(f"{t:.4g}" for t in after.trained_timesteps[3]) in printed
    assert after.default_steps == before.default_steps
    assert all(torch.equal(tensors[key], copied[key]) for key in tensors)
    assert load(out).recipe == after
    content = out.read_bytes()
    assert "--force" in refused([*arguments, "--steps", "3", "--out", str(out)], capsys)
    assert out.read_bytes() == content


def test_a_teacher_is_a_base_by_itself(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = read_student(make("sd15")).recipe.base_model
    (tmp_path / "prompts.txt").write_text(tiny.PROMPT)
    arguments = ["timesteps", "--model", base, "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*arguments, "--steps", "2", "--levels", "6"]) == 0
    printed = capsys.readouterr().out
    assert "guidance 3" in printed
    assert "trained |" not in printed
    assert "TDMScheduler.from_config(pipe.scheduler.config, trained_timesteps={2: [" in printed
    for wrong, message in (
        (["--out", str(tmp_path / "x.safetensors")], "name one with --student"),
        (["--steps", "2,x"], "whole numbers"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "9", "--levels", "8"], "no less than"),
    ):
        assert message in refused([*arguments, *wrong], capsys)
    assert "--prompts is missing" in refused(["timesteps", "--model", base], capsys)
