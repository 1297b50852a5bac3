"""`pipe.base_first()`: the first step is the base's, the rest the student's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.callbacks import PipelineCallback
from tdm import TDMPipeline, TDMScheduler
from tdm.errors import TDMError
from tdm.pipelines.image_to_image import _on_grid
from tdm.pipelines.loras.adapters import is_on, tuner_layers
from tdm.tests import tiny
from tdm.tests.pipelines.students import GRIDS, Make, latents, load, lora_for
from torch import Tensor

Loaded = Callable[[str], TDMPipeline]


def denoiser(pipe: TDMPipeline) -> Any:
    return getattr(pipe, pipe.family.denoiser)


def adapters(pipe: TDMPipeline) -> list[Any]:
    """Return all that peft keeps about the adapters, layer by layer."""
    layers = tuner_layers(denoiser(pipe))
    grads = [[p.requires_grad for p in layer.parameters()] for layer in layers]
    return [(list(layer.active_adapters), layer.disable_adapters, dict(layer.scaling)) for layer in layers] + grads


def watch(pipe: TDMPipeline) -> list[tuple[bool, ...]]:
    """Record for each network call whether (student, style) take part in it."""
    recorded: list[tuple[bool, ...]] = []
    network = pipe.denoiser
    network.register_forward_pre_hook(
        lambda *_: recorded.append((is_on(network, "student"), is_on(network, "style"))),
    )
    return recorded


def by_hand(pipe: TDMPipeline, family: str, **kwargs: Any) -> Tensor:
    """The base's first step, then a run of the student from its result on the timesteps that are left."""
    caught: list[Tensor] = []

    def catch(_: Any, i: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if i == 0:
            caught.append(tensors["latents"].clone())
        return tensors

    active = pipe.get_active_adapters()
    others = [name for name in active if name != "student"]
    scheduler = pipe.scheduler
    pipe.scheduler = TDMScheduler.from_config(scheduler.config)  # one of its own says that this is meant
    pipe.set_adapters(others) if others else pipe.disable_lora()
    latents(pipe, family, callback_on_step_end=catch, **kwargs)
    pipe.enable_lora()
    pipe.set_adapters(active)
    pipe.scheduler = scheduler
    with _on_grid(pipe, GRIDS[4][1:]):
        return latents(pipe, family, latents=caught[0], num_inference_steps=3, **kwargs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_picture_is_that_of_a_run_by_hand(family: str, loaded: Loaded) -> None:
    pipe = loaded(family)
    expected, student, before = by_hand(pipe, family), latents(pipe, family), adapters(pipe)
    recorded = watch(pipe)
    with pipe.base_first():
        first, second = latents(pipe, family), latents(pipe, family)
        *_, last = pipe.stream(**tiny.call_kwargs(family))
    assert recorded == [(False, False), *[(True, False)] * 3] * 3
    for drawn in (first, second, torch.stack(list(last.output[0]))):
        assert torch.equal(drawn, expected)
    assert not torch.allclose(first, student, atol=1e-3)
    assert adapters(pipe) == before
    assert torch.equal(latents(pipe, family), student)


@pytest.mark.parametrize("family", ["sd15", "wan"])
def test_both_halves_of_guidance_are_the_bases(family: str, loaded: Loaded) -> None:
    pipe, guided = loaded(family), {"guidance_scale": 3.0}
    expected, recorded = by_hand(pipe, family, **guided), watch(pipe)
    with pipe.base_first():
        assert torch.equal(latents(pipe, family, **guided), expected)
    a_step = len(recorded) // 4
    assert [student for student, _ in recorded] == [False] * a_step + [True] * (3 * a_step)


def test_a_lora_of_the_user_is_on_in_every_step(make: Make) -> None:
    pipe = load(make("sd15"))
    style = {f"unet.{key}": value for key, value in lora_for(tiny.build("sd15").unet, seed=5).items()}
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["student", "style"], [0.7, 0.5])
    expected, recorded = None, watch(pipe)
    before = adapters(pipe)
    with pipe.base_first():
        drawn = latents(pipe, "sd15")
    assert recorded == [(False, True), *[(True, True)] * 3]
    assert adapters(pipe) == before

    def student_on(*_: Any) -> dict[str, Any]:
        pipe.set_adapters(["student", "style"], [0.7, 0.5])
        return {}

    pipe.set_adapters(["style"], [0.5])
    with pytest.warns(UserWarning, match="student is switched off"):
        expected = latents(pipe, "sd15", callback_on_step_end=student_on)
    assert torch.equal(drawn, expected)


def test_image_to_image_begins_with_the_base(loaded: Loaded) -> None:
    pipe = loaded("sd15")
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "strength": 0.7}
    student = pipe.image_to_image(tiny.PROMPT, picture, **call)[0]
    recorded = watch(pipe)
    with pipe.base_first():
        drawn = pipe.image_to_image(tiny.PROMPT, picture, **call | {"generator": torch.Generator().manual_seed(0)})[0]
        assert [on for on, _ in recorded] == [False, True, True]
        with pytest.raises(TDMError, match="2 steps or more"):
            pipe.image_to_image(tiny.PROMPT, picture, **call | {"strength": 0.3})
    assert not torch.allclose(drawn, student, atol=1e-3)
    assert is_on(pipe.unet, "student")


