"""What comes out of a run: the student as a file, under kohya's names, or merged into its base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tdm import TDMScheduler
from tdm.cli import main
from tdm.pipelines.bases import networks_without_weights
from tdm.pipelines.loras.file import read_lora_file
from tdm.pipelines.loras.places import place
from tdm.pipelines.students.describe import describe
from tdm.pipelines.students.file import read_header, read_student
from tdm.pipelines.students.recipe import StudentRecipe
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.students import error, load, plain, short_call
from tdm.tests.processes import finish
from tdm.training.export import export_student, read_run
from tdm.training.loop import distill
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks import build_task
from tdm.training.tasks.pipeline import PipelineTask

from .base_tasks import trained


def sampled_in_training(run: Run) -> torch.Tensor:
    """What the run's student draws, outside of any pipeline."""
    task = run.task
    assert isinstance(task, PipelineTask)
    noise = torch.randn(1, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    return task.family.pack(run.student(noise, task.encode([tiny.PROMPT])))


def sampled_by(pipe: DiffusionPipeline, **call: object) -> torch.Tensor:
    """What a pipeline draws for the same prompt and noise."""
    out = pipe(prompt=tiny.PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **call)[0]
    return out if isinstance(out, torch.Tensor) else torch.stack(list(out))


# ---------------------------------------------------------------------- forms


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_kohya_names_are_the_same_student(family: str, runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = trained(runs(family))
    file = export_student(run, tmp_path / "student.safetensors")
    kohya = export_student(run, tmp_path / "kohya.safetensors", layout="kohya")

    read = read_lora_file(kohya)
    prefix = "lora_unet_" if family in ("sd15", "sdxl") else "lora_transformer_"
    assert all(key.startswith(prefix) for key in read.tensors)
    assert {float(read.tensors[key]) for key in read.tensors if key.endswith(".alpha")} == {2.0}  # the rank: scale 1
    kind, networks = networks_without_weights(run.recipe.base_model)
    (expected,), (actual,) = (place(f, kind, networks).values() for f in (read_lora_file(file), read))
    assert actual.keys() == expected.keys()
    for layer, lora in actual.items():
        assert torch.equal(lora.A, expected[layer].A)
        assert torch.equal(lora.B, expected[layer].B)

    assert StudentRecipe.from_metadata(read_header(kohya)) == run.recipe
    assert "all of its LoRA layers" in describe(kohya)
    assert torch.equal(short_call(load(kohya), family), short_call(load(file), family))


@pytest.mark.parametrize("family", ["sd15", "pixart"])
def test_kohya_names_that_comfyui_does_not_know_are_told_so(
    family: str, runs: Callable[[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = export_student(trained(runs(family)), tmp_path / "student.safetensors")
    for argv in (
        ["export", str(runs(family).out_dir), "--format", "kohya", "--out", str(tmp_path / "k.safetensors")],
        ["convert", str(file), "--layout", "kohya", "--out", str(tmp_path / "c.safetensors")],
    ):
        assert main(argv) == 0
        note = f"note: ComfyUI's own Load LoRA knows no kohya names of {family};"
        assert capsys.readouterr().out.count(note) == (family == "pixart")


def test_stock_diffusers_loads_kohya_names(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = trained(runs("sd15"))
    kohya = export_student(run, tmp_path / "kohya.safetensors", layout="kohya")
    stock = plain(Path(run.recipe.base_model))
    stock.load_lora_weights(str(kohya))
    stock.scheduler = TDMScheduler.from_config(stock.scheduler.config, trained_timesteps=run.recipe.trained_timesteps)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16}
    assert error(short_call(stock, "sd15", **call), short_call(load(kohya), "sd15")) < 1e-6


@pytest.mark.parametrize("family", ["sd15", "sd3", "pixart", "zimage", "wan"])
def test_a_merged_pipeline_samples_as_it_was_trained(
    family: str, runs: Callable[[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs(family)
    assert main(["export", str(run.out_dir), "--format", "merged", "--out", str(tmp_path / "merged")]) == 0
    assert f"merged   {tmp_path / 'merged'}" in capsys.readouterr().out
    expected = sampled_in_training(run)
    assert error(sampled_by(load(tmp_path / "merged")), expected) < 1e-4

    stock = plain(tmp_path / "merged")
    assert isinstance(run.task, PipelineTask)
    size = {name: value for name, value in run.task.size._asdict().items() if value is not None}
    call = {**run.task.family.call_defaults(stock), **run.task.family.guidance(1.0), **size}
    assert error(sampled_by(stock, num_inference_steps=4, **call), expected) < 1e-4


def test_a_merged_pipeline_keeps_the_dtype_that_is_asked_for(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = runs("sd3")
    out = tmp_path / "merged"
    assert main(["export", str(run.out_dir), "--format", "merged", "--dtype", "bf16", "--out", str(out)]) == 0
    stock = DiffusionPipeline.from_pretrained(out, dtype=torch.bfloat16)
    assert stock.transformer.dtype == torch.bfloat16
    sizes = [
        sum(f.stat().st_size for f in (folder / "transformer").glob("*.safetensors")) for folder in (out, base(run))
    ]
    assert sizes[0] < 0.7 * sizes[1]


def base(run: Run) -> Path:
    return Path(trained(run).recipe.base_model)


def test_whole_weights_come_out_as_a_pipeline(
    settings: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*settings("sd3"), "full_weights=true", "student.lr=1e-3", "critic.lr=1e-3"]
    config = load_config(None, options)
    run = distill(build_task(config.task, config.memory, "cpu"), config, tmp_path / "run", report=lambda _: None)
    assert "--format merged" in refused(["export", str(tmp_path / "run")], capsys)
    (tmp_path / "nothing_else.yaml").write_text("{}")
    argv = ["distill", str(tmp_path / "nothing_else.yaml"), *options, "--resume", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    assert f"student  {tmp_path / 'run' / 'merged'}" in capsys.readouterr().out
    assert error(sampled_by(load(tmp_path / "run" / "merged")), sampled_in_training(run)) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_weights_train_in_float32_on_a_base_of_16_bits(
    precision: str, settings: Callable[[str], list[str]], tmp_path: Path
) -> None:
    options = ["full_weights=true", "memory.base=bf16", f"precision={precision}", "student.lr=1e-3"]
    config = load_config(None, [*settings("sd3"), *options])
    run = distill(build_task(config.task, config.memory, "cpu"), config, tmp_path / "run", report=lambda _: None)
    assert {weight.dtype for weight in run.roles.parameters("student")} == {torch.float32}
    assert {weight.dtype for weight in run.task.base.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------- the command


def test_distill_ends_with_what_export_writes(
    settings: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["distill", *settings("sd15"), "--out", str(folder)]) == 0
    student, card = (folder / name for name in ("student.safetensors", "README.md"))
    written, text = student.read_bytes(), card.read_text()
    stdout = capsys.readouterr().out
    assert f"student  {student}" in stdout
    assert f"card     {card}" in stdout

    assert f"{student} exists" in refused(["export", str(folder)], capsys)
    card.write_text("mine")
    assert main(["export", str(folder), "--out", str(tmp_path / "copy.safetensors")]) == 0
    assert (tmp_path / "copy.safetensors").read_bytes() == written
    assert main(["export", str(folder), "--format", "kohya"]) == 0
    assert card.read_text() == "mine"  # a card that is there stays
    student.unlink()
    assert main(["export", str(folder), "--force"]) == 0
    assert student.read_bytes() == written
    assert card.read_text() == text
    assert not [path for path in folder.rglob("*") if "tmp" in path.name]


def test_a_full_disk_is_one_line_and_leaves_nothing(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs("sd15").out_dir, run)
    (run / "curves.png").write_bytes(b"x" * 5000)  # any file will do
    shutil.rmtree(run / "previews")
    student = export_student(trained(runs("sd15")), tmp_path / "student.safetensors")
    before, out = sorted(tmp_path.rglob("*")), tmp_path / "out"
    commands = {
        "student": ["export", str(run), "--out", str(out / "s.safetensors")],
        "kohya": ["export", str(run), "--format", "kohya", "--out", str(out / "k.safetensors")],
        "merged": ["export", str(run), "--format", "merged", "--out", str(out / "m")],
        "convert": ["convert", str(student), "--out", str(out / "c.safetensors")],
        "average": ["average", str(student), str(student), "--out", str(out / "a.safetensors")],
    }
    for name, argv in commands.items():
        stderr = tmp_path.parent / f"{tmp_path.name}-{name}.err"
        assert finish(argv, stderr, largest_file=2000) == 2, (name, stderr.read_text())
        line = stderr.read_text().strip().splitlines()[-1]
        assert line.startswith(f"tdm: cannot write {argv[-1]}: File too large; free some space"), line
        assert "Traceback" not in stderr.read_text()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]

    size = student.stat().st_size
    stderr = tmp_path.parent / f"{tmp_path.name}.err"
    (run / "curves.png").write_bytes(b"x" * 2 * size)
    assert finish(commands["student"], stderr, largest_file=size) == 2  # the card's picture is larger than the student
    assert f"cannot write {out / 'curves.png'}: File too large" in stderr.read_text()
    assert [path.name for path in out.iterdir()] == ["s.safetensors"]
    (out / "curves.png").touch()  # as an earlier tdm left it
    assert main([*commands["student"], "--force"]) == 0
    assert (out / "curves.png").read_bytes() == (run / "curves.png").read_bytes()
    (out / "README.md").unlink()
    (out / "curves.png").write_bytes(b"")
    assert main(commands["kohya"]) == 0
    assert (out / "curves.png").read_bytes() == (run / "curves.png").read_bytes()


def test_which_weights(runs: Callable[[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs("sd15").out_dir, folder)
    assert "no best.pt" in refused(["export", str(folder), "--which", "best"], capsys)

    mean, last = trained(runs("sd15")), read_run(folder, "last")
    assert last is not None
    state = runs("sd15").roles.state("student")
    assert all(torch.equal(last.weights[name], weight) for name, weight in state.items())
    assert any(not torch.equal(last.weights[name], weight) for name, weight in mean.weights.items())
    assert "not their mean" in last.recipe.notes["weights"]

    halved = {name: weight / 2 for name, weight in mean.weights.items()}
    best = {"format": 1, "step": 1, "measure": "accuracy", "value": 0.75, "weights": halved}
    torch.save(best, folder / "best.pt")
    assert main(["export", str(folder), "--which", "best"]) == 0
    best_run = read_run(folder, "best")
    assert best_run is not None
    assert best_run.recipe.notes["weights"] == "the best by accuracy, 0.75"
    assert best_run.recipe.notes["training"].startswith("1 updates of 2 prompts")
    a, b = (load_file(export_student(r, tmp_path / f"{i}.safetensors")) for i, r in enumerate((best_run, mean)))
    assert all(torch.equal(a[key] * 2, b[key]) for key in a)


def test_what_is_no_run_is_refused_and_nothing_is_written(
    runs: Callable[[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not the folder of a run" in refused(["export", str(tmp_path / "nothing")], capsys)
    assert "is not the folder of a run" in refused(["export", str(tmp_path)], capsys)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "checkpoint.pt").write_bytes((runs("sd15").out_dir / "checkpoint.pt").read_bytes()[:1000])
    assert "not a readable checkpoint" in refused(["export", str(tmp_path / "torn")], capsys)
    config = load_config(None, ["updates=1", "batch_size=4", "output.evaluate_every=0"])
    distill(build_task(config.task, config.memory, "cpu"), config, tmp_path / "mixture", report=lambda _: None)
    capsys.readouterr()
    assert "no student to export" in refused(["export", str(tmp_path / "mixture")], capsys)
    assert "did you mean" in refused(["export", str(tmp_path), "--formats", "kohya"], capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    into = ["export", str(runs("sd15").out_dir), "--format", "merged", "--out", str(tmp_path / "other")]
    assert "exists" in refused(into, capsys)
    assert "something else than a merged student" in refused([*into, "--force"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixture", "other", "torn"]
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_a_base_that_is_gone_is_named(
    settings: Callable[[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build("sd15").save_pretrained(tmp_path / "base")
    options = [*settings("sd15"), f"task.model={tmp_path / 'base'}", "updates=1"]
    assert main(["distill", *options, "--out", str(tmp_path / "run")]) == 0
    shutil.rmtree(tmp_path / "base")
    assert main(["export", str(tmp_path / "run"), "--format", "kohya"]) == 0  # needs none
    capsys.readouterr()
    assert str(tmp_path / "base") in refused(["export", str(tmp_path / "run"), "--format", "merged"], capsys)
    assert not (tmp_path / "run" / "merged").exists()


def test_runs_and_their_checkpoints_are_averaged_like_their_files(
    runs: Callable[[str], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs("sd15").out_dir
    trained = read_run(folder)
    assert trained is not None
    file = export_student(trained, tmp_path / "student.safetensors")
    older = shutil.copy(folder / "checkpoint.pt", folder / "checkpoint-000001.pt")
    sources = [str(folder), str(older), str(file)]
    assert main(["average", *sources, "--out", str(tmp_path / "mean.safetensors")]) == 0
    assert "100.00%" in capsys.readouterr().out
    products = []
    for path in (tmp_path / "mean.safetensors", file):
        recipe, tensors = read_student(path).recipe, load_file(path)
        assert recipe is not None
        assert recipe.notes["training"] == trained.recipe.notes["training"]
        halves = [{k.partition(".lora_")[0]: v for k, v in tensors.items() if f"lora_{half}" in k} for half in "AB"]
        products.append({layer: halves[1][layer].flatten(1) @ halves[0][layer].flatten(1) for layer in halves[0]})
    for layer, product in products[1].items():
        assert torch.allclose(products[0][layer], product, rtol=1e-4, atol=1e-6 * float(product.abs().max()))
    assert "no checkpoint" in refused(["average", str(folder / "none.pt"), str(file), "--out", "x.safetensors"], capsys)
