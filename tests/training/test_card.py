"""The model card next to an exported student: facts of the run, and lines that can be copied and run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tdm import TDMPipeline, TDMScheduler
from tdm.cli import main
from tdm.tests.pipelines.students import load
from tdm.training.card import model_card
from tdm.training.export import FinishedRun, export_student
from tdm.training.run import Run
from tdm.training.settings import load_config

from .base_tasks import trained

BLOCKS = {"sd15": 2, "sd3": 2, "pixart": 1, "wan": 2}  # of Python in a family's card


def changed(run: FinishedRun, **changes: Any) -> FinishedRun:
    """Return the run with these fields of its recipe changed."""
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **changes))


def test_the_card_tells_the_facts_of_the_run(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = trained(runs("sd15"))
    text = model_card(run, "student.safetensors", "student")
    assert "load with it" not in text
    notes = run.recipe.notes | {"load_beside": "style.safetensors@0.8"}
    with_lora = changed(run, notes=notes)
    assert "| load with it | style.safetensors@0.8 |" in model_card(with_lora, "student.safetensors", "student")
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
    reread = load_config(tmp_path / "again.yaml")
    assert dataclasses.replace(reread, task=run.config.task) == run.config


def test_the_card_knows_the_base_and_its_licence(runs: Callable[[str], Run], tmp_path: Path) -> None:
    run = trained(runs("sd15"))

    def front(**changes: str) -> dict[str, object]:
        return ModelCard(model_card(changed(run, **changes), "x", "merged")).data.to_dict()

    metadata = front(base_model="somebody/some-model")
    assert metadata["base_model"] == "somebody/some-model"
    assert metadata["base_model_relation"] == "finetune"
    assert "lora" not in metadata["tags"]  # type: ignore[operator]
    assert front(base_model="bundled")["license"] == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: openrail\nlicense_link: LICENSE.md\n---\n")
    metadata = front(base_model=str(tmp_path))
    assert (metadata["license"], metadata["license_name"], metadata["license_link"]) == (
        "other",
        "openrail",
        "LICENSE.md",
    )
    (tmp_path / "README.md").write_text("A model.")
    assert front(base_model=str(tmp_path))["license"] == "other"


@pytest.mark.parametrize(
    ("family", "fresh", "blocks"),
    [
        ("sd15", False, 2),
        ("sd3", False, 2),
        ("pixart", False, 1),
        ("wan", False, 2),
        ("sd15", True, 2),
        ("sd3", True, 1),
    ],
)
def test_the_python_of_the_card_runs_as_written(
    family: str,
    fresh: bool,
    blocks: int,
    runs: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SD3 with fresh noise has one block less: its stock pipeline has no generator for that noise."""
    run = changed(trained(runs(family)), stochastic_sampling=fresh)
    export_student(run, tmp_path / "student.safetensors")
    base = Path(run.recipe.base_model)
    text = model_card(run, "student.safetensors", "student").replace(f"path/to/{base.name}", str(base))
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == blocks
    monkeypatch.chdir(tmp_path)
    drawn = []
    for block in programs:
        names: dict[str, object] = {}
        seeded = block.replace('"a prompt"', '"a red cube", generator=__import__("torch").Generator().manual_seed(0)')
        exec(seeded, names)
        assert isinstance(names["pipe"].scheduler, TDMScheduler)  # type: ignore[attr-defined]
        drawn.append(names["result"])
    assert isinstance(drawn[0], type(drawn[-1]))
    if family == "sd15":
        assert drawn[0].tobytes() == drawn[1].tobytes()  # type: ignore[attr-defined]
        assert isinstance(TDMPipeline.from_pretrained(base, student="student.safetensors"), TDMPipeline)


def test_comfyui_is_told_the_trained_noise_levels_only_where_they_are_right(
    runs: Callable[[str], Run], tmp_path: Path
) -> None:
    def levels(family: str, **changes: object) -> list[float] | None:
        run = changed(trained(runs(family)), **changes)
        match = re.search(r"`ManualSigmas`\n\n    (.*)\n", model_card(run, "s.safetensors", "student"))
        return [float(text) for text in match[1].split(", ")] if match else None

    pipe = load(
        Path(trained(runs("sd15")).recipe.base_model),
        student=export_student(trained(runs("sd15")), tmp_path / "s.safetensors"),
    )
    pipe.scheduler.set_timesteps(4)
    assert levels("sd15") == pytest.approx(pipe.scheduler.sigmas.tolist(), rel=1e-5)
    assert levels("sd15")[0] == pytest.approx(14.6146, rel=1e-5)  # type: ignore[index]  # where ComfyUI's own begin
    assert levels("sd3") == levels("flux") == [1, 0.75, 0.5, 0.25, 0]
    assert levels("sd15", trained_timesteps={4: [899, 674, 449, 224]}) is None  # starts lower: another first noise
    assert levels("wan") is None  # ComfyUI does not load these names
    assert levels("sd3", stochastic_sampling=True) == [1, 0.75, 0.5, 0.25, 0]
    run = trained(runs("sd3"))
    for card, sampler in ((run, "euler"), (changed(run, stochastic_sampling=True), "lcm")):
        assert f"`KSamplerSelect` {sampler}," in model_card(card, "s.safetensors", "student")


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
