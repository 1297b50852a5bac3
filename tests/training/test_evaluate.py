"""`tdm eval`: what it measures and writes, of the bundled world and of any other base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tdm import TDMPipeline
from tdm.cli import main
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.pipelines.students.file import Student, save_student
from tdm.pipelines.students.recipe import StudentRecipe
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.students import lora_for, recipe_for
from tdm.training import evaluate as module
from tdm.training.eval_report import over_students, table, write
from tdm.training.evaluate import Plan, Prompts, Row, Variant, draw, evaluate, held_out_prompts, names_of
from tdm.training.measure import Measures, Reference
from tdm.training.metrics import power_spectrum
from tdm.training.metrics.bootstrap import Value
from torch import Tensor
from torch.nn import functional as F

PROMPTS = ["a red cube", "two stars above a tree", "a cat", "three green rings", "a dog"]
SHORT = ["--steps", "2", "--teacher-steps", "3"]


@pytest.fixture
def student(bases: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A student with random weights of the tiny PixArt, by its seed."""

    def make(seed: int, **changes: Any) -> Path:
        generator = torch.Generator().manual_seed(seed)
        layer = "transformer.transformer_blocks.0.attn1.to_q"
        lora = {
            f"{layer}.lora_{name}.weight": torch.randn(*shape, generator=generator)
            for name, shape in (("A", (2, 16)), ("B", (16, 2)))
        }
        fields = {
            "base_model": str(bases("pixart")), "family": "pixart", "prediction_type": "epsilon", "guidance_scale": 1.0,
            "trained_timesteps": {2: [900.0, 400.0]}, "height": 16, "width": 16, **changes,
        }  # fmt: skip
        folder = tmp_path / f"seed{seed}"
        folder.mkdir(exist_ok=True)
        save_student(folder / "student.safetensors", Student.from_state_dict(StudentRecipe(**fields), lora))
        return folder / "student.safetensors"

    return make


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "p.txt"


def read(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "eval.json").read_text())["rows"]


def numbers(row: dict[str, Any]) -> list[float]:
    """The values of all measures of a row."""
    kinds = row["measures"]
    return [value["value"] for kind in kinds.values() for value in kind.values()]


