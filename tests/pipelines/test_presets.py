"""The released TDM students: each resolves from its id alone, in the hub's cache or a folder, and runs as stated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.file import read_lora_file
from tdm.pipelines.students.file import Student, save_student
from tdm.pipelines.students.recipe import StudentRecipe
from tdm.pipelines.students.released import PRESETS, Preset, preset_of
from tdm.tests import tiny
from tdm.tests.pipelines.lora_files import diffusers_names, updates
from tdm.tests.pipelines.students import load, plain, recipe_for, short_call
from torch import Tensor

NAMES = {"Luo-Yihong/TDM_sd3_lora": "anything.safetensors", "Luo-Yihong/TDM_CogVideoX-2B_LoRA": "lora.bin"}
TDM = [name for name, preset in PRESETS.items() if "sampler" not in preset.recipe]  # others: test_other_students.py
SMALL = {"height": 16, "width": 16}  # what the tiny bases can draw
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def write_released(folder: Path, preset: Preset) -> Path:
    """A random file as the preset's authors released it, for the tiny base."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (preset.file or NAMES[preset.repository])
    pipe = tiny.build(preset.family)
    component = family_of_name(preset.family).denoiser
    if preset.positional is not None:
        config = LoraConfig(r=preset.positional.rank, target_modules=list(preset.positional.targets))
        model = get_peft_model(getattr(pipe, component), config)
        generator = torch.Generator().manual_seed(0)
        shapes = [p.shape for p in model.parameters() if p.requires_grad]
        tensors = [torch.randn(shape, generator=generator) * 0.05 for shape in shapes]
        torch.save({"decay": 0.999, "ema_parameters": tensors}, file)
        return file
    names = {n: layers for n, layers in diffusers_names(getattr(pipe, component), "").items() if n.endswith(LAYERS)}
    loras = updates(pipe, component, names)
    kohya = preset.family == "sd15"
    state: dict[str, Tensor] = {}
    for update in loras:
        stem = f"lora_unet_{update.name.replace('.', '_')}" if kohya else f"{component}.{update.name}"
        state[f"{stem}.lora_{'down' if kohya else 'A'}.weight"] = update.A
        state[f"{stem}.lora_{'up' if kohya else 'B'}.weight"] = update.B
    if file.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def in_cache(cache: Path, repository: str) -> Path:
    """The folder where the hub's cache has a repository."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    return snapshot


@pytest.mark.parametrize("repository", TDM)
def test_a_preset_is_a_complete_recipe_of_its_base(repository: str, bases: Callable[[str], Path]) -> None:
    preset = PRESETS[repository]
    recipe = StudentRecipe.from_fields(preset.fields)
    assert recipe.base_model == preset.base
    assert recipe.default_steps == 4
    assert recipe.prediction_type == recipe_for(preset.family, bases(preset.family)).prediction_type


@pytest.mark.parametrize("repository", TDM)
def test_the_id_alone_resolves_everything_through_the_cache_or_a_folder(
    repository: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    preset = PRESETS[repository]
    write_released(in_cache(tmp_path, repository), preset)
    base = in_cache(tmp_path, preset.base)
    shutil.copytree(bases(preset.family), base, dirs_exist_ok=True)
    file = write_released(tmp_path / repository, preset)
    hub: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True, "recipe": SMALL}
    pipe = load(repository, **hub)
    assert pipe.recipe.base_model == preset.base
    assert pipe.recipe.trained_timesteps == {4: [float(t) for t in preset.recipe["trained_timesteps"][4]]}
    call = {"num_frames": 9} if preset.family == "cogvideox" else {}
    actual = short_call(pipe, preset.family, **call)
    assert pipe.scheduler.timesteps.tolist() == pytest.approx(preset.recipe["trained_timesteps"][4])
    for source in (tmp_path / repository, file):
        assert torch.equal(short_call(load(source, **hub), preset.family, **call), actual)
    for student in (repository, file):
        other = load(bases(preset.family), student=student, **hub)
        assert torch.equal(short_call(other, preset.family, **call), actual)


def test_the_scale_of_a_preset_is_folded_in_once(bases: Callable[[str], Path], tmp_path: Path) -> None:
    preset = PRESETS["Luo-Yihong/TDM_sd3_lora"]
    file = write_released(tmp_path / preset.repository, preset)
    pipe = load(bases("sd3"), student=file.parent, recipe=SMALL)
    scaled = {k: t * (0.125 if "_B" in k else 1) for k, t in read_lora_file(file).tensors.items()}
    torch.save(scaled, tmp_path / "scaled.pt")
    by_hand = load(bases("sd3"), student=tmp_path / "scaled.pt", recipe=preset.fields | SMALL)
    assert torch.equal(short_call(pipe, "sd3"), short_call(by_hand, "sd3"))
    with pipe.teacher():
        assert pipe.scheduler.config.shift == plain(bases("sd3")).scheduler.config.shift

    # A file with a recipe of its own, in the same folder, is not scaled again.
    recipe = StudentRecipe.from_fields(preset.fields | SMALL)
    save_student(file.parent / "student.safetensors", Student.from_state_dict(recipe, scaled))
    reloaded = load(bases("sd3"), student=file.parent)
    assert torch.equal(short_call(reloaded, "sd3"), short_call(pipe, "sd3"))


def test_what_a_released_repository_lacks_or_has_too_much_of_is_said(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    repository = "Luo-Yihong/TDM_sd3_lora"
    folder = tmp_path / repository
    folder.mkdir(parents=True)
    with pytest.raises(TDMError, match="has no LoRA file"):
        load(bases("sd3"), student=folder)
    for name in ("a.safetensors", "b.ckpt"):
        (folder / name).touch()
    with pytest.raises(TDMError, match=r"several files .* pass one of them: a.safetensors, b.ckpt"):
        load(folder)
    with pytest.raises(TDMError, match=r"TDM_sd3_lora is not in the local cache"):
        load(repository, cache_dir=tmp_path / "empty", local_files_only=True)


def test_a_list_that_does_not_fit_its_preset_is_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_released(tmp_path, PRESETS["Luo-Yihong/TDM_sd3-5_lora"])
    assert preset_of(file) is PRESETS["Luo-Yihong/TDM_sd3-5_lora"]
    with pytest.raises(TDMError, match=r"trained for family 'sd3', but the base .* has 'flux'"):
        load(bases("flux"), student=file)
    torch.save({"decay": 0.9, "ema_parameters": [torch.zeros(32, 16)] * 3}, file)
    with pytest.raises(TDMError, match=r"the list has 3 tensors, but 15 layers .* need 30"):
        load(bases("sd3"), student=file)


@pytest.mark.parametrize(("repository", "shift"), [("Luo-Yihong/TDM_sd3_lora", 6), ("Luo-Yihong/TDM_sd3-5_lora", 3)])
def test_flow_grids_are_those_of_the_stated_sampler(repository: str, shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(4)
    sigmas = 1000 * scheduler.sigmas[:4].double()
    assert PRESETS[repository].recipe["trained_timesteps"][4] == pytest.approx(sigmas.tolist(), abs=1e-3)


def test_the_grid_of_the_r1_student_is_that_of_its_base() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.sigma_min = 0.0  # as the stock pipeline sets it
    scheduler.set_timesteps(5)
    grid = PRESETS["Luo-Yihong/TDM-R1"].recipe["trained_timesteps"][4]
    assert scheduler.timesteps.tolist() == pytest.approx([*grid, 0.0])
