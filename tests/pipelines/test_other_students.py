"""Students of other methods: each runs by its id as its authors run it with diffusers, to the bit."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tdm import TDMPipeline, TDMScheduler
from tdm.cli import main
from tdm.errors import TDMError
from tdm.pipelines.loras.file import read_lora_file
from tdm.pipelines.students.convert import convert_lora
from tdm.pipelines.students.describe import describe
from tdm.pipelines.students.file import read_header, save_student
from tdm.pipelines.students.recipe import HEADER_KEY, StudentRecipe
from tdm.pipelines.students.released import PRESETS, Preset, known_of, preset_of
from tdm.tests import tiny
from tdm.tests.pipelines.lora_files import LAYOUTS, diffusers_names, tensors_of, updates, write
from tdm.tests.pipelines.students import Make, latents, load, plain, recipe_for, short_call
from tdm.tests.pipelines.test_presets import in_cache

OTHERS = [name for name, preset in PRESETS.items() if "sampler" in preset.recipe]
DMD2, LCM, TCD = "tianweiy/DMD2", "latent-consistency/lcm-lora-sdxl", "h1t/TCD-SD15-LoRA"
HYPER, LIGHTNING = "ByteDance/Hyper-SD", "ByteDance/SDXL-Lightning"
HYPER_4 = f"{HYPER}/Hyper-SDXL-4steps-lora.safetensors"
SMALL = {"height": 16, "width": 16}  # what the tiny bases can draw
RELEASED = {"clip_sample": False, "set_alpha_to_one": False}  # in the scheduler configs of all their bases

TRAILING = {
    2: [999, 499],
    4: [999, 749, 499, 249],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
    12: [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82],
}


def of_the_card(name: str) -> tuple[str, dict[str, Any], dict[str, Any], list[int]]:
    """(scheduler, its overrides, arguments of the call, timesteps) of a student's model card."""
    if name == DMD2:
        return "LCMScheduler", {}, {"num_inference_steps": 4, "timesteps": TRAILING[4]}, TRAILING[4]
    if "lcm-lora" in name:
        return "LCMScheduler", {}, {"num_inference_steps": 4}, [999, 759, 499, 259]
    if "TCD" in name:
        return "TCDScheduler", {}, {"num_inference_steps": 4, "eta": 0.3}, [999, 759, 499, 259]
    if "-1step-" in name:
        return "TCDScheduler", {}, {"num_inference_steps": 1, "eta": 1.0}, [999]
    k = int(re.findall(r"(\d+)steps?", name)[0])
    scheduler = "EulerDiscreteScheduler" if name.startswith(LIGHTNING) else "DDIMScheduler"
    guidance = {"guidance_scale": 5.0} if "CFG" in name else {}
    return scheduler, {"timestep_spacing": "trailing"}, {"num_inference_steps": k, **guidance}, TRAILING[k]


def write_released(folder: Path, preset: Preset, seed: int = 0) -> Path:
    """A random LoRA under the name of a released one; the layouts are presumed, kohya with alphas or diffusers."""
    folder.mkdir(parents=True, exist_ok=True)
    assert preset.file is not None
    unet = tiny.build(preset.family).unet
    names = {n: layers for n, layers in diffusers_names(unet, "").items() if n.endswith(("to_q", "to_v", "to_out.0"))}
    loras = updates(tiny.build(preset.family), "unet", names, seed)
    tensors = tensors_of(LAYOUTS["diffusers" if preset.repository == LIGHTNING else "kohya"], loras)
    alphas = {key: torch.tensor(1.0) for key in tensors if key.endswith(".alpha")}  # of 2: exact, wherever multiplied
    return write(folder / preset.file, tensors | alphas)


