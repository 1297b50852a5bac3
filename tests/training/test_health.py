"""Every alarm, raised by a real run that goes wrong in that way, and by none that goes well."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tdm import TDMPipeline
from tdm.cli import main
from tdm.errors import TDMError
from tdm.training.checkpoint import read_checkpoint
from tdm.training.evaluate import Plan, draw, held_out_prompts
from tdm.training.health import DETAIL, Monitor
from tdm.training.loop import distill
from tdm.training.losses import regression_loss
from tdm.training.objectives import towards
from tdm.training.preview import picture_ratios
from tdm.training.run import Callback
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import MixtureTask
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.tasks.pipeline_settings import PipelineTaskConfig
from tdm.training.trajectory import Condition
from tdm.training.worlds.teacher.data import pictures
from torch.nn import functional as F

CONFIGS = Path(__file__).parents[2] / "training/configs"
MIXTURE = ["updates=100", "batch_size=32", "output.log_every=4", "output.preview_every=20", "output.evaluate_every=0"]
BUNDLED = [
    "updates=3",
    "batch_size=2",
    # A small student: with more weights such rates end in NaN before the previews.
    *("student.rank=32", "student.targets=null", "critic.rank=32", "critic.targets=null"),
    *("trajectory.shift=1", "objective.guidance_scale=5", "objective.stage_guidance=null"),
    "precision=fp32",
    "output.log_every=1",
    "output.preview_every=3",
    "output.evaluate_every=0",
    "output.teacher_steps=10",
    "ema.decay=0",
    "student.warmup=0",
    "critic.warmup=0",
]


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def alarms(out: Path) -> list[tuple[str, int]]:
    """The name and the update of each alarm of a run."""
    return [(key[6:], int(line["step"])) for line in lines(out) for key in line if key.startswith("alarm/")]


def go(out: Path, *settings: str, bundled: bool = False, **options: bool | list[Callback]) -> list[str]:
    """Run the mixture or the bundled teacher, and return the alarm lines that it reported."""
    messages: list[str] = []
    small = BUNDLED if bundled else MIXTURE
    config = load_config(CONFIGS / ("bundled.yaml" if bundled else "mixture.yaml"), [*small, *settings])
    task = PipelineTask(PipelineTaskConfig()) if bundled else MixtureTask(width=64, samples=500)
    distill(task, config, out, report=messages.append, **options)  # type: ignore[arg-type]
    return [line for line in messages if line.startswith("ALARM")]


def test_a_run_that_goes_well_raises_none(tmp_path: Path) -> None:
    assert go(tmp_path / "mixture") == go(tmp_path / "bundled", bundled=True) == []
    assert alarms(tmp_path / "mixture") == alarms(tmp_path / "bundled") == []
    ratios = [line["health/diversity"] for line in lines(tmp_path / "mixture") if "health/diversity" in line]
    assert len(ratios) == 5
    assert all(0.7 < value < 1.1 for value in ratios)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["student.lr=0.03", "seed=1"],  # diversity 0.15, contrast 0.11 of the teacher's
            [
                ("collapse", "diversity", "lower student.lr, or let the critic follow: raise critic.per_student"),
                ("darkening", "contrast", "lower student.lr"),
            ],
        ),
        (
            ["student.lr=0.1", "seed=0"],  # saturation 2.7, brightness 0.34
            [
                ("oversaturation", "saturation", "lower objective.guidance_scale, or student.lr"),
                ("darkening", "brightness", "lower student.lr"),
            ],
        ),
    ],
    ids=["collapses-and-fades", "oversaturates-and-darkens"],
)
def test_a_student_blown_up_by_its_rate(
    settings: list[str], expected: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    messages = go(tmp_path, *settings, bundled=True)
    assert {name for name, _, _ in expected} <= {name for name, _ in alarms(tmp_path)}
    assert {step for _, step in alarms(tmp_path)} == {3}
    for name, ratio, remedy in expected:
        (line,) = [line for line in messages if name in line and ratio in line]
        assert line.startswith(f"ALARM  {name}: at update 3 the student's previews have ")
        assert line.endswith(f"of the teacher's {ratio} (no good preview before); {remedy}")
    sheet = Image.open(tmp_path / "previews" / "000003.png")
    assert sheet.height > 3 * 160 > sheet.height - 2 * 160  # three rows
    assert sheet.width > 8 * 160


def test_a_critic_blown_up_by_its_rate_is_named_with_its_stage(tmp_path: Path) -> None:
    (message, *_) = go(tmp_path, "critic.lr=0.1")
    assert "critic_divergence: since update" in message
    assert "times as far from the teacher as the student's sample; lower critic.lr" in message
    assert {name for name, _ in alarms(tmp_path)} == {"critic_divergence"}


def test_a_critic_that_goes_astray_later_is_seen_by_its_loss(tmp_path: Path) -> None:
    """The critic's learning rate grows by warm-up from a good value to an absurd one."""
    messages = go(tmp_path, "critic.lr=3.0", "critic.warmup=1500", "updates=140")
    (line,) = [line for line in messages if "the critic's loss is at least" in line]
    assert "lower critic.lr or critic.clip" in line
    since = int(line.partition("since update ")[2].partition(" ")[0])
    assert since > 32