def test_a_base_of_ones_own_is_measured_but_for_accuracy_and_its_teacher_drawn_once(
    student: Callable[..., Path],
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, two = student(1), student(2)
    given = ["eval", "--prompts-file", str(prompts_file), *SHORT, "--teacher-guidance", "2"]
    assert main([*given, "--student", str(one), "--out", str(tmp_path / "a")]) == 0
    stdout = capsys.readouterr().out
    rows = read(tmp_path / "a")
    assert [row["name"] for row in rows] == [
        "teacher, 3 steps, guided", "teacher, 4 steps", "teacher, 4 steps of the student's", "student, 2 steps",
    ]  # fmt: skip
    assert [row["calls"] for row in rows] == [6, 4, 4, 2]
    assert not any(row["cached"] for row in rows)
    for row in rows:
        values = row["measures"]["values"]
        assert "accuracy" not in values
        assert row["seconds"] > 0
        assert values["diversity"]["low"] <= values["diversity"]["value"] <= values["diversity"]["high"]
        assert list(row["measures"]["spectrum"]) == ["2-4 px", "4-8 px", "8-16 px"]
    teacher = rows[0]["measures"]["values"]
    assert teacher["brightness"] == {"value": 1, "low": 1, "high": 1}
    assert teacher["sharpness"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    (of_student,) = re.findall(r"^\| student, 2 steps .* \| ([\d.]+) \|$", stdout, re.MULTILINE)
    assert float(of_student) == pytest.approx(rows[3]["measures"]["values"]["sharpness"]["value"], abs=5e-4)
    assert (teacher["diversity"]["value"], teacher["ode"]["value"]) == (1, 0)
    assert rows[3]["measures"]["values"]["ode"]["value"] > 0
    assert "| teacher, 3 steps, guided | 6 |" in stdout
    assert "†" not in stdout
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"eval.json", "eval.md", "eval.png", "grid.png"}
    assert Image.open(tmp_path / "a" / "eval.png").width > 1000

    # Both students against the same teacher, which is not drawn again.
    given += ["--student", str(one), str(two)]
    drawn: list[str] = []
    draw = module.draw

    def watching(pipe: Any, variant: Variant, *args: Any) -> Tensor:
        drawn.append(variant.name)
        return draw(pipe, variant, *args)

    monkeypatch.setattr(module, "draw", watching)
    assert main([*given, "--out", str(tmp_path / "b")]) == 0
    both = read(tmp_path / "b")
    assert [row["name"] for row in both[3:]] == ["seed1, 2 steps", "seed2, 2 steps", "mean of 2, 2 steps"]
    assert set(drawn) == {"seed1, 2 steps", "seed2, 2 steps"}
    assert [row["cached"] for row in both] == [True] * 3 + [False] * 3
    assert [(r["calls"], r["seconds"]) for r in both[:3]] == [(r["calls"], r["seconds"]) for r in rows[:3]]
    for repeated, first in zip(both[:4], rows[:4], strict=True):
        assert numbers(repeated) == pytest.approx(numbers(first), abs=1e-5)
    distances = [row["measures"]["values"]["distance"]["value"] for row in both[3:5]]
    assert distances[0] != distances[1]
    mean = both[5]["measures"]["values"]["distance"]
    assert mean == {"value": pytest.approx(sum(distances) / 2), "low": min(distances), "high": max(distances)}
    assert "†" in (tmp_path / "b" / "eval.md").read_text()

    # Another noise, another guidance, another grid of the student's: each is drawn.
    drawn.clear()
    assert main([*given, "--out", str(tmp_path / "c"), "--seed", "7"]) == 0
    assert len({name for name in drawn if name.startswith("teacher")}) == 3
    drawn.clear()
    assert main([*given, "--out", str(tmp_path / "c"), "--teacher-guidance", "3", "--force"]) == 0
    assert {name for name in drawn if name.startswith("teacher")} == {"teacher, 3 steps, guided"}
    drawn.clear()
    assert main([*given, "--out", str(tmp_path / "c"), "--solver-order", "2", "--force"]) == 0
    assert {name for name in drawn if name.startswith("teacher")} == {"teacher, 4 steps of the student's"}


def test_order_two_is_the_students_grid_with_another_sampler(
    student: Callable[..., Path], prompts_file: Path, tmp_path: Path
) -> None:
    file = student(1, trained_timesteps={4: [900.0, 700.0, 400.0, 200.0]})
    given = [
        "eval",
        "--prompts-file",
        str(prompts_file),
        "--student",
        str(file),
        "--steps",
        "4",
        "--teacher-steps",
        "2",
    ]
    for order in ("1", "2"):
        assert main([*given, "--solver-order", order, "--out", str(tmp_path / order)]) == 0
    one, two = (read(tmp_path / order)[3] for order in ("1", "2"))
    assert one["calls"] == two["calls"] == 4
    assert one["measures"] != two["measures"]


def test_each_strength_of_a_student_is_a_row_on_its_way_from_the_base(
    student: Callable[..., Path], prompts_file: Path, tmp_path: Path
) -> None:
    file = student(1, trained_timesteps={4: [900.0, 700.0, 400.0, 200.0]})
    given = [
        "eval",
        "--prompts-file",
        str(prompts_file),
        "--steps",
        "4",
        "--teacher-steps",
        "2",
        "--student",
        str(file),
    ]
    assert main([*given, "--strength", "1e-6", "0.5", "1", "--out", str(tmp_path / "strengths")]) == 0
    assert main([*given, "--out", str(tmp_path / "plain")]) == 0
    base, none, half, whole = rows = read(tmp_path / "strengths")[2:]
    plain = read(tmp_path / "plain")[3]
    assert [(row["name"], row["strength"]) for row in (*rows, plain)] == [
        ("teacher, 4 steps of the student's", None),
        ("student at 1e-06, 4 steps", 1e-6),
        ("student at 0.5, 4 steps", 0.5),
        ("student at 1, 4 steps", 1.0),
        ("student, 4 steps", None),
    ]
    near = {"rel": 1e-4, "abs": 1e-4}
    assert numbers(whole) == pytest.approx(numbers(plain), **near)
    assert numbers(none) == pytest.approx(numbers(base), **near)
    for one, other in ((none, half), (half, whole)):
        assert numbers(one) != pytest.approx(numbers(other), **near)


def test_the_first_step_by_the_base_is_a_row_more(
    student: Callable[..., Path], prompts_file: Path, tmp_path: Path
) -> None:
    grids = {1: [900.0], 2: [900.0, 500.0]}
    given = ["eval", "--prompts-file", str(prompts_file), "--steps", "1,2", "--teacher-steps", "2", "--base-first"]
    files = [str(student(seed, trained_timesteps=grids)) for seed in (1, 2)]
    assert main([*given, "--student", *files, "--out", str(tmp_path / "out")]) == 0
    rows = read(tmp_path / "out")[3:]
    plain = [f"{name}, {steps}" for name in ("seed1", "seed2") for steps in ("1 step", "2 steps")]
    named = {row["name"]: row for row in rows}
    by_base = {f"{name}, base first" for name in plain if name.endswith("2 steps")}
    means = {"mean of 2, 1 step", "mean of 2, 2 steps", "mean of 2, 2 steps, base first"}
    assert named.keys() == {*plain, *by_base, *means}
    assert named["seed1, 2 steps, base first"]["calls"] == 2
    assert named["seed1, 2 steps, base first"]["measures"] != named["seed1, 2 steps"]["measures"]


def test_base_first_draws_what_the_pipeline_draws_so() -> None:
    pipe = TDMPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    drawn = draw(pipe, Variant("", 4, None, "student", base_first=True), ["a red star on a beach"], [7])
    with pipe.base_first():
        call = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 4, "output_type": "pt"}
        picture = pipe("a red star on a beach", **call).images
    assert torch.equal(drawn, (picture * 255).round().to(torch.uint8))


