"""`TDMPipeline` on ten real families: one line to a picture, the teacher untouched, nothing wrong gets in or out."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from tdm import TDMPipeline, TDMScheduler
from tdm.pipelines.bases import bundled_path
from tdm.pipelines.fixes.pixart import TDMPixArtAlphaPipeline
from tdm.pipelines.students.file import read_student
from tdm.tests import tiny
from tdm.tests.pipelines.students import (
    GRIDS,
    MAIN,
    NO_GUIDANCE,
    Make,
    guided,
    latents,
    load,
    plain,
    short_call,
    state,
)

# ---------------------------------------------------------------------- all families


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_alone_is_a_pipeline_that_a_prompt_suffices_for(
    family: str, make: Make, bases: Callable[[str], Path]
) -> None:
    pipe = load(make(family))
    stock = type(tiny.build(family))
    assert isinstance(pipe, stock)
    assert isinstance(pipe, TDMPipeline)
    parameters, expected = (dict(inspect.signature(c.__call__).parameters) for c in (type(pipe), stock))
    if family == "pixart":  # stock swallows these two in its **kwargs
        added = {parameters.pop(name).kind for name in ("callback_on_step_end", "callback_on_step_end_tensor_inputs")}
        assert added == {inspect.Parameter.KEYWORD_ONLY}
    assert parameters == expected

    samples: list[int] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        samples.append(len(args[0] if args else kwargs["hidden_states"]))

    with getattr(pipe, pipe.family.denoiser).register_forward_pre_hook(count, with_kwargs=True):
        out = short_call(pipe, family)
    assert sum(samples) == 4  # K calls of one sample: no guidance
    call = NO_GUIDANCE.get(family, {"guidance_scale": 1.0})
    assert torch.equal(out, latents(pipe, family, **call))
    assert not torch.allclose(out, latents(plain(bases(family)), family, **call), atol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_teacher_is_the_untouched_base_and_the_student_comes_back(
    family: str, make: Make, bases: Callable[[str], Path]
) -> None:
    pipe = load(make(family))
    before = short_call(pipe, family)
    with pipe.teacher() as teacher:
        assert teacher is pipe
        call = guided(family)
        assert torch.equal(latents(pipe, family, **call), latents(plain(bases(family)), family, **call))
    assert torch.equal(short_call(pipe, family), before)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_folder_comes_back_bit_equal_and_holds_a_clean_base(
    family: str, make: Make, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = load(make(family))
    before = short_call(pipe, family)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(short_call(pipe, family), before)
    assert torch.equal(short_call(load(tmp_path / "saved"), family), before)
    assert load(tmp_path / "saved").recipe == pipe.recipe

    index, stock_index = (json.loads((f / "model_index.json").read_text()) for f in (tmp_path / "saved", bases(family)))
    index.pop("_name_or_path")  # diffusers notes where a pipeline was loaded from
    assert index == stock_index
    weights = Path(pipe.family.denoiser, "diffusion_pytorch_model.safetensors")
    saved, stock = (load_file(folder / weights) for folder in (tmp_path / "saved", bases(family)))
    assert saved.keys() == stock.keys()
    assert all(torch.equal(saved[key], stock[key]) for key in stock)
    base = plain(tmp_path / "saved")
    assert type(base) is type(plain(bases(family)))
    assert torch.equal(latents(base, family), latents(plain(bases(family)), family))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_file_loads_with_the_stock_loader_at_strength_one(
    family: str, make: Make, bases: Callable[[str], Path]
) -> None:
    file = make(family)
    ours = load(file)
    if family == "pixart":
        stock = TDMPixArtAlphaPipeline.from_pretrained(bases(family))
        stock.set_progress_bar_config(disable=True)
    else:
        stock = plain(bases(family))
    merged = plain(bases(family))
    prefix = ours.family.denoiser
    layers = dict(getattr(merged, prefix).named_modules())
    lora = load_file(file)
    for key in (key for key in lora if "lora_A" in key):
        name = key.removesuffix(".lora_A.weight").removeprefix(f"{prefix}.")
        layers[name].weight.data += lora[key.replace("lora_A", "lora_B")] @ lora[key]
    stock.load_lora_weights(str(file))
    for pipe in (stock, merged):
        pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, trained_timesteps=GRIDS, solver_order=1)
    call = NO_GUIDANCE.get(family, {"guidance_scale": 1.0})
    assert torch.equal(short_call(ours, family), latents(stock, family, **call))
    torch.testing.assert_close(latents(merged, family, **call), latents(stock, family, **call), atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------- calling


def test_what_the_caller_gives_wins_and_none_means_the_default(make: Make) -> None:
    pipe = load(make("sd15"))
    assert latents(pipe, "sd15", height=32, width=24).shape[-2:] == (16, 12)
    assert torch.equal(
        latents(pipe, "sd15", height=None, width=None, num_inference_steps=None), short_call(pipe, "sd15")
    )
    generator = torch.Generator().manual_seed(0)
    positional = pipe(tiny.PROMPT, 16, 16, 2, generator=generator, output_type="latent")[0]
    assert torch.equal(positional, latents(pipe, "sd15", num_inference_steps=2, guidance_scale=1.0))
    assert not torch.equal(latents(pipe, "sd15", guidance_scale=5.0), latents(pipe, "sd15"))


def test_the_recipes_guidance_and_solver_are_used(make: Make) -> None:
    pipe = load(make("sd15", guidance_scale=3.0, solver_order=2))
    assert pipe.scheduler.config.solver_order == 2
    assert torch.equal(short_call(pipe, "sd15"), latents(pipe, "sd15", guidance_scale=3.0))


def test_qwen_images_true_guidance_is_off_even_with_a_negative_prompt(make: Make) -> None:
    pipe = load(make("qwenimage"))
    negative = short_call(pipe, "qwenimage", negative_prompt="blurry")
    assert torch.equal(negative, short_call(pipe, "qwenimage"))
    assert not torch.equal(negative, short_call(pipe, "qwenimage", negative_prompt="blurry", true_cfg_scale=4.0))


def test_the_recipes_shift_reaches_the_scheduler(make: Make) -> None:
    assert load(make("sd3")).scheduler.config.flow_shift == 3.0  # the base's
    assert load(make("sd3", "shifted.safetensors", flow_shift=6.0)).scheduler.config.flow_shift == 6.0


def test_the_teacher_has_its_own_defaults_but_the_students_size(make: Make) -> None:
    pipe = load(make("sd15", height=24))
    with pipe.teacher():
        assert type(pipe.scheduler).__name__ == "PNDMScheduler"
        out = short_call(pipe, "sd15")
        assert torch.equal(out, latents(pipe, "sd15", height=24, num_inference_steps=50, guidance_scale=3.5))
    assert isinstance(pipe.scheduler, TDMScheduler)


def test_resolution_binning_stays_on_for_sizes_that_have_bins(make: Make) -> None:
    pipe = load(make("pixart"))
    assert pipe.family.call_defaults(pipe) == {"clean_caption": False, "use_resolution_binning": False}
    pipe.transformer.register_to_config(sample_size=64)
    assert pipe.family.call_defaults(pipe) == {"clean_caption": False}


# ---------------------------------------------------------------------- the teacher context


def test_the_student_is_back_after_an_exception_and_after_nesting(make: Make) -> None:
    pipe = load(make("pixart"))
    expected, before = short_call(pipe, "pixart"), state(pipe)
    flags = [
        parameter.requires_grad_(i % 2 == 0).requires_grad for i, parameter in enumerate(pipe.transformer.parameters())
    ]

    def fail() -> None:
        with pipe.teacher():
            pipe.scheduler = TDMScheduler()  # what the block does with the scheduler ends with it
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    with pipe.teacher():
        with pipe.teacher():
            pass
        inside = latents(pipe, "pixart")
    assert not torch.equal(inside, expected)
    assert torch.equal(short_call(pipe, "pixart"), expected)
    assert state(pipe) == before
    assert [parameter.requires_grad for parameter in pipe.transformer.parameters()] == flags


def test_adapters_that_were_off_before_stay_off(make: Make) -> None:
    pipe = load(make("sd15"))
    pipe.disable_lora()
    expected = latents(pipe, "sd15")
    with pipe.teacher():
        pass
    assert torch.equal(latents(pipe, "sd15"), expected)


@pytest.mark.parametrize("family", MAIN)
def test_user_loras_stay_beside_the_student_and_go_off_with_it(
    family: str, make: Make, bases: Callable[[str], Path]
) -> None:
    pipe = load(make(family))
    alone = latents(pipe, family)
    pipe.load_lora_weights(str(make(family, "style.safetensors", seed=1)), adapter_name="style")
    pipe.set_adapters(["student", "style"], [1.0, 0.5])
    both = latents(pipe, family)
    assert not torch.equal(both, alone)
    with pipe.teacher():
        call = guided(family)
        assert torch.equal(latents(pipe, family, **call), latents(plain(bases(family)), family, **call))
    assert torch.equal(latents(pipe, family), both)

    pipe.load_student(make(family))
    assert set(pipe.get_active_adapters()) == {"student", "style"}
    torch.testing.assert_close(latents(pipe, family), both, atol=1e-3, rtol=1e-3)  # the order of the sum may change


# ---------------------------------------------------------------------- PixArt, bundle


def test_pixart_takes_loras_like_any_pipeline(make: Make, bases: Callable[[str], Path]) -> None:
    pipe = load(make("pixart"))
    assert type(plain(bases("pixart")).transformer) is type(tiny.build("pixart").transformer)  # stock stays stock
    alone = latents(pipe, "pixart")
    pipe.set_adapters("student", 0.0)
    assert not torch.equal(latents(pipe, "pixart"), alone)
    pipe.unload_lora_weights()
    pipe.scheduler = plain(bases("pixart")).scheduler
    guided = {"guidance_scale": 4.5}
    assert torch.equal(latents(pipe, "pixart", **guided), latents(plain(bases("pixart")), "pixart", **guided))


def test_the_loaded_class_is_found_by_diffusers_own_dispatch(make: Make) -> None:
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline

    pipe = load(make("sd15"))
    assert isinstance(pipe, StableDiffusionPipeline)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is StableDiffusionImg2ImgPipeline
    assert isinstance(other.scheduler, TDMScheduler)


def test_the_bundled_model_is_the_default() -> None:
    pipe = load()
    assert read_student(bundled_path() / "student.safetensors").recipe == pipe.recipe
    assert pipe.recipe.base_model == "bundled"
    assert len(pipe("a red cube", output_type="latent")[0]) == 1
