"""Several sizes in one run, LoRAs that become the teacher, and a VAE that is there only when pixels are wanted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from tdm import TDMPipeline
from tdm.cli import main
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.pipelines.students.file import read_student
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.lora_files import LAYOUTS, Update, diffusers_names, merge, tensors_of, updates, write
from tdm.training.export import export, export_student, read_run
from tdm.training.from_plain import from_dict
from tdm.training.loop import distill
from tdm.training.settings import load_config
from tdm.training.studies.runs import untrained
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.tasks.pipeline_settings import PipelineTaskConfig
from torch import Tensor

from .base_tasks import task_of

PROMPTS = ["a red cube", "a cat"]  # as many as latents
WITH_TEXT = ("sd15", "sdxl", "sd3", "flux")  # families whose stock loader takes LoRAs for text encoders
FAST = ["updates=4", "batch_size=2", "student.rank=2", "critic.rank=2", "output.preview_every=0"]


NO_SIZE: dict[str, Any] = {"height": None, "width": None, "num_frames": None}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("sdxl", ((16, 16), (16, 32), (32, 16))), ("wan", ((16, 16, 9), (32, 16, 5))), ("zimage", ((16, 16), (16, 32)))],
)
def test_each_update_draws_one_size_for_its_whole_batch(
    family: str, sizes: tuple[tuple[int, ...], ...], bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    task = task_of(family, bases(family), prompts, **NO_SIZE, sizes=sizes)
    call_shapes: list[tuple[int, ...]] = []

    class Watching(PipelineTask):
        def call(self, base: Any, x: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
            call_shapes.append(tuple(x.shape[1:]))
            if "sizes" in cond:  # SDXL's network is told the size of the picture
                assert cond["sizes"][:, :2].tolist() == [[2 * x.shape[2], 2 * x.shape[3]]] * len(x)
            return super().call(base, x, timesteps, cond)

    task.__class__ = Watching
    distill(task, load_config(None, [*FAST, "updates=8"]), tmp_path / "run", report=lambda _: None)
    shapes = [task.family.latent_shape(task.pipe, size) for size in task.sizes]
    assert len(set(shapes)) == len(sizes)
    assert set(call_shapes) == set(shapes)
    assert call_shapes[0] == task.conditions(1, torch.Generator().manual_seed(0))[1] or len(set(call_shapes)) > 1

    finished = read_run(tmp_path / "run")
    assert finished is not None
    file = export_student(finished, tmp_path / "student.safetensors")
    recipe = read_student(file).recipe
    assert recipe is not None
    assert (recipe.height, recipe.width, recipe.num_frames) == (*sizes[0], None)[:3]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sizes": ((16, 16), (16, 17))}, "16x17 does not fit sd15: use multiples of 8 pixels"),
        ({"sizes": ((16,),)}, r"is \[height, width\] or \[height, width, num_frames\], not \(16,\)"),
        ({"sizes": ((16, 16, 9),)}, "makes pictures"),
        ({"sizes": ()}, "not both"),
        ({"sizes": ((16, 16),), "height": 16}, "not both"),
        ({"height": 0}, "0x16 does not fit sd15: use multiples of 8 pixels"),
        ({"sizes": ((16, 0),)}, "16x0 does not fit sd15"),
        ({"width": -8}, "16x-8 does not fit sd15"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    changes: dict[str, Any], line: str, bases: Callable[[str], Path], prompts: str
) -> None:
    with pytest.raises(TDMError, match=line):
        task_of("sd15", bases("sd15"), prompts, **{**NO_SIZE, **changes})


def test_a_size_beyond_a_table_of_positions_is_one_line(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = task_of("sd3", bases("sd3"), prompts)
    most = fits.pipe.transformer.config.pos_embed_max_size * fits.family.patch_pixels(fits.pipe)
    with pytest.raises(TDMError, match=f"256x256 is more than this base has positions for: at most {most} pixels"):
        task_of("sd3", bases("sd3"), prompts, height=256, width=256)
    assert task_of("sd3", bases("sd3"), prompts, height=most, width=most).size[:2] == (most, most)
    out, student = tmp_path / "run", tmp_path / "run" / "student.safetensors"
    options = [f"task.model={bases('sd3')}", f"task.prompts={prompts}", "task.height=16", "task.width=16", *FAST]
    assert main(["distill", *options, "updates=1", "output.preview_every=0", "--out", str(out)]) == 0
    capsys.readouterr()
    argv = ["generate", "a cat", "--student", str(student), "--size", "256", "--any-size", "--out", str(out / "x.png")]
    assert "this model refuses the call: Height (" in refused(argv, capsys)

    config = json.loads((bases("cogvideox") / "transformer" / "config.json").read_text())
    config["use_learned_positional_embeddings"] = True
    pipe = SimpleNamespace(transformer=SimpleNamespace(config=FrozenDict(config)), vae_scale_factor_spatial=8)
    family = family_of_name("cogvideox")
    family.check_size(pipe, family.default_size(pipe))
    default = family.default_size(pipe)
    with pytest.raises(TDMError, match=f"learned for {default.height}x{default.width} alone"):
        family.check_size(pipe, default._replace(height=2 * default.height))


def test_sizes_and_loras_are_read_from_a_configuration() -> None:
    section = {"sizes": [[512, 768], [768, 512]], "loras": ["a.safetensors@0.5"]}
    read = from_dict(PipelineTaskConfig, section, "task.")
    assert (read.sizes, read.loras) == (((512, 768), (768, 512)), ("a.safetensors@0.5",))
    with pytest.raises(TDMError, match=r"task.loras must be a list of texts, not 'a'"):
        from_dict(PipelineTaskConfig, {"loras": "a"}, "task.")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_vae_is_loaded_for_pixels_alone(family: str, bases: Callable[[str], Path], prompts: str) -> None:
    task = task_of(family, bases(family), prompts)
    whole = task.family.pipeline_class().from_pretrained(bases(family))
    latents = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    assert task.pipe.vae is None
    assert task._vae is None
    assert task.latent_shape == whole_shape(task, whole)
    with torch.no_grad():
        pixels = task.family.decode(whole, latents, task.size)
    expected = pixels[:, pixels.shape[1] // 2] if task.family.video else pixels
    assert int((task.decode(latents).int() - expected.int()).abs().max()) <= 1  # one by one: other rounding
    assert task.pipe.vae is None
    for way in ("tiling", "slicing"):
        assert getattr(task._vae, f"use_{way}", True)


def whole_shape(task: PipelineTask, whole: Any) -> tuple[int, ...]:
    return task.family.latent_shape(whole, task.size)


def random_lora(family: str, *, text: bool) -> list[Update]:
    """A LoRA for the denoiser, and for the text encoders that take one."""
    pipe, components = tiny.build(family), [family_of_name(family).denoiser]
    if text:
        components += [name for name in pipe._lora_loadable_modules if name.startswith("text_encoder")]
    ends = ("to_q", "to_v", "to_out.0", "q_proj", "v_proj", "conv1")
    lora = []
    for i, name in enumerate(components):
        names = {n: layers for n, layers in diffusers_names(getattr(pipe, name), family).items() if n.endswith(ends)}
        lora += updates(pipe, name, names, seed=i)
    return lora


@torch.no_grad()
def whole_prediction(pipe: Any, task: PipelineTask, x: Tensor) -> Tensor:
    cond = task.family.encode(pipe, PROMPTS, task.size)
    return task.family.denoise(getattr(pipe, task.family.denoiser), x, torch.tensor([800.0, 300.0]), cond)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_teacher_with_a_lora_in_it_is_the_pipeline_with_that_lora_loaded(
    family: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    lora = random_lora(family, text=family in WITH_TEXT)
    file = write(tmp_path / "style.safetensors", tensors_of(LAYOUTS["diffusers"], lora))
    task = task_of(family, bases(family), prompts, loras=(f"{file}@0.7",))
    whole = task.family.pipeline_class().from_pretrained(bases(family))
    x = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    plain = whole_prediction(whole, task, x)
    whole.load_lora_weights(str(file), adapter_name="style")
    whole.set_adapters("style", 0.7)
    expected = whole_prediction(whole, task, x)
    with torch.no_grad():
        actual = task.call(task.base, x, torch.tensor([800.0, 300.0]), task.encode(PROMPTS))
    assert error(actual, expected) < 1e-5
    assert error(plain, expected) > 1e-3
    assert task.merged_loras == ["style.safetensors@0.7"]


def test_loras_of_other_layouts_add_up_and_are_named_in_the_student(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    lora = random_lora("sd15", text=True)
    files = [
        write(tmp_path / f"{i}.safetensors", tensors_of(LAYOUTS[name], lora)) for i, name in enumerate(("kohya",) * 2)
    ]
    task = task_of("sd15", bases("sd15"), prompts, loras=(str(files[0]), f"{files[1]}@-0.4"))
    whole = task.family.pipeline_class().from_pretrained(bases("sd15"))
    merge(whole, lora, 0.6 * 1.5)  # alpha 3, rank 2
    x = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction = task.call(task.base, x, torch.tensor([800.0, 300.0]), task.encode(PROMPTS))
    assert error(prediction, whole_prediction(whole, task, x)) < 1e-5
    config = load_config(None, [*FAST, "updates=1", f"task.loras=[{files[0]}, {files[1]}@-0.4]"])
    run = distill(task, config, tmp_path / "run", report=lambda _: None)
    finished = read_run(tmp_path / "run")
    assert finished is not None
    file = export_student(finished, tmp_path / "student.safetensors")
    recipe = read_student(file).recipe
    assert recipe is not None
    assert recipe.notes["load_beside"] == "0.safetensors@1, 1.safetensors@-0.4"

    folder = export(finished, "merged", tmp_path / "merged")
    merged = TDMPipeline.from_pretrained(folder)
    noise = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    merged.set_progress_bar_config(disable=True)
    sampled = merged(prompt=list(PROMPTS), latents=noise, output_type="latent")[0]
    assert error(sampled, run.student(noise, task.encode(PROMPTS))) < 1e-4


def test_loras_that_are_not_there_or_do_not_fit_are_refused(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    other = write(tmp_path / "o.safetensors", tensors_of(LAYOUTS["diffusers"], random_lora("pixart", text=False)))
    tensors = tensors_of(LAYOUTS["diffusers"], random_lora("sd15", text=False))
    biases = write(tmp_path / "biases.safetensors", tensors | {"diffusion_model.conv_in.diff_b": torch.ones(8)})
    for lora, line in (
        (f"{other}", "task.loras: .*o.safetensors: .* do not"),
        (f"{tmp_path}/nothing.safetensors@0.5", "nothing.safetensors: no such file"),
        (f"{other}@strong", "neither a file nor path@strength"),
        (f"{biases}", "biases next to the LoRA, which is not supported; take these tensors out of the file$"),
    ):
        with pytest.raises(TDMError, match=line):
            task_of("sd15", bases("sd15"), prompts, loras=(lora,))


def test_the_bundled_world_knows_how_far_a_students_pictures_are_from_the_teachers(tmp_path: Path) -> None:
    changes = [f"task.cache={tmp_path}", "task.prompt_count=2", "output.teacher_steps=2"]

    def measured(prompts: int, blur: float) -> dict[str, float]:
        run = untrained(load_config(["bundled"], [*changes, f"task.evaluate={prompts}"]))

        def student(noise: Tensor, cond: Any) -> Tensor:
            return run.teacher(noise, cond) + blur * noise

        return run.task.evaluate(student if blur else run.teacher, run.teacher)

    exact, near, far = (measured(33, blur)["frechet"] for blur in (0.0, 0.1, 0.4))
    assert abs(exact) < 1e-6
    assert 0.01 < near < far / 4
    few = measured(32, 0.0)
    assert "frechet" not in few  # too few for a covariance
    assert few["sharpness"] == pytest.approx(1)