def test_the_bundled_world_is_measured_by_attribute_and_combination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEEDS_PER_PROMPT", 2)
    pipe = TDMPipeline.from_pretrained()
    rows, sheet = evaluate(pipe, Prompts(*held_out_prompts(12)), Plan(student_steps=[4], teacher_steps=4))
    teacher, student = rows[0].measures, rows[3].measures
    assert list(student.attributes) == ["background", "count", "colour", "kind", "relation"]
    assert 3 < len(student.combinations) <= 7
    assert student.values["accuracy"].value > 0.6
    assert student.values["accuracy"].value <= min(v.value for v in student.attributes.values())
    assert student.values["accuracy"].low <= student.values["accuracy"].value
    assert 0 < student.values["ode"].value < 1  # nearer to the teacher's picture of this noise than others are
    assert teacher.values["ode"].value == 0
    assert rows[3].calls == 4
    assert sheet.width > sheet.height
    assert len(re.findall(r"\(-?\d\.\d{3}, \d\.\d{3}\)", table(rows).splitlines()[5])) == 2


def test_the_reference_against_itself_has_no_ratio_but_one() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, several, others = (
        torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        for shape in ((12, 3, 64, 64), (9, 4, 3, 64, 64), (9, 4, 3, 64, 64))
    )
    measures = Reference(pictures, several, others, None).measures(pictures, several)
    for name in ("diversity", "brightness", "contrast", "saturation", "sharpness"):
        assert measures.values[name] == pytest.approx((1, 1, 1))
    assert {name: v.value for name, v in measures.spectrum.items()} == pytest.approx(
        dict.fromkeys(measures.spectrum, 1.0)
    )
    assert measures.values["frechet"].low is None
    assert not measures.attributes
    blurred = F.avg_pool2d(pictures.float(), 3, 1, 1).byte()
    sharpness = Reference(pictures, several, others, None).measures(blurred, several).values["sharpness"]
    octaves = power_spectrum(blurred).mean(0)[:3] / power_spectrum(pictures).mean(0)[:3]
    assert sharpness.value == pytest.approx(float(octaves.prod()) ** (1 / 3))
    assert 0 < sharpness.low < sharpness.value < sharpness.high < 0.5
    darker = Reference(pictures, several, others, None).measures((pictures // 2), several)
    assert darker.values["brightness"].value == pytest.approx(0.5, abs=0.01)


def test_a_ratio_to_nothing_is_left_out_of_all_that_is_written(tmp_path: Path) -> None:
    grey = torch.full((12, 3, 64, 64), 90, dtype=torch.uint8)
    several = grey[:9, None].expand(9, 4, -1, -1, -1)
    noise = torch.randint(256, grey.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    measures = Reference(grey, several, several, None).measures(noise, several)
    assert measures.values["brightness"].value == pytest.approx(127.5 / 90, rel=0.01)
    assert not {"saturation", "contrast", "diversity", "ode", "sharpness"} & set(measures.values)
    assert not measures.spectrum
    rows = [Row(name, 4, 4.0, 1.0, False, name, measures=measures) for name in ("a", "b")]
    write([*rows, *over_students(rows)], Image.new("RGB", (8, 8)), tmp_path, {})
    assert "NaN" not in (tmp_path / "eval.json").read_text()
    assert "nan" not in (tmp_path / "eval.md").read_text()


def test_a_mean_over_students_is_for_those_alone_that_were_run_alike() -> None:
    def row(student: str | None, steps: int, value: float, strength: float | None = None) -> Row:
        measures = Measures(values={"accuracy": Value(value, 0, 1)}, spectrum={"2-4 px": Value(value)})
        return Row(f"{student}, {steps}", steps, float(steps), 1.0, False, student, strength, measures)

    rows = [row(None, 4, 9.0), row("a", 4, 0.2), row("b", 4, 0.4), row("c", 4, 0.9), row("a", 2, 0.1)]
    (mean,) = over_students(rows)
    assert mean.name == "mean of 3, 4 steps"
    assert mean.measures.values["accuracy"] == pytest.approx((0.5, 0.2, 0.9))
    assert mean.measures.spectrum["2-4 px"] == pytest.approx((0.5, 0.2, 0.9))
    rows = [row(name, 4, value, strength) for strength in (0.5, 1) for name, value in (("a", 0.1), ("b", strength))]
    assert [(mean.name, mean.measures.values["accuracy"].high) for mean in over_students(rows)] == [
        ("mean of 2 at 0.5, 4 steps", 0.5),
        ("mean of 2 at 1, 4 steps", 1),
    ]


def test_students_are_named_after_what_tells_them_apart() -> None:
    assert names_of(["runs/a/student.safetensors", "b.safetensors"]) == ["a", "b"]
    assert names_of(["x/b.safetensors", "y/b.safetensors"]) == ["x/b.safetensors", "y/b.safetensors"]
    with pytest.raises(TDMError, match="given twice"):
        names_of(["b.safetensors", "b.safetensors"])


@pytest.mark.usefixtures("prompts_file")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--student", "{student}"], "not of the bundled world, whose pictures are 64x64"),
        (["--prompts", "7"], "at least 8"),
        (["--teacher-steps", "0"], "at least 1"),
        (["--seed", "-1"], "0 or more"),
        (["--prompts-file", "{tmp}/none.txt"], "no prompt file"),
        (["--student", "{student}", "--prompts-file", "{tmp}/one.txt"], "at least 2 prompts"),
        (["--extra", "beauty"], "there is no extra score 'beauty'; there are clip, hpsv2, image_reward, fid"),
        (["--student", "{student}", "{student}", "--prompts-file", "{tmp}/p.txt"], "given twice"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str],
    line: str,
    student: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "one.txt").write_text("a cat")
    file = str(student(1))
    given = [a.replace("{tmp}", str(tmp_path)).replace("{student}", file) for a in arguments]
    assert line in refused(["eval", *given, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out" / "eval.json").exists()


def test_students_of_several_sizes_are_not_compared(
    student: Callable[..., Path], prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(student(1)), str(student(2, height=32))]
    given = ["eval", "--prompts-file", str(prompts_file), *SHORT, "--student", *files]
    assert "draws in another size than other students" in refused([*given, "--out", str(tmp_path / "out")], capsys)


@pytest.mark.parametrize(("family", "calls"), [("flux", [3, 4, 4, 2]), ("qwenimage", [6, 4, 4, 2])])
def test_calls_are_counted_and_the_teacher_is_guided_in_the_familys_own_way(
    family: str, calls: list[int], bases: Callable[[str], Path], prompts_file: Path, tmp_path: Path
) -> None:
    base = bases(family)
    file = tmp_path / "student.safetensors"
    layers = lora_for(getattr(tiny.build(family), family_of_name(family).denoiser))
    recipe = recipe_for(family, base, guidance_scale=3.5 if family == "flux" else 1.0)
    save_student(file, Student.from_state_dict(recipe, layers))
    given = ["eval", "--prompts-file", str(prompts_file), *SHORT, "--student", str(file)]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    assert [row["calls"] for row in read(tmp_path / "out")] == calls
    settings = json.loads((tmp_path / "out" / "eval.json").read_text())["settings"]
    assert settings["teacher_guidance"] == family_of_name(family).teacher_call.guidance_scale
