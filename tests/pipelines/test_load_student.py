"""What `TDMPipeline` loads, from where, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from safetensors.torch import load_file
from tdm import TDMPipeline, TDMScheduler
from tdm.errors import TDMError
from tdm.pipelines.students.file import read_student
from tdm.tests import tiny
from tdm.tests.pipelines.students import (
    GRIDS,
    MAIN,
    Make,
    guided,
    latents,
    load,
    plain,
    short_call,
    state,
)
from torch import Tensor

# ---------------------------------------------------------------------- load_student


@pytest.mark.parametrize("family", MAIN)
def test_a_second_student_replaces_the_first(family: str, make: Make) -> None:
    pipe = load(make(family, "one.safetensors", seed=1, trained_timesteps={1: [800.0]}))
    pipe.load_student(make(family, "two.safetensors", seed=2))
    assert pipe.recipe.trained_timesteps == GRIDS
    assert torch.equal(short_call(pipe, family), short_call(load(make(family, "two.safetensors", seed=2)), family))


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite a student with other tensors, past the checks of `save_student`."""
    from safetensors.torch import save_file

    recipe, tensors = read_student(file).recipe, load_file(file)
    assert recipe is not None
    change(tensors)
    save_file(tensors, file, metadata=recipe.to_metadata())


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def widen(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "to_q" in key and "lora_B" in key]:
        tensors[key] = torch.cat([tensors[key]] * 2)


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no layer matches": (rename("transformer.", "model."), r"0 of its \d+ LoRA layers match"),
    "another prefix": (rename("transformer.", "unet."), r"0 of its \d+ LoRA layers match"),
    "some layers unknown": (rename("to_q", "to_w"), r"[1-9]\d* of its .* do not: transformer\S+to_w \(no such layer\)"),
    "other widths": (widen, r"to_q \(\(16, 16\) wide, not \(16, 32\)\)"),
    "NaN": (lambda tensors: next(iter(tensors.values())).fill_(torch.nan), "NaN"),
    "a text encoder without a LoRA loader": (rename("transformer.", "lora_te3_"), r"0 of its \d+ LoRA layers match"),
    "empty": (lambda tensors: tensors.clear(), "no LoRA tensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_lora_that_does_not_fit_is_refused_and_the_pipeline_left_as_it_was(name: str, make: Make) -> None:
    change, message = BROKEN[name]
    pipe = load(make("sd3"))
    expected, before = short_call(pipe, "sd3"), state(pipe)
    broken = make("sd3", "broken.safetensors", seed=1)
    edit(broken, change)
    with pytest.raises(TDMError, match=message) as error:
        pipe.load_student(broken)
    assert "\n" not in str(error.value)
    assert state(pipe) == before
    assert torch.equal(short_call(pipe, "sd3"), expected)
    with pytest.raises(TDMError, match=message):
        load(broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "flux"}, "trained for family 'flux', but the base .* has 'sd3'"),
        ({"prediction_type": "v_prediction"}, "trained for prediction_type 'v_prediction', but the base"),
        ({"trained_timesteps": {1: [1200.0]}}, "1000"),
    ],
)
def test_a_recipe_that_contradicts_the_base_is_refused_and_the_pipeline_left_as_it_was(
    changes: dict[str, Any], message: str, make: Make
) -> None:
    pipe = load(make("sd3"))
    expected, before = short_call(pipe, "sd3"), state(pipe)
    wrong = make("sd3", "wrong.safetensors", seed=1, **changes)
    with pytest.raises(TDMError, match=message):
        pipe.load_student(wrong)
    assert state(pipe) == before
    assert torch.equal(short_call(pipe, "sd3"), expected)


def test_a_wrong_pair_is_refused_before_weights_are_read(
    make: Make, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    file = make("sd3")
    base = tmp_path / "base"
    (base / "scheduler").mkdir(parents=True)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):  # a base without its weights
        (base / name).write_bytes((bases("sdxl") / name).read_bytes())
    with pytest.raises(TDMError, match="trained for family 'sd3'"):
        load(base, student=file)


# ---------------------------------------------------------------------- metadata


def test_a_lora_without_metadata_needs_the_missing_values(make: Make, bases: Callable[[str], Path]) -> None:
    from safetensors.torch import save_file

    file = make("pixart")
    expected = short_call(load(file), "pixart")
    save_file(load_file(file), file)
    with pytest.raises(TDMError, match="does not name its base"):
        load(file)
    with pytest.raises(TDMError, match="lacks: trained_timesteps, guidance_scale, height, width;"):
        load(bases("pixart"), student=file)
    with pytest.raises(TDMError, match="lacks: height, width;"):
        load(bases("pixart"), student=file, recipe={"trained_timesteps": GRIDS, "guidance_scale": 1.0})
    fields = {"trained_timesteps": GRIDS, "guidance_scale": 1.0, "height": 16, "width": 16}
    pipe = load(bases("pixart"), student=file, recipe=fields)
    assert torch.equal(short_call(pipe, "pixart"), expected)
    assert (pipe.recipe.family, pipe.recipe.prediction_type) == ("pixart", "epsilon")


