"""What comes out of a run: the student as a file, under kohya's names or merged into its base, and the model card."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from tdm import TDMPipeline, TDMScheduler
from tdm.cli import main
from tdm.pipelines.describe import describe
from tdm.pipelines.loras.file import read_lora_file
from tdm.pipelines.loras.places import flat, place
from tdm.pipelines.loras.skeleton import skeletons
from tdm.pipelines.student import read_student
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.students import error, load, plain, short_call
from tdm.training.card import model_card
from tdm.training.config import load_config
from tdm.training.export import Trained, export_student, read_run
from tdm.training.loop import distill
from tdm.training.run import Run
from tdm.training.tasks import build_task
from tdm.training.tasks.pipeline import PipelineTask

PROMPTS = ["a red cube", "two stars above a tree", "a cat"]
SETTINGS = [
    "updates=2",
    "batch_size=2",
    "precision=fp32",
    "trajectory.shift=1",  # of the bundled configuration it is 2, which is for flow models
    "student.rank=2",
    "student.alpha=3",
    "student.lr=0.02",
    "critic.lr=0.02",
    "ema.decay=0.5",
    "objective.guidance_scale=2.0",
    "output.teacher_steps=2",
]

Settings = Callable[[str], list[str]]


@pytest.fixture(scope="session")
def settings(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The settings of a run of two updates on a tiny base."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def of(family: str) -> list[str]:
        call = tiny.call_kwargs(family)
        frames = [f"task.num_frames={call['num_frames']}"] if "num_frames" in call else []
        size = [f"task.height={call['height']}", f"task.width={call['width']}", *frames]
        return [*SETTINGS, "task.name=pipeline", f"task.model={bases(family)}", f"task.prompts={prompts}", *size]

    return of


@pytest.fixture(scope="module")
def runs(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A finished run on a tiny base, made once. Nothing but the run itself is in its folder."""
    made: dict[str, Run] = {}

    def of(family: str) -> Run:
        if family not in made:
            config = load_config(None, settings(family))
            folder = tmp_path_factory.mktemp("runs") / family
            made[family] = distill(build_task(config.task, config.memory, "cpu"), config, folder, report=lambda _: None)
        return made[family]

    return of


def trained(run: Run) -> Trained:
    found = read_run(run.out_dir)
    assert found is not None
    return found


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
    kind, networks = skeletons(run.recipe.base_model)
    expected = flat(place(read_lora_file(file), kind, networks))
    found = flat(place(read, kind, networks))
    assert found.keys() == expected.keys()
    for layer, lora in found.items():
        assert torch.equal(lora.A, expected[layer].A)
        assert torch.equal(lora.B, expected[layer].B)

    assert read_student(kohya)[0] == run.recipe
    assert "all of its LoRA layers" in describe(kohya)
    assert torch.equal(short_call(load(kohya), family), short_call(load(file), family))


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
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


# ---------------------------------------------------------------------- the command


def test_distill_ends_with_what_export_writes(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["distill", *settings("sd15"), "--out", str(folder)]) == 0
    student, card = (folder / name for name in ("student.safetensors", "README.md"))
    written, text = student.read_bytes(), card.read_text()
    said = capsys.readouterr().out
    assert f"student  {student}" in said
    assert f"card     {card}" in said

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
    found = read_run(folder, "best")
    assert found is not None
    assert found.recipe.notes["weights"] == "the best by accuracy, 0.75"
    assert found.recipe.notes["training"].startswith("1 updates of 2 prompts")
    a, b = (read_student(export_student(r, tmp_path / f"{i}.safetensors"))[1] for i, r in enumerate((found, mean)))
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


def test_a_base_that_is_gone_is_named(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.build("sd15").save_pretrained(tmp_path / "base")
    options = [*settings("sd15"), f"task.model={tmp_path / 'base'}", "updates=1"]
    assert main(["distill", *options, "--out", str(tmp_path / "run")]) == 0
    shutil.rmtree(tmp_path / "base")
    assert main(["export", str(tmp_path / "run"), "--format", "kohya"]) == 0  # needs none
    capsys.readouterr()
    assert str(tmp_path / "base") in refused(["export", str(tmp_path / "run"), "--format", "merged"], capsys)
    assert not (tmp_path / "run" / "merged").exists()


# ---------------------------------------------------------------------- the card


def test_the_card_tells_the_facts_of_the_run(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = trained(runs("sd15"))
    text = model_card(run, "student.safetensors", "student")
    assert "load beside" not in text
    notes = run.recipe.notes | {"load_beside": "style.safetensors@0.8"}
    beside = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, notes=notes))
    assert "| load beside it | style.safetensors@0.8 |" in model_card(beside, "student.safetensors", "student")
    for fact in (
        "| updates | 2 |",
        "| samples per update | 2 |",
        "| prompts | 3 prompts of prompts.txt |",
        "| teacher guidance | 2 |",
        "| student | LoRA, rank 2, alpha 3; AdamW, learning rate 0.02 |",
        "| timesteps, 4 steps | 999, 749, 499, 249 |",
        "| size | 16 x 16 |",
        "previews/000002.png",
        "arXiv:2503.06674",
        "check the base's licence",
    ):
        assert fact in text
    assert "## Measures" not in text  # this task has none
    assert "curves.png" not in text  # nobody plotted them
    assert str(run.folder.parent) not in text
    assert str(Path(run.recipe.base_model).parent) not in text  # no paths of this machine

    front = ModelCard(text).data
    assert (front.license, front.library_name, front.base_model) == ("other", "diffusers", None)
    assert front.tags == ["tdm", "few-step", "lora"]
    assert front.pipeline_tag == "text-to-image"
    settings = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert settings is not None
    (tmp_path / "again.yaml").write_text(settings[1])
    again = load_config(tmp_path / "again.yaml")
    assert dataclasses.replace(again, task=run.config.task) == run.config


