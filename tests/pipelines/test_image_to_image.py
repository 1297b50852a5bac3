"""Image to image on the trained grid: the right timesteps, the right noise, and the steps that the student knows."""

from __future__ import annotations

import re
from inspect import signature
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DDIMScheduler
from PIL import Image
from tdm import TDMPipeline, TDMScheduler
from tdm.errors import TDMError
from tdm.pipelines.families import Size
from tdm.pipelines.schedule import NoiseSchedule, first_step
from tdm.tests import tiny
from tdm.tests.pipelines.students import GRIDS, Make, load, predictor
from tdm.training.trajectory import sample
from torch import Tensor

PICTURES = tuple(name for name in tiny.FAMILIES if name not in ("cogvideox", "wan"))


def picture(width: int = 16, height: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def arguments(name: str) -> dict[str, Any]:
    known = {"num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "width", "prompt"}
    known |= {"use_resolution_binning", "clean_caption"}
    return {key: value for key, value in tiny.call_kwargs(name).items() if key not in known}


def redrawn(pipe: TDMPipeline, name: str, **call: Any) -> Tensor:
    side = tiny.call_kwargs(name)["height"]
    return pipe.image_to_image(tiny.PROMPT, **{"image": picture(side, side), **arguments(name), **call})[0]


def by_hand(pipe: Any, name: str, grid: list[float]) -> Tensor:
    """Compute it from the definition: alpha E(picture) + sigma noise, then the trainer's steps on the rest."""
    side = tiny.call_kwargs(name)["height"]
    family, size, schedule = pipe.family, Size(side, side), pipe.scheduler.schedule
    predict, cond = predictor(pipe, name)
    pixels = pipe.image_processor.preprocess(picture(side, side))
    assert float(pixels.min()) < -0.9
    alpha, sigma = schedule.alpha_sigma(torch.tensor(grid[0], dtype=torch.float64))
    noise = torch.randn(1, *family.latent_shape(pipe, size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        start = float(alpha) * family.encode_pictures(pipe, pixels) + float(sigma) * noise
        return family.pack(sample(predict, schedule, grid, start, cond))


@pytest.mark.parametrize("strength", [0.45, 0.75])
@pytest.mark.parametrize("name", PICTURES)
def test_it_starts_at_the_noise_of_the_nearest_timestep_and_follows_the_rest(
    name: str, strength: float, make: Make
) -> None:
    pipe = load(make(name))
    left = {0.45: [500.0, 300.0], 0.75: [700.0, 500.0, 300.0]}[strength]
    before = pipe.scheduler
    expected = by_hand(pipe, name, left)
    out = redrawn(pipe, name, strength=strength)
    assert float((out - expected).norm() / expected.norm()) < 1e-5
    assert pipe.scheduler is before


def test_the_noisier_of_two_timesteps_that_are_as_near_is_taken() -> None:
    flow = NoiseSchedule.flow(1000)
    grid = [900.0, 700.0, 500.0]
    picks = {0.9: 0, 0.81: 0, 0.8: 0, 0.79: 1, 0.6: 1, 0.55: 2, 0.01: 2, 1.0: 0}
    assert {strength: first_step(grid, strength, flow) for strength in picks} == picks


def test_sizes_batches_and_step_counts(make: Make) -> None:
    pipe = load(make("sd15"))
    out = redrawn(pipe, "sd15", image=picture(width=27, height=23), strength=0.9)
    assert out.shape[-2:] == (8, 12)  # latents of 16 x 24
    out = redrawn(pipe, "sd15", image=picture(), height=24, width=32)
    assert out.shape[-2:] == (12, 16)
    one = redrawn(pipe, "sd15", num_images_per_prompt=2)
    assert one.shape[0] == 2
    assert not torch.equal(one[0], one[1])
    two = pipe.image_to_image(["a cat", "a dog"], [picture(), picture()], 0.5, **arguments("sd15"))[0]
    assert two.shape[0] == 2
    calls = []
    with pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1)):
        redrawn(pipe, "sd15", num_inference_steps=2, strength=0.5)  # the grid of 2: 900, 450
    assert len(calls) == 1
    assert pipe.scheduler.trained_timesteps == GRIDS


def test_a_second_order_student_keeps_its_solver_and_a_half_precision_one_its_dtype(make: Make) -> None:
    second = load(make("sd3", "second.safetensors", solver_order=2))
    first = load(make("sd3", "first.safetensors", solver_order=1))
    assert not torch.equal(redrawn(second, "sd3", strength=0.75), redrawn(first, "sd3", strength=0.75))
    for name in ("sd15", "zimage", "flux"):
        half = load(make(name), dtype=torch.bfloat16)
        assert redrawn(half, name, strength=0.75).isfinite().all()


@pytest.mark.parametrize("strength", [0, 1.01, -0.5, float("nan")])
def test_a_strength_that_means_nothing_is_refused(strength: float, make: Make) -> None:
    with pytest.raises(TDMError, match="strength must be above 0 and at most 1"):
        redrawn(load(make("sd15")), "sd15", strength=strength)


def test_what_cannot_be_redrawn_is_refused(make: Make) -> None:
    pipe = load(make("sd15"))
    with pytest.raises(TDMError, match="3 pictures do not go into 2 samples"):
        pipe.image_to_image(["a", "b"], [picture()] * 3, **arguments("sd15"))
    with pytest.raises(TDMError, match="multiples of 8 pixels"):
        redrawn(pipe, "sd15", height=18)
    with pytest.raises(TDMError, match="AutoPipelineForImage2Image"), pipe.teacher():
        redrawn(pipe, "sd15")
    with pytest.raises(TDMError, match="makes videos"):
        redrawn(load(make("wan")), "wan")


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_pipeline_that_is_named_instead_makes_the_students_calls(name: str, guidance: float, make: Make) -> None:
    """The arguments in the message are all that diffusers' own pipeline needs, and it takes each of them."""
    pipe = load(make(name, guidance_scale=guidance))
    pipe.scheduler = pipe.teacher_scheduler  # some scheduler that is none of ours
    if name == "sd15":  # its own makes a fifth call
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(TDMError, match=f"has a {type(pipe.scheduler).__name__}; ") as refused:
        redrawn(pipe, name)
    if name in ("pixart", "sana", "krea2"):
        assert str(refused.value).endswith(f"no image-to-image pipeline for {pipe.family.pipeline} either")
        with pytest.raises(ValueError, match="can't find a pipeline"):
            AutoPipelineForImage2Image.from_pipe(pipe)
        return
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    (given,) = re.findall(r"call it with (.*), which", str(refused.value))
    options = {key: float(value) for key, value in (option.split("=") for option in given.split(", "))}
    options["num_inference_steps"] = int(options["num_inference_steps"])
    call = {key: value for key, value in arguments(name).items() if key in signature(other.__call__).parameters}
    call |= pipe.family.negative_prompt({**options, "prompt": tiny.PROMPT})
    samples: list[int] = []

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args or (None,))[0] if args else kwargs["hidden_states"]
        samples.append(len(x))

    with pipe.denoiser.register_forward_pre_hook(count, with_kwargs=True):
        other(tiny.PROMPT, image=picture(32, 32), strength=1.0, **call, **options)
    doubled = guidance > 1 and name != "flux"  # Flux is told its guidance
    assert sum(samples) == (8 if doubled else 4)


def test_a_call_that_fails_gives_the_sampler_back(make: Make) -> None:
    pipe = load(make("sd15"))
    before = pipe.scheduler

    def fail(*_: Any) -> Any:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        redrawn(pipe, "sd15", callback_on_step_end=fail)
    assert pipe.scheduler is before
    assert isinstance(before, TDMScheduler)
