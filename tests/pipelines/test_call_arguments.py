"""Arguments of a call that the student was not made for: `sigmas`, guidance and negative prompts."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from PIL import Image
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.tests import tiny
from tdm.tests.pipelines.students import Make, load, short_call

PICTURES = tuple(name for name in tiny.FAMILIES if name not in ("cogvideox", "wan"))


def takes(pipe: TDMPipeline, argument: str) -> bool:
    return argument in inspect.signature(type(pipe).__call__).parameters


def timesteps(pipe: TDMPipeline, family: str, *, streamed: bool = False, **call: Any) -> list[float]:
    """Return the timesteps at which a call runs the network."""
    if streamed:
        known = ("num_inference_steps", "guidance_scale", "true_cfg_scale")
        arguments = {k: v for k, v in tiny.call_kwargs(family).items() if k not in known}
        return [step.timestep for step in pipe.stream(**{**arguments, **call}) if step.output is None]
    recorded: list[float] = []

    def note(_: Any, __: int, timestep: Any, ___: Any) -> dict[str, Any]:
        recorded.append(float(timestep))
        return {}

    short_call(pipe, family, callback_on_step_end=note, **call)
    return recorded


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sigmas_are_followed_wherever_a_call_takes_them(family: str, streamed: bool, make: Make) -> None:
    pipe = load(make(family))
    if not takes(pipe, "sigmas"):
        with pytest.raises(TypeError, match="sigmas"):
            pipe("a", sigmas=[1.0, 0.5])
        return
    flow = pipe.scheduler.schedule.kind == "flow"
    for sigmas in ([1.0, 0.8, 0.5], [1.0, 0.75, 0.5, 0.25]):  # the second is what pipelines pass for "4 steps"
        levels = sigmas if flow else [10 * sigma for sigma in sigmas]
        grid = timesteps(pipe, family, streamed=streamed, sigmas=levels)
        assert len(grid) == len(sigmas)
        assert grid == sorted(grid, reverse=True)
        if flow:
            shift = 1000 * pipe.scheduler.sigmas[: len(sigmas)]
            assert grid == pytest.approx(shift.tolist(), abs=0.1)
            assert grid[0] == pytest.approx(1000)
        assert grid != pytest.approx([900, 700, 500, 300], abs=20)
    assert timesteps(pipe, family, streamed=streamed) == pytest.approx([900, 700, 500, 300])  # the next call


@pytest.mark.parametrize("family", PICTURES)
def test_image_to_image_refuses_a_grid_of_its_own(family: str, make: Make) -> None:
    pipe = load(make(family))
    for argument in ("sigmas", "timesteps"):
        with pytest.raises(TDMError, match=f"takes no {argument}="):
            pipe.image_to_image("a", Image.new("RGB", (32, 32)), **{argument: [1.0, 0.5]})


def guidance_warnings(pipe: TDMPipeline, family: str, **call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        short_call(pipe, family, **call)
    return [str(w.message) for w in caught if "this student was made for" in str(w.message)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_guidance_that_the_student_was_not_made_for_is_warned_of_once_a_value(family: str, make: Make) -> None:
    pipe = load(make(family))
    argument = pipe.family.guidance_argument
    right = pipe.family.guidance(1.0)[argument]
    assert guidance_warnings(pipe, family) == []
    assert guidance_warnings(pipe, family, **{argument: right}) == []
    for scale in (7.5, 4.0):
        (text,) = guidance_warnings(pipe, family, **{argument: scale})
        assert f"made for {argument}={right:g}" in text
        assert f"{argument}={scale:g}" in text
        assert guidance_warnings(pipe, family, **{argument: scale}) == []
    if takes(pipe, "negative_prompt"):
        (text,) = guidance_warnings(pipe, family, negative_prompt="blurry")
        assert "negative_prompt has no effect" in text
        assert guidance_warnings(pipe, family, negative_prompt="blurry") == []
    pipe.load_student(make(family, "other.safetensors", seed=2))
    assert len(guidance_warnings(pipe, family, **{argument: 7.5})) == 1
    with pipe.teacher():
        assert guidance_warnings(pipe, family, num_inference_steps=2, **{argument: 3.0}) == []


def test_a_second_guidance_argument_is_warned_of_too_and_image_to_image_as_a_call(make: Make) -> None:
    pipe = load(make("flux"))
    (text,) = guidance_warnings(pipe, "flux", true_cfg_scale=4.0, negative_prompt="blurry")
    assert "true_cfg_scale=1, which is no guidance" in text
    (text,) = guidance_warnings(load(make("qwenimage")), "qwenimage", guidance_scale=7.5)
    assert "guidance_scale=7.5" in text
    pipe = load(make("sd15"))
    with pytest.warns(UserWarning, match="guidance_scale=7.5 spoils"):
        pipe.image_to_image("a", Image.new("RGB", (16, 16)), guidance_scale=7.5, output_type="latent")
    assert guidance_warnings(pipe, "sd15", guidance_scale=0.0) == []  # no guidance either
    guided = load(make("sd15", "guided.safetensors", guidance_scale=3.0))
    assert guidance_warnings(guided, "sd15", negative_prompt="blurry") == []
    (text,) = guidance_warnings(guided, "sd15", guidance_scale=1.0)
    assert "made for guidance_scale=3;" in text


def test_the_sampler_of_another_method_warns_as_well(make: Make) -> None:
    sampler = {"scheduler": "LCMScheduler", "default_steps": 4}
    pipe = load(make("sd15", sampler=sampler, trained_timesteps={4: [999, 759, 499, 259]}))
    assert len(guidance_warnings(pipe, "sd15", guidance_scale=7.5)) == 1
    with pytest.raises(TDMError, match="num_inference_steps=4, guidance_scale=1") as refusal:
        pipe.image_to_image("a", Image.new("RGB", (16, 16)))
    assert "\n" not in str(refusal.value)
    assert torch.is_tensor(short_call(pipe, "sd15"))