class Broken(MixtureTask):
    """A mixture whose eleventh batch sets a student weight to NaN."""

    calls = 0

    def conditions(self, n: int, generator: torch.Generator) -> tuple[Condition, tuple[int, ...]]:
        self.calls += 1
        if self.calls == 11:
            with torch.no_grad():
                self.base.outer.lora_B["student"].weight.fill_(float("nan"))  # type: ignore[union-attr,index]
        return super().conditions(n, generator)


def test_what_is_not_a_number_stops_the_run_and_is_on_record(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "mixture.yaml", [*MIXTURE, "output.checkpoint_every=8"])
    with pytest.raises(TDMError, match=r"_loss is nan at update 11: lower \w+.lr"):
        distill(Broken(width=8, samples=50), config, tmp_path, report=lambda _: None)
    assert lines(tmp_path)[-1] == {"step": 12, "alarm/nan": 11.0}
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["step"] == 8
    assert all(weight.isfinite().all() for weight in saved["adapters"]["student"].values())


def test_an_alarm_stops_the_command_where_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["distill", str(CONFIGS / "mixture.yaml"), *MIXTURE, "task.width=64", "critic.lr=0.1"]
    assert main([*argv, "output.stop_on_alarm=true", "--out", str(tmp_path)]) == 2
    *_, alarm, last = capsys.readouterr().err.splitlines()
    ((_, step),) = alarms(tmp_path)
    assert alarm.startswith("ALARM  critic_divergence")
    assert last.startswith("tdm: critic_divergence: since update")
    assert last.endswith(
        f"lower critic.lr; stopped after update {step}: resume to go on as it is, or begin a new run "
        f"with other settings and start_from={tmp_path / 'checkpoint.pt'}"
    )
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == step < 100


def replay(records: list[dict[str, float]], monitor: Monitor | None = None) -> list[tuple[str, int]]:
    monitor = monitor or Monitor()
    return [(alarm.name, int(line["step"])) for line in records for alarm in monitor.watch(line)]


def test_an_alarm_is_raised_once_and_again_after_it_was_fine() -> None:
    records = [{"step": i, "health/contrast": value} for i, value in enumerate([1.0, 0.3, 0.2, 0.9, 0.4])]
    assert replay(records) == [("darkening", 1), ("darkening", 4)]
    message = Monitor().watch({"step": 1, "health/contrast": 0.3})[0].message
    assert "no good preview before" in message
    monitor = Monitor()
    monitor.watch(records[0])
    assert "0.30 of the teacher's contrast (1.00 at update 0)" in monitor.watch(records[1])[0].message


def test_one_bad_line_of_the_critic_is_no_alarm_and_three_are() -> None:
    def run(*losses: float) -> list[tuple[str, int]]:
        return replay([{"step": i, "critic_loss": loss} for i, loss in enumerate([*[1.0, 2.0] * 5, *losses], 1)])

    assert run(50.0, 50.0, 2.0, 50.0, 50.0) == []
    assert run(50.0, 50.0, 50.0) == [("critic_divergence", 13)]
    assert run(5.0, 5.0, 5.0) == []


def test_a_resumed_run_still_knows_which_alarms_stand(tmp_path: Path) -> None:
    settings = ["critic.lr=0.1", "output.checkpoint_every=20"]
    go(tmp_path, *settings, "updates=20")
    before = alarms(tmp_path)
    assert before
    assert go(tmp_path, *settings, "updates=24", resume=True) == []
    assert alarms(tmp_path) == before


def test_ratios_of_pictures_of_any_size_are_one_against_themselves_and_see_one_picture_for_all() -> None:
    drawn = pictures(8, 1)[0].unflatten(0, (4, 2))
    large = drawn.repeat_interleave(3, -1).repeat_interleave(2, -2)
    for shown in (drawn, drawn[..., :32], large, drawn[..., ::8, ::8]):
        ratios = picture_ratios(shown, shown)
        assert ratios == pytest.approx(dict.fromkeys(ratios, 1))
        assert {"brightness", "contrast", "saturation", "diversity", "sharpness", *DETAIL} - set(ratios) <= {
            "power_8-16px"
        }
    same = drawn[:, :1].expand(4, 2, 3, 64, 64)
    assert picture_ratios(same, drawn)["diversity"] == 0
    black = torch.zeros_like(drawn)
    assert picture_ratios(black, drawn)["brightness"] == 0
    assert picture_ratios(drawn, black) == {}  # a ratio to nothing says nothing