def test_the_card_knows_the_base_and_its_licence(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = trained(runs("sd15"))

    def front(**changes: str) -> dict[str, object]:
        recipe = dataclasses.replace(run.recipe, **changes)  # type: ignore[arg-type]
        return ModelCard(model_card(dataclasses.replace(run, recipe=recipe), "x", "merged")).data.to_dict()

    found = front(base_model="somebody/some-model")
    assert found["base_model"] == "somebody/some-model"
    assert found["base_model_relation"] == "finetune"
    assert "lora" not in found["tags"]  # type: ignore[operator]
    assert front(base_model="bundled")["license"] == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: openrail\nlicense_link: LICENSE.md\n---\n")
    found = front(base_model=str(tmp_path))
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "openrail", "LICENSE.md")
    (tmp_path / "README.md").write_text("A model.")
    assert front(base_model=str(tmp_path))["license"] == "other"


@pytest.mark.parametrize(("family", "blocks"), [("sd15", 2), ("sd3", 2), ("pixart", 1), ("wan", 2)])
def test_the_python_of_the_card_runs_as_written(
    family: str, blocks: int, runs: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(runs(family))
    export_student(run, tmp_path / "student.safetensors")
    base = Path(run.recipe.base_model)
    text = model_card(run, "student.safetensors", "student").replace(f"path/to/{base.name}", str(base))
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == blocks
    monkeypatch.chdir(tmp_path)
    drawn = []
    for block in found:
        names: dict[str, object] = {}
        seeded = block.replace('"a prompt"', '"a red cube", generator=__import__("torch").Generator().manual_seed(0)')
        exec(seeded, names)
        assert isinstance(names["pipe"].scheduler, TDMScheduler)  # type: ignore[attr-defined]
        drawn.append(names["result"])
    assert isinstance(drawn[0], type(drawn[-1]))
    if family == "sd15":
        assert drawn[0].tobytes() == drawn[1].tobytes()  # type: ignore[attr-defined]
        assert isinstance(TDMPipeline.from_pretrained(base, student="student.safetensors"), TDMPipeline)


def test_comfyui_is_told_the_trained_noise_levels_only_where_they_are_right(runs: Callable[[str], Run]) -> None:
    def levels(family: str, **changes: object) -> list[float] | None:
        run = trained(runs(family))
        run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **changes))  # type: ignore[arg-type]
        found = re.search(r"`ManualSigmas`\n\n    (.*)\n", model_card(run, "s.safetensors", "student"))
        return [float(text) for text in found[1].split(", ")] if found else None

    pipe = load(Path(trained(runs("sd15")).recipe.base_model), student=_file(runs("sd15")))
    pipe.scheduler.set_timesteps(4)
    assert levels("sd15") == pytest.approx(pipe.scheduler.sigmas.tolist(), rel=1e-5)
    assert levels("sd15")[0] == pytest.approx(14.6146, rel=1e-5)  # type: ignore[index]  # where ComfyUI's own begin
    assert levels("sd3") == levels("flux") == [1, 0.75, 0.5, 0.25, 0]
    assert levels("sd15", trained_timesteps={4: [899, 674, 449, 224]}) is None  # starts lower: another first noise
    assert levels("wan") is None  # ComfyUI does not load these names


def _file(run: Run) -> Path:
    return export_student(trained(run), run.out_dir.parent / "s.safetensors", force=True)


def test_curves_and_measures_are_those_of_the_run(runs: Callable[[str], Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs("sd15").out_dir, folder)
    lines = [
        {"step": 1, "eval/accuracy": 0.25},
        {"step": 2, "eval/accuracy": 0.5, "eval/frechet": 2},
        {"step": 2, "student_loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "curves.png").write_bytes(b"curves")
    assert main(["export", str(folder), "--out", str(tmp_path / "out" / "student.safetensors")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "After 2 updates" in text
    assert "| accuracy | 0.5 |" in text
    assert re.search(r"\| frechet \(.*not FID\) \| 2 \|", text)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / "out" / picture).read_bytes() == (folder / picture).read_bytes()
    assert (tmp_path / "out" / "curves.png").read_bytes() == b"curves"


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
        recipe, tensors = read_student(path)
        assert recipe is not None
        assert recipe.notes["training"] == trained.recipe.notes["training"]
        halves = [{k.partition(".lora_")[0]: v for k, v in tensors.items() if f"lora_{half}" in k} for half in "AB"]
        products.append({layer: halves[1][layer].flatten(1) @ halves[0][layer].flatten(1) for layer in halves[0]})
    for layer, product in products[1].items():
        assert torch.allclose(products[0][layer], product, rtol=1e-4, atol=1e-6 * float(product.abs().max()))
    assert "no checkpoint" in refused(["average", str(folder / "none.pt"), str(file), "--out", "x.safetensors"], capsys)
