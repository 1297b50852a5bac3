"""`pipe.stream(...)`: the same call, watched step by step and stopped at will."""

from __future__ import annotations

import contextvars
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from tdm import TDMPipeline
from tdm.pipelines.stream import Step
from tdm.tests import tiny
from tdm.tests.pipelines.students import GRIDS, Make, latents, load, state

Loaded = Callable[[str], TDMPipeline]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Any:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "tdm-stream"] == []


def call(family: str, **kwargs: Any) -> dict[str, Any]:
    return {**tiny.call_kwargs(family), "output_type": "pt", **kwargs}


def counter(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


# ---------------------------------------------------------------------- the same call


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_output_is_that_of_the_call_bit_for_bit(family: str, loaded: Loaded) -> None:
    pipe = loaded(family)
    two = {"prompt": [tiny.PROMPT, "a box"], "negative_prompt": ["blurry", "grey"]}
    guided = {"true_cfg_scale": 3.0} if family in ("flux", "qwenimage") else {"guidance_scale": 3.0}
    for arguments in ({}, two | guided):
        *steps, last = pipe.stream(**call(family, **arguments))
        assert [step.index for step in steps] == [1, 2, 3, 4]
        assert [step.timestep for step in steps] == GRIDS[4]
        assert {step.total for step in steps} == {4}
        assert all(step.output is None for step in steps)
        assert (last.index, last.total, last.timestep) == (4, 4, 300.0)
        assert type(last.output) is type(pipe(**call(family, **arguments)))
        assert torch.equal(last.output[0], pipe(**call(family, **arguments))[0])
    with pipe.teacher():
        *steps, last = pipe.stream(**call(family))
        assert [step.index for step in steps] == list(range(1, steps[0].total + 1))
        assert torch.equal(last.output[0], pipe(**call(family))[0])


def test_what_is_left_out_means_the_students_defaults(make: Make) -> None:
    pipe = load(make("sd15"))
    seed = torch.Generator().manual_seed
    *_, last = pipe.stream(tiny.PROMPT, generator=seed(0), output_type="pt", return_dict=False)
    assert torch.equal(last.output[0], pipe(tiny.PROMPT, generator=seed(0), output_type="pt").images)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_holds_the_predicted_clean_sample(family: str, loaded: Loaded) -> None:
    pipe = loaded(family)
    first = next(pipe.stream(**call(family)))
    assert first.timestep == GRIDS[1][0]  # where a run of one step jumps to the clean sample
    one_step = latents(pipe, family, num_inference_steps=1)
    assert torch.equal(first.latents, one_step)
    assert not torch.allclose(one_step, latents(pipe, family), atol=1e-3)


def test_under_the_teachers_own_scheduler_a_step_holds_the_noisy_sample(loaded: Loaded) -> None:
    pipe, recorded = loaded("sd3"), []

    def on_step_end(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        recorded.append(tensors["latents"])
        return tensors

    with pipe.teacher():
        *steps, _ = pipe.stream(**call("sd3", callback_on_step_end=on_step_end))
    assert len(recorded) == 4
    assert all(torch.equal(step.latents, sample) for step, sample in zip(steps, recorded, strict=True))


# ---------------------------------------------------------------------- previews


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_last_preview_is_the_small_picture_itself(family: str, make: Make) -> None:
    pipe = load(make(family))
    if family in ("wan", "qwenimage"):  # the tiny VAEs have trivial statistics
        pipe.vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.5, 2.0, 0.8])
    size = {"height": 64, "width": 32} if family == "sana" else {"height": 32, "width": 16}
    two = call(family, prompt=[tiny.PROMPT, "a box"], output_type="pil", **size)
    *_, last = pipe.stream(**two)
    expected = last.output[0]
    if family == "wan":
        expected = [frames[0] for frames in expected]
    if family == "cogvideox":  # its norms see all frames: alone the first one is another picture
        first = latents(pipe, family, prompt=two["prompt"], **size)[:, :1]
        with torch.no_grad():
            videos = pipe.video_processor.postprocess_video(pipe.decode_latents(first), output_type="pil")
        expected = [frames[0] for frames in videos]
    assert len(last.preview) == 2
    for preview, picture in zip(last.preview, expected, strict=True):
        assert preview.size == (size["width"], size["height"])
        values, expected_values = (np.asarray(image, dtype=int) for image in (preview, picture))
        assert abs(values - expected_values).max() <= 1  # z / s is not (1 / s) * z to the last bit
        assert values.std() > 5  # a picture, not one colour
    assert last.preview[0].tobytes() != last.preview[1].tobytes()