@pytest.mark.parametrize("side", [256, 512])
def test_sharpness_is_of_the_full_size_where_64_pixels_show_nothing(side: int) -> None:
    tiles = side // 64
    stickers = pictures(2 * tiles**2, 1)[0].view(2, tiles, tiles, 3, 64, 64)
    drawn = stickers.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, side, side).float()
    blurred = gaussian_blur(drawn, 1.0)
    sharpened = (drawn + 1.5 * (drawn - blurred)).clamp(0, 255)  # unsharp mask
    for changed, alarms_of_it in ((blurred, ["blur"]), (sharpened, ["oversharpening"]), (drawn, [])):
        assert raised(changed, drawn) == alarms_of_it
        assert raised(*(F.interpolate(p, (64, 64), mode="area") for p in (changed, drawn))) == []


def test_pictures_that_are_tiny_or_of_one_colour_have_no_sharpness_and_no_error() -> None:
    drawn = pictures(4, 1)[0].unflatten(0, (2, 2))
    for height, width in ((1, 1), (2, 9), (3, 3)):
        ratios = picture_ratios(drawn[..., :height, :width], drawn[..., :height, :width])
        assert not [name for name in ratios if name.startswith(("sharpness", "power"))]
    for height, width in ((4, 4), (5, 64), (7, 8)):
        ratios = picture_ratios(drawn[..., :height, 20 : 20 + width], drawn[..., :height, 20 : 20 + width])
        assert list(ratios)[-2:] == ["sharpness", "power_2-4px"]
    grey = torch.full_like(drawn, 90)
    assert picture_ratios(grey, drawn)["sharpness"] == 0
    assert "sharpness" not in picture_ratios(drawn, grey)


def raised(student: torch.Tensor, teacher: torch.Tensor) -> list[str]:
    """The alarms of a student that draws as its teacher, and then these pictures."""
    shown, reference = (p.float().round().byte()[None] for p in (student, teacher))
    ratios = picture_ratios(reference, reference), picture_ratios(shown, reference)
    previews = [{f"health/{name}": value for name, value in preview.items()} for preview in ratios]
    return [name for name, _ in replay([{"step": i, **preview} for i, preview in enumerate(previews)])]


def gaussian_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    at = torch.arange(-4, 5.0)
    row = (-(at / sigma).square() / 2).exp()
    row = (row / row.sum()).expand(3, 1, 9)
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")
    return F.conv2d(F.conv2d(x, row[:, :, None], groups=3), row[..., None], groups=3)


def test_a_blur_is_an_alarm_where_it_stays_and_none_while_the_student_sharpens() -> None:
    def run(*values: float) -> list[tuple[str, int]]:
        return replay([{"step": i, "health/power_4-8px": value} for i, value in enumerate(values)])

    assert run(0.2, 0.3, 0.4, 0.8, 1.0) == []  # a student of one step begins as blurred as its base is in one step
    assert run(0.2, 0.2) == []
    assert run(0.2, 0.205, 0.205, 0.4, 0.9) == [("blur", 2)]
    assert run(0.2, 0.205, 0.205, 0.205, 0.205) == [("blur", 2)]  # once
    assert run(1.0, 0.4) == [("blur", 1)]
    assert run(1.0, 2.1, 0.4, 0.9, 0.4) == [("oversharpening", 1), ("blur", 2), ("blur", 4)]


def test_an_alarm_names_the_worst_octave_and_a_new_stage_may_begin_blurred() -> None:
    monitor = Monitor()
    monitor.watch({"step": 50, "health/power_2-4px": 0.9, "health/power_8-16px": 0.8})
    assert monitor.watch({"step": 60, "stage": 1.0}) == monitor.watch({"step": 100, "health/power_2-4px": 0.4}) == []
    line = {"health/power_2-4px": 0.4, "health/power_4-8px": 0.6, "health/power_8-16px": 1.0}
    monitor.watch({"step": 150, **line})
    (alarm,) = monitor.watch({"step": 200, **line})
    assert alarm.message.startswith(
        "blur: at update 200 the student's previews have 0.40 of the teacher's detail (2-4 px) (0.80 at update 50); "
        "raise updates or student.lr; regression"
    )
    monitor.watch({"step": 210, "health/power_2-4px": 0.9})
    (alarm,) = monitor.watch({"step": 220, **line})
    assert "(0.90 at update 210); lower student.lr or objective.guidance_scale; regression" in alarm.message
    (alarm,) = monitor.watch({"step": 250, "health/power_2-4px": 1.8, "health/power_8-16px": 2.1})
    assert alarm.value == 2.1
    assert "2.10 of the teacher's detail (8-16 px)" in alarm.message
    assert alarm.message.endswith("lower objective.guidance_scale, or student.lr")


