"""`TDMPipeline` on ten real families: one line to a picture, the teacher untouched, nothing wrong gets in or out."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from tdm import TDMPipeline, TDMScheduler
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.pipelines.locate import bundled_path
from tdm.pipelines.pixart import TDMPixArtAlphaPipeline
from tdm.pipelines.student import StudentRecipe, read_student, read_tensors, save_student
from tdm.tests import tiny
from torch import Tensor, nn

GRIDS = {1: [900.0], 2: [900.0, 450.0], 4: [900.0, 700.0, 500.0, 300.0]}
NO_GUIDANCE = {"zimage": {"guidance_scale": 0.0}, "qwenimage": {"true_cfg_scale": 1.0}}  # others: guidance_scale=1.0
MAIN = ("sd15", "sdxl", "pixart", "sd3")

Make = Callable[..., Path]


# ---------------------------------------------------------------------- helpers


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny base, built once."""
    root = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        if not (root / family).exists():
            tiny.build(family).save_pretrained(root / family)
        return root / family

    return base


def lora_for(denoiser: nn.Module, seed: int = 0, rank: int = 2) -> dict[str, Tensor]:
    """A small random LoRA on the attention projections."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_v", "to_out.0")):
            state[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * 0.2
            state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.2
    return state


def recipe_for(tiny_family: str, base: Path, **changes: Any) -> StudentRecipe:
    scheduler = TDMScheduler.from_config(TDMScheduler.load_config(base, subfolder="scheduler"))
    call = tiny.call_kwargs(tiny_family)
    fields: dict[str, Any] = {
        "base_model": str(base),
        "family": tiny_family,
        "prediction_type": scheduler.config.prediction_type,
        "trained_timesteps": GRIDS,
        "guidance_scale": 1.0,
        "height": call["height"],
        "width": call["width"],
        "num_frames": call.get("num_frames"),
    }
    return StudentRecipe(**(fields | changes))


@pytest.fixture
def make(bases: Callable[[str], Path], tmp_path: Path) -> Make:
    """Writes a student file for a tiny base, and returns its path."""

    def student(base: str, name: str = "student.safetensors", seed: int = 0, **changes: Any) -> Path:
        denoiser = getattr(tiny.build(base), family_of_name(base).denoiser)
        recipe = recipe_for(base, bases(base), **changes)
        return save_student(tmp_path / name, lora_for(denoiser, seed), recipe, lora_alpha=4, force=True)

    return student


def load(*args: Any, **kwargs: Any) -> TDMPipeline:
    pipe = TDMPipeline.from_pretrained(*args, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: DiffusionPipeline, family: str, **kwargs: Any) -> Tensor:
    out = pipe(**{**tiny.call_kwargs(family), **kwargs})[0]
    return out if isinstance(out, Tensor) else torch.stack(list(out))


def short_call(pipe: DiffusionPipeline, family: str, **kwargs: Any) -> Tensor:
    """A call without what the student is to know: steps, guidance, size and length."""
    known = {"num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "width", "num_frames"}
    known |= {"use_resolution_binning", "clean_caption"}
    given = {name: value for name, value in tiny.call_kwargs(family).items() if name not in known}
    out = pipe(**given, **kwargs)[0]
    return out if isinstance(out, Tensor) else torch.stack(list(out))


def state(pipe: TDMPipeline) -> tuple[Any, ...]:
    return pipe.recipe, pipe.scheduler, type(pipe.scheduler), pipe.get_list_adapters(), pipe.get_active_adapters()


# ---------------------------------------------------------------------- all families


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_alone_is_a_pipeline_that_a_prompt_suffices_for(
    family: str, make: Make, bases: Callable[[str], Path]
) -> None:
    pipe = load(make(family))
    stock = type(tiny.build(family))
    assert isinstance(pipe, stock)
    assert isinstance(pipe, TDMPipeline)
    assert inspect.signature(type(pipe).__call__) == inspect.signature(stock.__call__)

    samples: list[int] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        samples.append(len(args[0] if args else kwargs["hidden_states"]))

    with getattr(pipe, pipe._family.denoiser).register_forward_pre_hook(count, with_kwargs=True):
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
        assert torch.equal(latents(pipe, family), latents(plain(bases(family)), family))
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
    weights = Path(pipe._family.denoiser, "diffusion_pytorch_model.safetensors")
    saved, stock = (read_tensors(folder / weights) for folder in (tmp_path / "saved", bases(family)))
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
    prefix = ours._family.denoiser
    layers = dict(getattr(merged, prefix).named_modules())
    lora = read_tensors(file)
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
        assert torch.equal(out, latents(pipe, "sd15", height=24, num_inference_steps=50, guidance_scale=7.5))
    assert isinstance(pipe.scheduler, TDMScheduler)


def test_resolution_binning_stays_on_for_sizes_that_have_bins(make: Make) -> None:
    pipe = load(make("pixart"))
    assert pipe._family.call_defaults(pipe) == {"clean_caption": False, "use_resolution_binning": False}
    pipe.transformer.register_to_config(sample_size=64)
    assert pipe._family.call_defaults(pipe) == {"clean_caption": False}


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
        assert torch.equal(latents(pipe, family), latents(plain(bases(family)), family))
    assert torch.equal(latents(pipe, family), both)

    pipe.load_student(make(family))
    assert set(pipe.get_active_adapters()) == {"student", "style"}
    torch.testing.assert_close(latents(pipe, family), both, atol=1e-3, rtol=1e-3)  # the order of the sum may change


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

    recipe, tensors = read_student(file)
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
    "no prefix": (rename("transformer.", ""), r"0 of its \d+ LoRA layers match"),
    "some layers unknown": (rename("to_q", "to_w"), r"[1-9]\d* of its .* do not: transformer\S+to_w \(no such layer\)"),
    "other widths": (widen, r"to_q \(\(16, 16\) wide, not \(16, 32\)\)"),
    "NaN": (lambda tensors: next(iter(tensors.values())).fill_(torch.nan), "NaN"),
    "raw peft keys": (rename("transformer.", "base_model.model."), r"0 of its \d+ LoRA layers match"),
    "adapter name in keys": (rename("_A.weight", "_A.default.weight"), "not a diffusers LoRA key"),
    "kohya keys": (rename("transformer.", "lora_unet_"), r"0 of its \d+ LoRA layers match"),
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
    save_file(read_tensors(file), file)
    with pytest.raises(TDMError, match="does not name its base"):
        load(file)
    with pytest.raises(TDMError, match="lacks: trained_timesteps, guidance_scale, height, width;"):
        load(bases("pixart"), student=file)
    with pytest.raises(TDMError, match="lacks: height, width;"):
        load(bases("pixart"), student=file, recipe={"trained_timesteps": GRIDS, "guidance_scale": 1.0})
    given = {"trained_timesteps": GRIDS, "guidance_scale": 1.0, "height": 16, "width": 16}
    pipe = load(bases("pixart"), student=file, recipe=given)
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
        ((tmp_path / "absent.safetensors",), "No such file"),
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


# ---------------------------------------------------------------------- save_pretrained


def test_a_saved_folder_needs_no_other_folder(make: Make, bases: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(bases("sd15"), tmp_path / "base")
    pipe = load(make("sd15", base_model=str(tmp_path / "base")))
    pipe.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "base")
    assert torch.equal(short_call(load(tmp_path / "saved"), "sd15"), short_call(pipe, "sd15"))


def test_a_folder_that_exists_stays_without_force(make: Make, tmp_path: Path) -> None:
    pipe = load(make("sd15"))
    target = tmp_path / "saved"
    target.mkdir()
    pipe.save_pretrained(target)  # an empty folder is no loss
    (target / "mine.txt").write_text("keep")
    with pytest.raises(TDMError, match="force"):
        pipe.save_pretrained(target)
    assert (target / "mine.txt").exists()
    pipe.save_pretrained(target, force=True)
    assert not (target / "mine.txt").exists()
    assert torch.equal(short_call(load(target), "sd15"), short_call(pipe, "sd15"))
    assert sorted(os.listdir(tmp_path)) == ["saved", "student.safetensors"]


def test_a_failed_save_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    pipe = load(make("sd15"))
    expected, before = short_call(pipe, "sd15"), state(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    kept = (tmp_path / "saved" / "student.safetensors").read_bytes()
    with pytest.raises(ValueError, match="Unit"):
        pipe.save_pretrained(tmp_path / "saved", force=True, max_shard_size="wrong")
    assert (tmp_path / "saved" / "student.safetensors").read_bytes() == kept
    assert sorted(os.listdir(tmp_path)) == ["saved", "student.safetensors"]
    assert state(pipe) == before
    assert torch.equal(short_call(pipe, "sd15"), expected)
    assert any("lora" in key for key in pipe.unet.state_dict())


def test_a_pipeline_that_a_folder_could_not_hold_is_not_saved(make: Make, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(TDMError, match=message):
            pipe.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    pipe = load(make("sd15"))
    with pytest.raises(TDMError, match="push_to_hub"):
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True)
    pipe.set_adapters("student", 0.5)
    refused("strength 0.5")
    pipe.set_adapters("student")
    pipe.load_lora_weights(str(make("sd15", "style.safetensors", seed=1)), adapter_name="style")
    refused(r"adapters \['style'\]")
    pipe.delete_adapters("style")
    pipe.set_adapters("student")
    pipe.fuse_lora()
    refused("fused")
    with pytest.raises(TDMError, match="fused"), pipe.teacher():
        pass
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    refused("no longer loaded")
    pipe.load_student(make("sd15"))
    pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(TDMError, match="a file"):
        pipe.save_pretrained(tmp_path / "student.safetensors", force=True)


def test_a_compiled_denoiser_is_saved_as_the_network_it_wraps(make: Make, tmp_path: Path) -> None:
    pipe = load(make("sd15"))
    expected = short_call(pipe, "sd15")
    pipe.unet = torch.compile(pipe.unet)
    pipe.load_student(make("sd15"))
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(short_call(load(tmp_path / "saved"), "sd15"), expected)


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
    assert read_student(bundled_path() / "student.safetensors")[0] == pipe.recipe
    assert pipe.recipe.base_model == "bundled"
    assert len(pipe("a red cube", output_type="latent")[0]) == 1