@pytest.mark.parametrize(("family", "side", "factor"), [("sd15", 128, 2), ("flux", 128, 2), ("wan", 512, 8)])
def test_large_latents_are_shrunk_before_they_are_decoded(family: str, side: int, factor: int, loaded: Loaded) -> None:
    step = next(loaded(family).stream(**call(family, height=side, width=side // 2)))
    assert [picture.size for picture in step.preview] == [(16 * factor, 32 * factor)]


def test_a_preview_costs_nothing_until_somebody_looks(make: Make) -> None:
    pipe = load(make("sd15"))
    decoded = counter(pipe.vae.decoder)
    *steps, _ = pipe.stream(**call("sd15", output_type="latent"))
    assert decoded == []
    assert steps[1].preview is steps[1].preview
    assert len(decoded) == 1
    assert steps[1].preview[0].tobytes() != steps[3].preview[0].tobytes()


def test_previews_in_half_precision_leave_the_vae_as_it_was(make: Make) -> None:
    pipe = load(make("sdxl"), dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    *_, last = pipe.stream(**call("sdxl", output_type="pil"))
    assert last.preview[0].tobytes() == last.output.images[0].tobytes()
    after = pipe.vae.state_dict()
    assert all(after[name].dtype == torch.float16 and torch.equal(after[name], before[name]) for name in before)


# ---------------------------------------------------------------------- stopping


def leave_the_loop(pipe: TDMPipeline) -> None:
    for step in pipe.stream(**call("sd15")):
        if step.index == 2:
            break


def close(pipe: TDMPipeline) -> None:
    run = pipe.stream(**call("sd15"))
    next(run), next(run)
    run.close()


def forget(pipe: TDMPipeline) -> None:
    run = pipe.stream(**call("sd15"))
    next(run), next(run)
    cycle = [run]
    cycle.append(cycle)  # type: ignore[arg-type]
    del run, cycle
    gc.collect()


def fail_in_the_loop(pipe: TDMPipeline) -> None:
    def body(step: Step) -> None:
        if step.index == 2:
            raise ArithmeticError

    def loop() -> None:
        for step in pipe.stream(**call("sd15")):
            body(step)

    with pytest.raises(ArithmeticError):
        loop()


@pytest.mark.parametrize("stop", [leave_the_loop, close, forget, fail_in_the_loop])
def test_a_stopped_run_computes_no_further_and_leaves_no_trace(stop: Callable[[TDMPipeline], None], make: Make) -> None:
    pipe = load(make("sd15"))
    expected, before = latents(pipe, "sd15"), state(pipe)
    calls = counter(pipe.unet)
    stop(pipe)
    assert len(calls) == 2
    assert "tdm-stream" not in {thread.name for thread in threading.enumerate()}
    assert state(pipe) == before
    assert torch.equal(latents(pipe, "sd15"), expected)


def test_no_step_runs_before_it_is_asked_for(make: Make) -> None:
    pipe = load(make("sd15"))
    calls = counter(pipe.unet)
    run = pipe.stream(**call("sd15"))
    assert len(calls) == 0
    for expected in (1, 2, 3, 4, 4):
        next(run)
        assert len(calls) == expected
    assert next(run, None) is None


@pytest.mark.parametrize("family", ["sd15", "pixart"])
def test_an_error_reaches_the_consumer_as_itself(family: str, loaded: Loaded) -> None:
    pipe = loaded(family)
    error = KeyError("mine")

    def fail(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i == 1:
            raise error
        return {}

    run = pipe.stream(**call(family, callback_on_step_end=fail))
    assert next(run).index == 1
    with pytest.raises(KeyError) as caught:
        next(run)
    assert caught.value is error
    with pytest.raises(ValueError, match="divisible by 8"):
        next(pipe.stream(**call(family, height=17)))
    with pytest.raises(TypeError, match="no_such_argument"):
        next(loaded("sd3").stream(no_such_argument=1))
    assert len(list(pipe.stream(**call(family)))) == 5


# ---------------------------------------------------------------------- callbacks, threads


@pytest.mark.parametrize("family", ["sd15", "pixart", "flux"])
def test_the_users_callback_runs_too_and_may_change_the_latents(family: str, loaded: Loaded) -> None:
    pipe, recorded = loaded(family), []

    def halve(owner: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        recorded.append((owner is pipe, i, float(t), list(tensors)))
        return {"latents": tensors["latents"] / 2}

    *_, last = pipe.stream(**call(family, callback_on_step_end=halve))
    assert recorded == [(True, i, t, ["latents"]) for i, t in enumerate(GRIDS[4])]
    assert torch.equal(last.output[0], pipe(**call(family, callback_on_step_end=halve))[0])
    assert not torch.equal(last.output[0], pipe(**call(family))[0])


def test_the_users_callback_gets_the_tensors_that_it_asks_for(loaded: Loaded) -> None:
    recorded = []

    class Look(PipelineCallback):
        tensor_inputs = ["prompt_embeds"]  # noqa: RUF012

        def callback_fn(self, _pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            recorded.append(list(tensors))
            return tensors

    list(loaded("sd15").stream(**call("sd15", callback_on_step_end=Look())))
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    list(loaded("sd15").stream(**call("sd15", callback_on_step_end=Look().callback_fn, **names)))
    assert recorded == [["prompt_embeds"]] * 8


def test_it_may_be_resumed_from_any_thread(loaded: Loaded) -> None:
    pipe = loaded("sd15")
    run, steps = pipe.stream(**call("sd15")), []
    for _ in range(5):
        with ThreadPoolExecutor(1) as other:
            steps.append(other.submit(next, run).result())
    assert next(run, None) is None
    assert torch.equal(steps[-1].output[0], pipe(**call("sd15"))[0])


def test_the_run_has_the_settings_of_the_consumers_thread(loaded: Loaded) -> None:
    pipe, recorded = loaded("sd15"), []
    variable = contextvars.ContextVar("variable", default="none")

    def on_step_end(_pipe: Any, _i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        recorded.append((variable.get(), torch.get_default_device(), tensors["latents"].is_inference()))
        return tensors

    variable.set("mine")
    with torch.inference_mode(), torch.device("cpu:0"):
        list(pipe.stream(**call("sd15", callback_on_step_end=on_step_end)))
    assert recorded == [("mine", torch.device("cpu:0"), True)] * 4

    with torch.autocast("cpu", torch.bfloat16):
        *_, last = pipe.stream(**call("sd15"))
        assert torch.equal(last.output[0], pipe(**call("sd15"))[0])
    assert not torch.equal(last.output[0], pipe(**call("sd15"))[0])
