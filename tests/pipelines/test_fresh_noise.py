"""Students that take fresh noise at each step: the right noise, from the call's generator, in every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tdm import TDMScheduler
from tdm.cli import main
from tdm.errors import TDMError
from tdm.pipelines.families import Size
from tdm.pipelines.students.file import read_header, read_student
from tdm.pipelines.students.recipe import HEADER_KEY
from tdm.tests import tiny
from tdm.tests.pipelines.students import GRIDS, Make, error, latents, load, plain, predictor, short_call
from tdm.tests.pipelines.test_image_to_image import picture, redrawn
from tdm.training.trajectory import sample, with_fresh_noise
from torch import Tensor

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GIVES_GENERATOR = ("sd15", "sdxl", "pixart", "cogvideox", "sana")  # stock pipelines that hand it to the scheduler


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fresh(make: Make) -> Callable[..., Any]:
    """A pipeline with a student that was trained with fresh noise."""
    return lambda family, **recipe: load(make(family, "fresh.safetensors", stochastic_sampling=True, **recipe))


def by_hand(pipe: Any, family: str, noise: Tensor, generator: torch.Generator, grid: list[float]) -> Tensor:
    """The trainer's own sampler, with the noise of each step but the last behind that of the first latents."""
    predict, cond = predictor(pipe, family)
    each = torch.stack([torch.randn(noise.shape, generator=generator) for _ in grid], 1)
    with torch.no_grad():
        return sample(with_fresh_noise(predict, each, pipe.recipe.eta), pipe.scheduler.schedule, grid, noise, cond)


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_seed_is_one_picture_and_its_noise_is_that_of_training(
    family: str, eta: float, fresh: Callable[..., Any]
) -> None:
    pipe = fresh(family, eta=eta)
    actual = short_call(pipe, family)
    assert torch.equal(short_call(pipe, family), actual)
    call = tiny.call_kwargs(family)
    size = Size(call["height"], call["width"], call.get("num_frames"))
    generator = seeded()
    noise = torch.randn(1, *pipe.family.latent_shape(pipe, size), generator=generator)
    expected = pipe.family.pack(by_hand(pipe, family, noise, generator, GRIDS[4]))
    assert error(actual, expected) < 1e-5
    pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, stochastic_sampling=False)
    assert error(short_call(pipe, family), actual) > 1e-3


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "zimage"])
def test_a_batch_with_a_generator_each_is_the_single_calls(family: str, fresh: Callable[..., Any]) -> None:
    pipe = fresh(family)
    batch = short_call(pipe, family, generator=[seeded(1), seeded(2)], num_images_per_prompt=2)
    for one, seed in zip(batch, (1, 2), strict=True):
        assert error(one, short_call(pipe, family, generator=seeded(seed))[0]) < 1e-5


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux", "zimage"])
def test_a_picture_of_one_generator_is_the_same_alone_and_in_any_batch(family: str, fresh: Callable[..., Any]) -> None:
    pipe = fresh(family)
    alone = short_call(pipe, family, generator=seeded(3))
    two, three = (short_call(pipe, family, generator=seeded(3), num_images_per_prompt=n) for n in (2, 3))
    assert error(two[:1], alone) < 1e-5
    assert error(three[:2], two) < 1e-5
    assert error(three[2], three[1]) > 1e-2
    assert error(three[1], three[0]) > 1e-2


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_image_to_image_draws_the_same_alone_and_in_a_batch(family: str, fresh: Callable[..., Any]) -> None:
    pipe = fresh(family)
    alone = redrawn(pipe, family, strength=0.75, generator=seeded(3))
    batch = redrawn(pipe, family, strength=0.75, generator=seeded(3), num_images_per_prompt=2)
    assert error(batch[:1], alone) < 1e-5
    assert error(batch[1], batch[0]) > 1e-2


