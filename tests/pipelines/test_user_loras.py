"""User LoRAs next to a student: any order, any strength, the sum of all of them; the student is never lost silently."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tdm import TDMPipeline, TDMScheduler
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.tests import tiny
from tdm.tests.pipelines.lora_files import LAYOUTS, Update, diffusers_names, merge, tensors_of, updates, write
from tdm.tests.pipelines.students import (
    Make,
    error,
    guided,
    latents,
    load,
    plain,
    recipe_for,
    short_call,
    without_student,
)
from torch import Tensor

LAYERS = ("to_q", "to_v", "to_out.0", "q_proj", "v_proj")
WITH_TEXT = ("sd15", "sdxl", "sd3", "flux")  # families whose stock loader takes LoRAs for text encoders


def random_lora(family: str, seed: int, *, text: bool) -> list[Update]:
    """A LoRA for the denoiser, and for the text encoders that take one."""
    pipe, components = tiny.build(family), [family_of_name(family).denoiser]
    if text:
        components += [name for name in pipe._lora_loadable_modules if name.startswith("text_encoder")]
    loras = []
    for i, name in enumerate(components):
        names = {n: layers for n, layers in diffusers_names(getattr(pipe, name), family).items() if n.endswith(LAYERS)}
        loras += updates(pipe, name, names, seed=seed + i)
    return loras


def merged(pipe: TDMPipeline, base: Path, family: str, loras: dict[float, list[Update]]) -> Tensor:
    """The student's call with LoRAs merged into the weights in float64, each at its strength."""
    by_hand, clean = plain(base), without_student(pipe)
    for strength, random_loras in loras.items():
        merge(by_hand, random_loras, strength)
    for component in {update.component for random_loras in loras.values() for update in random_loras}:
        setattr(clean, component, getattr(by_hand, component))
    return short_call(clean, family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_user_loras_add_up_with_the_student_in_any_order_and_leave_no_trace(
    family: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    text, base = family in WITH_TEXT, bases(family)
    loras = {name: random_lora(family, seed, text=text) for name, seed in (("student", 0), ("a", 10), ("b", 20))}
    files = {
        name: write(tmp_path / f"{name}.safetensors", tensors_of(LAYOUTS["diffusers"], lora))
        for name, lora in loras.items()
    }
    recipe = vars(recipe_for(family, base))
    pipe = load(base, student=files["student"], recipe=recipe)
    alone = short_call(pipe, family)

    pipe.load_lora_weights(str(files["a"]), adapter_name="a")
    with_a = merged(pipe, base, family, {1.0: [*loras["student"], *loras["a"]]})
    assert error(short_call(pipe, family), with_a) <= 1e-5
    assert error(with_a, alone) > 1e-3  # the LoRA does something

    pipe.load_lora_weights(str(files["b"]), adapter_name="b")
    pipe.set_adapters(["student", "a", "b"], [1.0, 0.7, -0.4])
    expected = merged(pipe, base, family, {1.0: loras["student"], 0.7: loras["a"], -0.4: loras["b"]})
    assert error(short_call(pipe, family), expected) <= 1e-5
    pipe.set_adapters(["b", "student", "a"], [-0.4, 1.0, 0.7])
    assert error(short_call(pipe, family), expected) <= 1e-5
    pipe.load_student(files["student"], recipe=recipe)  # after the user's, whose strengths stay
    assert error(short_call(pipe, family), expected) <= 1e-5

    pipe.set_adapters("student")
    assert torch.equal(short_call(pipe, family), alone)
    pipe.delete_adapters(["a", "b"])
    assert torch.equal(short_call(pipe, family), alone)

    pipe.load_lora_weights(str(files["b"]), adapter_name="b")
    pipe.load_lora_weights(str(files["a"]), adapter_name="a")
    pipe.set_adapters(["a", "b", "student"], [0.7, -0.4, 1.0])
    assert error(short_call(pipe, family), expected) <= 1e-5
    pipe.delete_adapters("a")
    pipe.delete_adapters("b")
    assert torch.equal(short_call(pipe, family), alone)


def test_a_new_lora_switches_nothing_on_that_was_off(make: Make) -> None:
    pipe = load(make("sd15"))
    pipe.load_lora_weights(str(make("sd15", "a.safetensors", seed=1)), adapter_name="a")
    pipe.set_adapters("a", 0.5)
    pipe.load_lora_weights(str(make("sd15", "b.safetensors", seed=2)), adapter_name="b")
    assert pipe.get_active_adapters() == ["a", "b"]
    with pytest.warns(UserWarning, match="switched off"):
        actual = short_call(pipe, "sd15")
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    with pytest.warns(UserWarning, match="switched off"):
        assert torch.equal(short_call(pipe, "sd15"), actual)


def test_a_student_that_is_gone_is_an_error_and_not_the_base_in_disguise(
    make: Make, bases: Callable[[str], Path]
) -> None:
    pipe = load(make("sd15"))
    expected = short_call(pipe, "sd15")
    pipe.load_lora_weights(str(make("sd15", "a.safetensors", seed=1)), adapter_name="a")
    for take_away in (lambda: pipe.delete_adapters("student"), pipe.unload_lora_weights):
        take_away()
        with pytest.raises(TDMError, match="no longer loaded; call load_student"):
            short_call(pipe, "sd15")
    with pipe.teacher():
        call = guided("sd15")
        assert torch.equal(latents(pipe, "sd15", **call), latents(plain(bases("sd15")), "sd15", **call))
    replacement = TDMScheduler.from_config(pipe.scheduler.config)
    sampler, pipe.scheduler = pipe.scheduler, replacement  # a scheduler of the caller's own is the caller's choice
    assert not torch.equal(short_call(pipe, "sd15"), expected)
    pipe.scheduler = sampler
    pipe.load_student(make("sd15"))
    assert torch.equal(short_call(pipe, "sd15"), expected)


def test_a_student_that_is_switched_off_is_warned_of_and_other_strengths_are_not(make: Make) -> None:
    pipe = load(make("sd15"))
    expected = short_call(pipe, "sd15")
    for off in (pipe.disable_lora, lambda: pipe.set_adapters("student", 0.0)):
        off()
        with pytest.warns(UserWarning, match="the student is switched off"):
            short_call(pipe, "sd15")
        pipe.enable_lora()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.set_adapters("student", 0.7)
        assert not torch.equal(short_call(pipe, "sd15"), expected)
        pipe.set_adapters("student")
        assert torch.equal(short_call(pipe, "sd15"), expected)
        pipe.disable_lora()
        with pipe.teacher():
            short_call(pipe, "sd15")


def test_a_fused_student_runs_but_can_be_neither_replaced_nor_taken_off(make: Make) -> None:
    pipe = load(make("sd15"))
    expected = short_call(pipe, "sd15")
    pipe.fuse_lora()
    for message in ("call unfuse_lora first", "load the base and the student again"):
        assert error(short_call(pipe, "sd15"), expected) <= 1e-5
        with pytest.raises(TDMError, match=message):
            pipe.load_student(make("sd15"))
        with pytest.raises(TDMError, match=message), pipe.teacher():
            pass
        pipe.unload_lora_weights()  # the weights keep it