def test_the_teacher_is_the_teacher_and_the_setting_is_back_after_it(loaded: Loaded) -> None:
    pipe = loaded("sd15")
    with pipe.teacher():
        expected = latents(pipe, "sd15")
    student = latents(pipe, "sd15")
    with pipe.base_first():
        drawn = latents(pipe, "sd15")
        with pipe.teacher():
            assert torch.equal(latents(pipe, "sd15"), expected)
        with pipe.base_first():
            pass
        assert torch.equal(latents(pipe, "sd15"), drawn)
    assert torch.equal(latents(pipe, "sd15"), student)


@pytest.mark.parametrize("at", [0, 1])
def test_errors_and_cancelled_streams_leave_the_adapters_as_they_were(at: int, make: Make) -> None:
    pipe = load(make("sd15"))
    student, before, error = latents(pipe, "sd15"), adapters(pipe), KeyError("mine")

    def fail(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i == at:
            raise error
        return {}

    def network_fails(*_: Any) -> None:
        raise error

    with pipe.base_first():
        with pytest.raises(KeyError):
            latents(pipe, "sd15", callback_on_step_end=fail)
        with pipe.unet.register_forward_pre_hook(network_fails), pytest.raises(KeyError):
            latents(pipe, "sd15")
        for step in pipe.stream(**tiny.call_kwargs("sd15")):
            if step.index == at + 1:
                break
        with pytest.raises(ValueError, match="divisible by 8"):
            latents(pipe, "sd15", height=17)
    assert adapters(pipe) == before
    assert torch.equal(latents(pipe, "sd15"), student)


def test_the_users_callback_gets_what_it_asks_for_and_may_change_it(loaded: Loaded) -> None:
    pipe, recorded = loaded("sd15"), []

    class Look(PipelineCallback):
        tensor_inputs = ["prompt_embeds"]  # noqa: RUF012

        def callback_fn(self, _pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            recorded.append((i, list(tensors)))
            return tensors

    def zero_at_the_end(_: Any, i: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 3 else tensors

    with pipe.base_first():
        latents(pipe, "sd15", callback_on_step_end=Look())
        assert not latents(pipe, "sd15", callback_on_step_end=zero_at_the_end).any()
    assert recorded == [(i, ["prompt_embeds"]) for i in range(4)]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_denoiser_draws_the_same(wrapped: bool, make: Make) -> None:
    pipe = load(make("sd15"))
    student = latents(pipe, "sd15")
    with pipe.base_first():
        expected = latents(pipe, "sd15")
    if wrapped:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    for _ in range(2):
        assert torch.allclose(latents(pipe, "sd15"), student, atol=1e-5)
        with pipe.base_first():
            assert torch.allclose(latents(pipe, "sd15"), expected, atol=1e-5)
    torch.compiler.reset()


def test_what_cannot_be_switched_off_or_leaves_nothing_to_the_student_is_refused(make: Make) -> None:
    pipe = load(make("sd15"))
    student = latents(pipe, "sd15")
    with pipe.base_first():
        with pytest.raises(TDMError, match="2 steps or more"):
            latents(pipe, "sd15", num_inference_steps=1)
        pipe.fuse_lora()
        with pytest.raises(TDMError, match="unfuse_lora first"):
            latents(pipe, "sd15")
        pipe.unfuse_lora()
    assert torch.allclose(latents(pipe, "sd15"), student, atol=1e-5)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(TDMError, match="fused into the weights"), pipe.base_first():
        pass