REGRESSION = ["objective.name=regression", "objective.rho=mse", "batch_size=4"]


def test_a_student_that_learns_the_mean_of_the_teachers_pictures_is_blurred(tmp_path: Path) -> None:
    """One step of the teacher from pure noise is the mean of all its pictures of a prompt."""
    settings = ["trajectory.steps=1", "objective.ode_steps=1", "objective.guidance_scale=3"]
    messages = go(tmp_path, *REGRESSION, *settings, "updates=6", "output.preview_every=2", bundled=True)
    (message,) = [line for line in messages if "blur" in line]
    assert message.startswith("ALARM  blur: at update 6 the student's previews have 0.")
    assert "of the teacher's detail (2-4 px) (no good preview before)" in message


def test_a_student_that_learns_too_sharp_a_target_is_oversharp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def towards_sharper(x0: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        coarse = F.avg_pool2d(F.pad(target, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return regression_loss(x0, target + 4 * (target - coarse), **options)

    monkeypatch.setattr(towards, "regression_loss", towards_sharper)
    settings = ["trajectory.steps=4", "objective.ode_steps=4", "student.lr=2e-3"]
    (message,) = go(tmp_path, *REGRESSION, *settings, "updates=10", "output.preview_every=5", bundled=True)
    assert {name for name, _ in alarms(tmp_path)} == {"oversharpening"}  # no alarm about colours sees it
    assert re.search(r"at update 10 .* [2-4]\.\d+ of the teacher's detail \(8-16 px\) \(1\.\d+ at update 5\)", message)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["output.preview_every=50"],
        # It begins with 0.4 of its teacher's detail, as the base has in one step.
        [
            "output.preview_every=10",
            "updates=60",
            "batch_size=8",
            "trajectory.steps=1",
            "objective.stage_guidance=null",
        ],
    ],
    ids=["4 steps, first 200 updates", "1 step"],
)
def test_a_student_that_learns_to_be_sharp_is_neither_blurred_nor_oversharp(
    settings: list[str], tmp_path: Path
) -> None:
    config = load_config(CONFIGS / "bundled.yaml", ["output.evaluate_every=0", "precision=bf16", *settings])
    distill(PipelineTask(PipelineTaskConfig()), config, tmp_path, report=lambda _: None)
    assert not {name for name, _ in alarms(tmp_path)} & {"blur", "oversharpening"}
    assert all(0.7 < lines(tmp_path)[-1][f"health/{name}"] < 1.3 for name in DETAIL)


@pytest.mark.slow
def test_the_student_that_ships_and_the_teacher_from_other_seeds_are_sharp() -> None:
    pipe = TDMPipeline.from_pretrained("bundled")
    texts = [text for text in held_out_prompts(4)[0] for _ in range(2)]
    variants = Plan(teacher_steps=20).variants(pipe.teacher_call, ["student"])
    teacher = draw(pipe, variants[0], texts, range(8))
    assert raised(draw(pipe, variants[0], texts, range(100, 108)), teacher) == []
    for variant in variants:
        if variant.student:
            assert raised(draw(pipe, variant, texts, range(8)), teacher) == []


def test_the_critics_idea_is_the_students_sample_at_first_and_changes_with_the_critic(tmp_path: Path) -> None:
    """Before any update the critic is the teacher, which finds a clean sample of its own again in a noised one."""
    ideas: list[float] = []

    class Watched(MixtureTask):
        def preview(self, student, teacher, critic):  # type: ignore[no-untyped-def]
            noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
            assert torch.equal(critic(noise, {}), critic(noise, {}))
            ideas.append(float((critic(noise, {}) - student(noise, {})).norm(dim=1).median()))
            return super().preview(student, teacher, critic)

    for name, critic_lr in (("still", 1e-9), ("absurd", 1.0)):
        settings = ["updates=20", "student.lr=1e-9", f"critic.lr={critic_lr}"]
        config = load_config(CONFIGS / "mixture.yaml", [*MIXTURE, *settings])
        distill(Watched(width=8, samples=50), config, tmp_path / name, report=lambda _: None)
    still, absurd = ideas
    assert 0 < still < 0.3 < absurd