@pytest.mark.parametrize("family", ["pixart", "sd3", "qwenimage"])
def test_streams_half_precision_and_the_first_step_by_the_base(family: str, fresh: Callable[..., Any]) -> None:
    pipe = fresh(family)
    arguments = {k: v for k, v in tiny.call_kwargs(family).items() if k != "generator"}
    *steps, last = pipe.stream(**arguments, generator=seeded(5))
    assert len(steps) == 4
    assert torch.equal(last.output[0], pipe(**arguments, generator=seeded(5))[0])
    with pipe.base_first():
        first = pipe(**arguments, generator=seeded(5))[0]
    assert error(first, last.output[0]) > 1e-4
    assert pipe.scheduler.noise_source is None  # nothing of a call stays behind
    pipe.to(torch.bfloat16)
    assert pipe(**arguments, generator=seeded(5))[0].isfinite().all()


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_image_to_image_takes_the_noise_of_the_steps_behind_that_of_the_start(
    family: str, fresh: Callable[..., Any]
) -> None:
    pipe = fresh(family)
    side = tiny.call_kwargs(family)["height"]
    actual = redrawn(pipe, family, strength=0.75, generator=seeded(3))
    generator, grid = seeded(3), GRIDS[4][1:]
    pixels = pipe.image_processor.preprocess(picture(side, side))
    alpha, sigma = pipe.scheduler.schedule.alpha_sigma(torch.tensor(grid[0], dtype=torch.float64))
    with torch.no_grad():
        x0 = pipe.family.encode_pictures(pipe, pixels)
        start = float(alpha) * x0 + float(sigma) * torch.randn(x0.shape, generator=generator)
    assert error(actual, pipe.family.pack(by_hand(pipe, family, start, generator, grid))) < 1e-5


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_merged_folder_draws_the_same_and_a_stock_pipeline_does_or_says_that_it_cannot(
    family: str, fresh: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = fresh(family)
    pipe.save_merged(tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.recipe.stochastic_sampling
    assert error(short_call(merged, family), short_call(pipe, family)) < 1e-5
    stock = plain(tmp_path / "merged")
    guidance = pipe.family.guidance(1.0)
    if family in GIVES_GENERATOR:
        assert error(latents(stock, family, **guidance), latents(pipe, family, **guidance)) < 1e-5
    else:
        with pytest.raises(TDMError, match="load the student with TDMPipeline"):
            latents(stock, family, **guidance)


def test_the_file_says_it_and_only_where_it_is_so(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    file = make("sd3", stochastic_sampling=True)
    recipe = read_student(file).recipe
    assert recipe is not None
    assert recipe.stochastic_sampling
    assert main(["info", str(file)]) == 0
    assert "fresh at each step" in capsys.readouterr().out
    assert "stochastic_sampling" not in read_header(make("sd3", "own.safetensors"))[HEADER_KEY]
    assert "eta" not in json.loads(read_header(file)[HEADER_KEY])
    mixed = make("sd3", "mixed.safetensors", stochastic_sampling=True, eta=0.25)
    assert json.loads(read_header(mixed)[HEADER_KEY])["eta"] == 0.25
    assert main(["info", str(mixed)]) == 0
    assert "eta 0.25: the student's own and fresh noise mixed at each step" in capsys.readouterr().out
    (file.parent / "prompts.txt").write_text("a red cube\n")
    prompts = ["--prompts", str(file.parent / "prompts.txt")]
    assert main(["timesteps", "--student", str(file), "--steps", "2", *prompts]) == 2
    assert "timesteps are searched along one path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"solver_order": 2}, "solver_order must be 1: order 2 goes on along"),
        ({"stochastic_sampling": "yes"}, "stochastic_sampling must be true or false"),
        ({"sampler": {"scheduler": "LCMScheduler"}}, "stochastic_sampling must be absent"),
        ({"eta": 0}, "eta must be above 0 and at most 1"),
        ({"eta": 1.5}, "eta must be above 0 and at most 1"),
        ({"stochastic_sampling": False, "eta": 0.5}, "eta must be absent without stochastic_sampling"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(recipe: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(TDMError, match=message):
        make("sd15", **{"stochastic_sampling": True, **recipe})


# ---------------------------------------------------------------------- the scheduler alone


@pytest.mark.parametrize(
    "options", [{**SD, "prediction_type": "epsilon"}, {"prediction_type": "flow_prediction"}], ids=["vp", "flow"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_state_is_the_forward_process_of_x0(options: dict[str, Any], dtype: torch.dtype) -> None:
    grid = [999, 749, 499, 249]
    scheduler = TDMScheduler(**options, trained_timesteps=grid, stochastic_sampling=True)
    scheduler.set_timesteps(4)
    x, generator, twin = torch.randn(2, 4, 8, 8, generator=seeded(1), dtype=dtype), seeded(7), seeded(7)
    for i, t in enumerate(scheduler.timesteps):
        out = torch.randn(x.shape, generator=seeded(20 + i), dtype=dtype)
        x, x0 = scheduler.step(out, t, x, return_dict=False, generator=generator)
        if i == 3:
            assert torch.equal(x, x0)
            break
        alpha, sigma = scheduler.schedule.alpha_sigma(torch.tensor(float(grid[i + 1])))
        expected = alpha * x0.double() + sigma * torch.randn(x.shape, generator=twin).double()
        assert x.dtype == dtype
        assert error(x, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert torch.equal(generator.get_state(), twin.get_state())  # the last step draws nothing


def test_it_is_diffusers_lcm_on_the_same_timesteps() -> None:
    grid, ends = [999, 749, 499, 249], []
    ours = TDMScheduler(**SD, trained_timesteps=grid, stochastic_sampling=True)
    theirs = diffusers.LCMScheduler(**SD, original_inference_steps=1000, timestep_scaling=1e4)  # x0 alone
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=grid)
        x, generator = torch.randn(2, 4, 8, 8, generator=seeded(1)), seeded(7)
        for i, t in enumerate(scheduler.timesteps):
            out = torch.randn(x.shape, generator=seeded(20 + i))
            x = scheduler.step(out, t, x, generator=generator).prev_sample
        ends.append(x)
    assert error(*ends) < 1e-5


def test_a_scheduler_without_a_generator_is_refused_and_none_is_torchs_own() -> None:
    scheduler = TDMScheduler(prediction_type="flow_prediction", trained_timesteps=[900, 500], stochastic_sampling=True)
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(TDMError, match="gives its scheduler no generator"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.set_timesteps(2)
    torch.manual_seed(3)
    actual = scheduler.step(x, scheduler.timesteps[0], x, generator=None).prev_sample
    torch.manual_seed(3)
    assert error(actual, 0.5 * torch.randn(x.shape)) < 1e-6


def test_settings_that_contradict_each_other_are_refused_and_a_base_does_not_decide() -> None:
    with pytest.raises(TDMError, match="stochastic_sampling goes with solver_order 1"):
        TDMScheduler(stochastic_sampling=True, solver_order=2)
    stock = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert not TDMScheduler.from_config(stock.config).config.stochastic_sampling
    assert TDMScheduler.from_config(stock.config, stochastic_sampling=True).config.stochastic_sampling
    with pytest.raises(TDMError, match="eta must be above 0 and at most 1, got 0"):
        TDMScheduler(stochastic_sampling=True, eta=0)