def test_given_values_replace_the_metadata(make: Make, bases: Callable[[str], Path]) -> None:
    moved = make("sd15", "moved.safetensors", base_model="gone")
    assert load(moved, recipe={"base_model": str(bases("sd15"))}).recipe.base_model == str(bases("sd15"))
    pipe = load(make("sd15"), recipe={"guidance_scale": 2.0, "trained_timesteps": {3: [900, 600, 300]}})
    assert pipe.recipe.guidance_scale == 2.0
    assert pipe.recipe.default_steps == 3
    with pytest.raises(TDMError, match="unknown student metadata: steps"):
        load(make("sd15", "other.safetensors"), recipe={"steps": 4})


# ---------------------------------------------------------------------- where things are


def test_a_student_runs_on_another_base_of_its_family(make: Make, bases: Callable[[str], Path], tmp_path: Path) -> None:
    tuned = plain(bases("sd15"))
    tuned.unet.conv_out.weight.data += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    file = make("sd15")
    pipe = load(tmp_path / "tuned", student=file)
    assert not torch.equal(short_call(pipe, "sd15"), short_call(load(file), "sd15"))
    assert pipe.recipe.base_model == str(bases("sd15"))  # what it was trained on


def test_a_folder_or_a_hub_repository_can_hold_a_student(
    make: Make, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    file = make("sd15")
    expected = short_call(load(file), "sd15")
    snapshot = tmp_path / "cache" / "models--someone--student" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "student.safetensors").write_bytes(file.read_bytes())
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for pipe in (
        load(tmp_path),
        load(bases("sd15"), student=tmp_path),
        load("someone/student", **hub),
        load(bases("sd15"), student="someone/student", **hub),
    ):
        assert torch.equal(short_call(pipe, "sd15"), expected)


def test_what_is_not_there_is_named(make: Make, bases: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    (tmp_path / "two").mkdir()
    experts = {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "two" / "model_index.json").write_text(json.dumps(experts))
    moved = make("sd15", "moved.safetensors", base_model=str(tmp_path / "gone"))
    for args, message in [
        ((tmp_path / "absent.safetensors",), "no such file"),
        ((tmp_path / "absent",), "no such file or folder"),
        (("nobody/nothing",), "no such file or folder"),
        ((tmp_path / "empty",), "neither a pipeline"),
        ((bases("sd15"),), "base without a student.safetensors; pass student="),
        ((bases("sd15"), tmp_path / "empty"), "has no student.safetensors"),
        ((bases("sd15"), "nobody/nothing"), "no such file or folder"),
        ((tmp_path / "other", moved), "'KandinskyPipeline' is not supported; supported: StableDiffusionPipeline"),
        ((tmp_path / "two", moved), "two denoisers"),
        ((moved,), "cannot read the base .*gone"),
    ]:
        base, *student = args
        with pytest.raises(TDMError, match=message) as error:
            load(base, student=student[0] if student else None, local_files_only=True)
        assert "\n" not in str(error.value)


def test_both_spellings_of_dtype(make: Make) -> None:
    file = make("sd15")
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}):
        pipe = load(file, **options)
        assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.bfloat16}
        assert short_call(pipe, "sd15").dtype == torch.bfloat16
    with pytest.raises(TDMError, match="contradict"):
        load(file, dtype=torch.bfloat16, torch_dtype=torch.float16)


def test_components_and_options_reach_the_stock_loader(make: Make, bases: Callable[[str], Path]) -> None:
    pipe = load(make("sd15"), vae=None, scheduler=plain(bases("sdxl")).scheduler)
    assert pipe.vae is None
    with pipe.teacher():
        assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    v_student = make("sd15", prediction_type="v_prediction")
    with pytest.raises(TDMError, match="prediction_type"):
        load(v_student)
    v_scheduler = TDMScheduler.from_config(plain(bases("sd15")).scheduler.config, prediction_type="v_prediction")
    assert load(v_student, scheduler=v_scheduler).scheduler.config.prediction_type == "v_prediction"


# ---------------------------------------------------------------------- from_pipe


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_goes_into_a_pipeline_that_is_loaded_already(
    family: str, make: Make, bases: Callable[[str], Path]
) -> None:
    base = plain(bases(family))
    stock = base.scheduler
    pipe = TDMPipeline.from_pipe(base, student=make(family))
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(short_call(pipe, family), short_call(load(make(family)), family))
    assert base.scheduler is stock
    call = guided(family)
    with pipe.teacher():
        assert torch.equal(latents(pipe, family, **call), latents(plain(bases(family)), family, **call))


def test_from_pipe_keeps_the_dtype_and_refuses_what_it_cannot_serve(make: Make, bases: Callable[[str], Path]) -> None:
    base = plain(bases("sd15")).to(torch.bfloat16)
    pipe = TDMPipeline.from_pipe(base, student=make("sd15"))
    assert pipe.unet.dtype == torch.bfloat16
    with pytest.raises(TDMError, match="has a student already"):
        TDMPipeline.from_pipe(pipe, student=make("sd15"))
    with pytest.raises(TDMError, match="'StableDiffusionImg2ImgPipeline' is not supported"):
        TDMPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(base), student=make("sd15"))
    with pytest.raises(TDMError, match="the student was trained for family 'sd15'"):
        TDMPipeline.from_pipe(plain(bases("sdxl")), student=make("sd15"))