@pytest.fixture(scope="module")
def base(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny base whose scheduler has the settings of the released ones."""
    root = tmp_path_factory.mktemp("released")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            shutil.copytree(bases(family), root / family)
            config = root / family / "scheduler" / "scheduler_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | RELEASED))
        return root / family

    return folder


@pytest.fixture
def other(base: Callable[[str], Path], tmp_path: Path) -> Callable[[str], TDMPipeline]:
    """The pipeline of a student of another method on its tiny base, from a folder with the layout of the hub."""

    def pipe(name: str) -> TDMPipeline:
        preset = PRESETS[name]
        return load(base(preset.family), student=write_released(tmp_path / preset.repository, preset), recipe=SMALL)

    return pipe


@pytest.mark.parametrize("name", OTHERS)
def test_a_student_runs_as_its_authors_run_it(
    name: str, base: Callable[[str], Path], other: Callable[[str], TDMPipeline], tmp_path: Path
) -> None:
    pipe, preset = other(name), PRESETS[name]
    scheduler, overrides, call, timesteps = of_the_card(name)
    stock = plain(base(preset.family))
    stock.load_lora_weights(tmp_path / preset.repository, weight_name=preset.file)
    stock.scheduler = getattr(diffusers, scheduler).from_config(stock.scheduler.config, **overrides)

    recorded: list[float] = []
    with pipe.unet.register_forward_pre_hook(lambda _, args: recorded.append(float(args[1]))):
        actual = short_call(pipe, preset.family)
    assert recorded == timesteps
    assert torch.equal(actual, latents(stock, preset.family, **{"guidance_scale": 0.0, **call}))
    assert torch.equal(actual, short_call(pipe, preset.family))
    other_seed = torch.Generator().manual_seed(1)
    assert not torch.equal(actual, pipe(tiny.PROMPT, generator=other_seed, output_type="latent")[0])
    for k in {min(pipe.recipe.trained_timesteps), max(pipe.recipe.trained_timesteps)} - {len(timesteps)}:
        options = {**call, "num_inference_steps": k, "guidance_scale": 0.0}
        assert torch.equal(
            short_call(pipe, preset.family, num_inference_steps=k), latents(stock, preset.family, **options)
        )


def test_noise_is_drawn_from_the_generator(other: Callable[[str], TDMPipeline]) -> None:
    pipe = other(TCD)
    same_start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def draw(seed: int, **call: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        return pipe(tiny.PROMPT, latents=same_start.clone(), generator=noise, output_type="latent", **call)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, eta=0.0), draw(2, eta=0.0))  # what the caller gives wins


@pytest.mark.parametrize("name", [DMD2, LCM, HYPER_4])
def test_the_id_alone_is_enough(name: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    preset = PRESETS[name]
    cached = in_cache(tmp_path / "cache", preset.repository)
    write_released(cached, preset)
    (cached / "model_unet.safetensors").write_bytes(b"a whole model, not to be read")
    shutil.copytree(base(preset.family), in_cache(tmp_path / "cache", preset.base), dirs_exist_ok=True)
    hub: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True, "recipe": SMALL}
    pipe = load(name, **hub)
    actual = short_call(pipe, preset.family)
    assert pipe.recipe.base_model == preset.base
    file = write_released(tmp_path / preset.repository, preset)
    assert torch.equal(short_call(load(file, **hub), preset.family), actual)
    assert torch.equal(short_call(load(base(preset.family), student=name, **hub), preset.family), actual)
    with pytest.raises(TDMError, match=rf"{preset.repository}/{preset.file} is not in the local cache"):
        load(name, cache_dir=tmp_path / "empty", local_files_only=True)


def test_one_of_several_students_of_a_repository_must_be_named(bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = write_released(tmp_path / HYPER, PRESETS[HYPER_4]).parent
    for source in (HYPER, folder):
        with pytest.raises(TDMError, match=rf"{HYPER} holds several students; pass one: .*{HYPER_4}") as raised:
            load(bases("sdxl"), student=source)
        assert str(raised.value).count(".safetensors") == 12
    flux = shutil.copy(folder / Path(HYPER_4).name, folder / "Hyper-FLUX.1-dev-8steps-lora.safetensors")
    with pytest.raises(TDMError, match="metadata lacks: trained_timesteps"):
        load(bases("sdxl"), student=flux)


def test_a_file_is_recognised_by_its_name_only_where_that_is_its_own(tmp_path: Path) -> None:
    dmd2, lcm = (write_released(tmp_path / "loras", PRESETS[name]) for name in (DMD2, LCM))
    assert preset_of(dmd2) is PRESETS[DMD2]
    assert known_of(read_lora_file(lcm)) == ({}, None)  # pytorch_lora_weights.safetensors: any LoRA has that name


def test_a_file_of_any_repository_can_be_named(make: Make, tmp_path: Path) -> None:
    cached = in_cache(tmp_path / "cache", "someone/students") / "fast" / "mine.safetensors"
    cached.parent.mkdir()
    shutil.copy(file := make("sd15"), cached)
    hub = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    expected = short_call(load(file), "sd15")
    assert torch.equal(short_call(load("someone/students/fast/mine.safetensors", **hub), "sd15"), expected)
    with pytest.raises(TDMError, match=r"gone\.safetensors: no such file, and no hub"):
        load("someone/students/gone.safetensors", **hub)


def test_a_step_count_that_is_not_stated_runs_on_the_schedulers_own_grid_with_one_warning(
    other: Callable[[str], TDMPipeline],
) -> None:
    pipe = other(DMD2)
    with pytest.warns(UserWarning, match="for 4 steps; 2 steps run on the grid of LCMScheduler"):
        actual = short_call(pipe, "sdxl", num_inference_steps=2)
    assert pipe.scheduler.timesteps.tolist() == [999, 499]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(short_call(pipe, "sdxl", num_inference_steps=2), actual)
        short_call(pipe, "sdxl", timesteps=[999, 599, 199])
        assert pipe.scheduler.timesteps.tolist() == [999, 599, 199]


def test_the_trained_timesteps_hold_in_other_pipelines_too(base: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_released(tmp_path, PRESETS[DMD2])
    grid = [999, 799, 399]  # not the scheduler's own
    pipe = load(base("sdxl"), student=file, recipe={**SMALL, "trained_timesteps": {3: grid}})
    image_to_image = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    image_to_image.scheduler.set_timesteps(3)
    assert image_to_image.scheduler.timesteps.tolist() == grid


def test_a_scheduler_made_anew_from_its_config_is_the_stock_one(other: Callable[[str], TDMPipeline]) -> None:
    scheduler = other(LCM).scheduler
    anew = type(scheduler).from_config(scheduler.config)
    anew.set_timesteps(10)
    assert len(anew.timesteps) == 10


def test_the_commands_take_it(base: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, out = write_released(tmp_path / TCD, PRESETS[TCD]), tmp_path / "a.png"
    arguments = ["generate", "a red cube", "--model", str(base("sd15")), "--student", str(student), "--size", "16"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "16x16  4 network calls" in printed
    assert "does not know" not in printed
    student_of_ours = tmp_path / "student.safetensors"
    sampler = "sampler={scheduler: LCMScheduler, config: {original_inference_steps: 1000}}"
    recipe = ["--recipe", "trained_timesteps=999,499", "guidance_scale=1", "height=16", "width=16", sampler]
    unknown = student.rename(tmp_path / "lora.safetensors")
    assert main(["convert", str(unknown), "--base", str(base("sd15")), "--out", str(student_of_ours), *recipe]) == 0
    assert main(["generate", "a red cube", "--student", str(student_of_ours), "--out", str(tmp_path / "b.png")]) == 0
    assert "16x16  2 network calls" in capsys.readouterr().out


def test_the_teacher_and_a_tdm_student_do_not_inherit_the_sampler(
    other: Callable[[str], TDMPipeline], base: Callable[[str], Path], make: Make
) -> None:
    pipe = other(TCD)
    actual = short_call(pipe, "sd15")
    with pipe.teacher():
        teacher = latents(pipe, "sd15", guidance_scale=3.0)
    assert torch.equal(teacher, latents(plain(base("sd15")), "sd15", guidance_scale=3.0))
    assert torch.equal(short_call(pipe, "sd15"), actual)
    student = make("sd15")
    pipe.load_student(student)
    assert isinstance(pipe.scheduler, TDMScheduler)
    assert torch.equal(short_call(pipe, "sd15"), short_call(load(student), "sd15"))


def test_a_converted_or_saved_student_carries_its_sampler(
    other: Callable[[str], TDMPipeline], base: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = other(TCD)
    actual = short_call(pipe, "sd15")
    out = tmp_path / "out.safetensors"
    save_student(out, convert_lora(tmp_path / TCD, base=str(base("sd15")), recipe=SMALL))
    assert torch.equal(short_call(load(base("sd15"), student=out), "sd15"), actual)
    assert json.loads(read_header(out)[HEADER_KEY])["sampler"] == {
        "scheduler": "TCDScheduler",
        "config": {},
        "eta": 0.3,
        "default_steps": 4,
    }
    assert "TCDScheduler, eta 0.3; 4 steps if none are asked for" in describe(out)
    pipe.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert reloaded.recipe == pipe.recipe
    assert torch.equal(short_call(reloaded, "sd15"), actual)


def test_the_header_of_a_tdm_student_knows_nothing_of_samplers(make: Make) -> None:
    fields = json.loads(read_header(make("sd15"))[HEADER_KEY])
    assert set(fields) == {
        "version",
        "base_model",
        "family",
        "prediction_type",
        "trained_timesteps",
        "guidance_scale",
    } | {
        "height",
        "width",
        "flow_shift",
        "solver_order",
        "num_frames",
        "notes",
    }


def test_latents_are_not_clipped_on_a_base_that_does_not_speak_of_it(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_released(tmp_path / HYPER, PRESETS[HYPER_4])
    assert "clip_sample" not in plain(bases("sdxl")).scheduler.config
    assert load(bases("sdxl"), student=file).scheduler.config.clip_sample is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "LCMScheduler"}, "sampler must have the fields scheduler"),
        ({"sampler": {"scheduler": "LCMScheduler", "steps": 4}}, "sampler must have the fields scheduler"),
        ({"sampler": {"scheduler": "StableDiffusionPipeline"}}, "scheduler must be one of DDIMScheduler"),
        ({"sampler": {"scheduler": "TCDScheduler", "eta": 1.5}}, "eta must be from 0 to 1"),
        ({"sampler": {"scheduler": "TCDScheduler", "config": [1]}}, "config must be settings by name"),
        ({"sampler": {"scheduler": "LCMScheduler", "default_steps": 3}}, "default_steps is a trained step count"),
        ({"sampler": {"scheduler": "LCMScheduler"}, "solver_order": 2}, "solver_order must be absent"),
        (
            {"sampler": {"scheduler": "LCMScheduler"}, "prediction_type": "flow_prediction"},
            "its schedulers run no flow model",
        ),
        ({"sampler": {"scheduler": "LCMScheduler", "config": {"spacing": 1}}}, "LCMScheduler has no setting spacing"),
        ({"sampler": {"scheduler": "DDIMScheduler"}}, r"DDIMScheduler runs 1 steps at \[1\], not at the trained \[900"),
        (
            {"sampler": {"scheduler": "LCMScheduler"}, "trained_timesteps": {1: [1000]}},
            "LCMScheduler cannot run the timesteps",
        ),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, bases: Callable[[str], Path], make: Make
) -> None:
    fields = {**vars(recipe_for("sd15", bases("sd15"))), **changes}
    file = make("sd15")
    with pytest.raises(TDMError, match=message) as raised:
        load(file, recipe=fields)
    assert "\n" not in str(raised.value)


def test_every_preset_is_a_recipe(base: Callable[[str], Path]) -> None:
    for name in OTHERS:
        recipe = StudentRecipe.from_fields(PRESETS[name].fields)
        assert StudentRecipe.from_metadata(recipe.to_metadata()) == recipe
        assert recipe.prediction_type == recipe_for(recipe.family, base(recipe.family)).prediction_type
        assert recipe.notes["released as"] == name


def test_a_user_lora_beside_a_student_is_what_diffusers_makes_of_the_two(
    other: Callable[[str], TDMPipeline], base: Callable[[str], Path], make: Make, tmp_path: Path
) -> None:
    pipe, stock = other(LCM), plain(base("sdxl"))
    style = str(make("sdxl", "style.safetensors", seed=1))
    stock.load_lora_weights(tmp_path / LCM, weight_name=PRESETS[LCM].file, adapter_name="lcm")
    stock.load_lora_weights(style, adapter_name="style")
    stock.set_adapters(["lcm", "style"], [1.0, 0.8])
    stock.scheduler = diffusers.LCMScheduler.from_config(stock.scheduler.config)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["student", "style"], [1.0, 0.8])
    assert torch.equal(short_call(pipe, "sdxl"), latents(stock, "sdxl", guidance_scale=1.0))
