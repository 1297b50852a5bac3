"""Stages of a run: settings, what goes on and what begins anew, one checkpoint, one estimate, one card."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tdm import TDMPipeline
from tdm.cli import main
from tdm.errors import TDMError
from tdm.tests.processes import finish, start
from tdm.training.card import write_card
from tdm.training.checkpoint import read_checkpoint
from tdm.training.config import DistillConfig
from tdm.training.cost import mean_passes, passes, passes_after
from tdm.training.curves import plot_curves
from tdm.training.export import export, read_run
from tdm.training.health import Monitor
from tdm.training.log import read_metrics
from tdm.training.loop import distill
from tdm.training.roles import ROLES
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.stages import stage_of_update, stages_of, total_updates
from tdm.training.tasks.mixture import MixtureTask

from .test_checkpoint import assert_the_same, stderr_of, wait_until
from .test_checkpoint import distill as command

LADDER = (
    "stages=[{name: warm-up, updates: 3, objective: {name: regression}},"
    " {updates: 4, trajectory: {steps: 8}, student: {lr: 1.0e-3, decay: linear}, critic: {start: student}},"
    " {name: last, updates: 5}]"
)
SMALL = ["batch_size=8", "student.rank=2", "critic.rank=2", "output.teacher_steps=4", "output.preview_every=0"]


def config_of(*settings: str) -> DistillConfig:
    return load_config("mixture", [*SMALL, "output.evaluate_every=0", *settings])


def run_of(out: Path, config: DistillConfig, **options: Any) -> Run:
    task = MixtureTask(width=8, samples=100)
    return distill(task, config, out, report=options.pop("report", lambda _: None), **options)


def test_a_stage_has_the_runs_settings_with_its_own_in_their_place() -> None:
    first, second, third = stages_of(config_of(LADDER, "student.lr=5e-4"))
    assert [stage.name for stage in (first, second, third)] == ["warm-up", "matching, 8 steps", "last"]
    assert [(stage.begin, stage.end) for stage in (first, second, third)] == [(0, 3), (3, 7), (7, 12)]
    assert first.config.objective.name == "regression"
    assert (second.config.trajectory.steps, second.config.student.lr) == (8, 1e-3)
    # No stage sees another's patch.
    assert (third.config.trajectory.steps, third.config.student.lr) == (4, 5e-4)
    assert third.config.objective.name == "matching"
    assert [stage.critic for stage in (first, second, third)] == ["checkpoint", "student", "checkpoint"]
    assert [stage_of_update(stages_of(config_of(LADDER)), step).index for step in (0, 1, 3, 4, 7, 8, 12)] == [
        0, 0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


def test_updates_are_numbers_or_shares_of_the_runs() -> None:
    stages = stages_of(config_of("updates=1000", "stages=[{updates: 0.25}, {updates: 40, critic: {head_start: 7}}]"))
    assert [stage.config.updates for stage in stages] == [250, 40]
    assert [(stage.begin, stage.student_from, stage.end) for stage in stages] == [(0, 0, 250), (250, 257, 297)]
    assert total_updates(config_of("updates=17")) == 17
    assert total_updates(config_of("updates=17", "critic.head_start=3")) == 20


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ("[{updates: 5, memory: {base: fp32}}]", r"stages\[0\].memory is not for a stage; it may have name, updates"),
        ("[{updates: 5}, {updates: 5, student: {rank: 4}}]", r"stages\[1\].student.rank is the same in all stages"),
        ("[{trajectory: {steps: 8}}]", r"stages\[0\].updates must be a whole number above 0, or a share"),
        ("[{updates: 1.5}]", r"stages\[0\].updates must be"),
        ("[{updates: 5, trajectory: {step: 8}}]", r"stages\[0\]: unknown setting trajectory.step; did you mean steps"),
        ("[{updates: 5, trajectory: 8}]", r"stages\[0\].trajectory is a section"),
        ("[{updates: 5, trajectory: {steps: -1}}]", r"stages\[0\]: trajectory.steps must be positive"),
        ("[{updates: 5, optimizers: old}]", r"stages\[0\].optimizers must be continue or fresh, not 'old'"),
        ("[5]", r"stages\[0\]"),
        (
            "[{updates: 5}, {updates: 5, optimizers: continue, trajectory: {unify: [1, 4]}}]",
            r"stages\[1\] trains other weights than the stage before .* its optimizers must be fresh",
        ),
        (
            "[{updates: 5}, {updates: 5, trajectory: {unify: [1, 4], tell_steps: embedding}}]",
            r"stages\[1\]: with trajectory.tell_steps=embedding all stages need the same",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused_in_one_line(stages: str, line: str) -> None:
    with pytest.raises(TDMError, match=line):
        config_of(f"stages={stages}")


def test_student_and_mean_go_on_and_the_rest_as_the_stage_says(tmp_path: Path) -> None:
    """At each boundary: what the checkpoint had, and what the next stage's first update starts from."""
    states: dict[int, dict[str, Any]] = {}

    def record(run: Run, _line: dict[str, float]) -> None:
        mean = {name: value.clone() for name, value in run.ema.weights.items()}
        states[run.step] = {**{role: run.roles.state(role) for role in ROLES}, "mean": mean}

    lines: list[str] = []
    # A stage of no learning shows what it began with.
    still = "student: {lr: 1.0e-30}, critic: {start: %s, lr: 1.0e-30}"
    for begins in ("student", "teacher", "checkpoint"):
        stages = f"stages=[{{updates: 3}}, {{updates: 1, {still % begins}}}]"
        config = config_of(stages, "output.log_every=1", "ema.decay=0.5", "student.lr=1e-2", "critic.lr=1e-2")
        run_of(tmp_path / begins, config, callbacks=[record], report=lines.append)
        assert all(torch.equal(states[4]["student"][name], value) for name, value in states[3]["student"].items())
        if begins == "student":
            assert any(bool(value.any()) for value in states[3]["mean"].values())
            for name, value in states[3]["mean"].items():
                torch.testing.assert_close(states[4]["critic"][name], value)
        elif begins == "teacher":
            begun = [value for name, value in states[4]["critic"].items() if "lora_B" in name]
            assert max(float(value.abs().max()) for value in begun) < 1e-20
        else:
            assert all(torch.equal(states[4]["critic"][name], value) for name, value in states[3]["critic"].items())
    assert "stage 2 of 2: matching, 4 steps, 1 updates" in lines


@pytest.mark.parametrize("kind", ["continue", "fresh"])
def test_optimizers_go_on_or_begin_anew(kind: str, tmp_path: Path) -> None:
    config = config_of(f"stages=[{{updates: 3}}, {{updates: 2, optimizers: {kind}}}]")
    run_of(tmp_path, config)
    payload = read_checkpoint(tmp_path / "checkpoint.pt")
    counts = {float(s["step"]) for role in payload["optimizers"].values() for s in role["state"].values()}
    assert counts == {5.0 if kind == "continue" else 2.0}


def test_each_stage_has_its_own_schedule_of_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def noted(_optimizer: Any, lr: float) -> None:
        rates.append(lr)

    monkeypatch.setattr("tdm.training.loop.set_learning_rate", noted)
    first = "updates: 2, critic: {head_start: 1}, student: {lr: 1.0}"
    second = "updates: 4, critic: {lr: 1.0}, student: {lr: 1.0e-9, decay: linear, warmup: 1}"
    run_of(tmp_path, config_of(f"stages=[{{{first}}}, {{{second}}}]"))
    student, critic = rates[::2], rates[1::2]
    assert student == pytest.approx([1, 1, 1, 0.5e-9, 0.75e-9, 0.5e-9, 0.25e-9])
    assert critic == pytest.approx([2e-3] * 3 + [1.0] * 4)


@pytest.mark.parametrize("moment", [2, 3, 4, 7, 11])
def test_a_run_stopped_at_any_update_ends_as_the_run_that_was_left_alone(moment: int, tmp_path: Path) -> None:
    """The stops include the last update of a stage and the first of the next."""
    every = ["output.log_every=2", "output.evaluate_every=3", "output.checkpoint_every=5", "output.keep=2"]
    config = config_of(LADDER, *every)
    run_of(tmp_path / "whole", config)
    updates = iter(range(1, 13))
    stopped = run_of(tmp_path / "cut", config, stop=lambda: next(updates) == moment)
    assert stopped.step == moment
    run_of(tmp_path / "cut", config, resume=True)
    a, b = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert a.pop("config") == b.pop("config")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    best = [read_checkpoint(tmp_path / name / "best.pt") for name in ("whole", "cut")]
    assert best[0].pop("measure") == best[1].pop("measure")
    torch.testing.assert_close(*best, rtol=0, atol=0)

    def evaluations(name: str) -> list[dict[str, float]]:
        return [
            line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "stage" in line or "eval/energy" in line
        ]

    assert evaluations("whole") == evaluations("cut")
    assert [line["step"] for line in evaluations("whole") if "stage" in line] == [3, 7]


def test_killed_at_the_boundary_it_ends_as_the_run_that_was_left_alone(tmp_path: Path) -> None:
    """The run gets SIGKILL after the checkpoint at a stage's end, before or after the next stage's first line."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stages = ["stages=[{updates: 3, trajectory: {steps: 8}}, {updates: 3, critic: {start: student}}, {updates: 6}]"]
    assert finish(command(whole, *stages), tmp_path / "whole.err") == 0, stderr_of(whole)
    for _ in range(2):
        before = (cut / "checkpoint.pt").stat().st_mtime_ns if (cut / "checkpoint.pt").exists() else 0

        def written(before: int = before) -> bool:
            return (cut / "checkpoint.pt").exists() and (cut / "checkpoint.pt").stat().st_mtime_ns != before

        process = start(command(cut, *stages), tmp_path / "cut.err")
        wait_until(written, process)
        time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, stderr_of(cut)
    assert read_checkpoint(cut / "checkpoint.pt")["step"] in (3, 6, 9)
    assert finish(command(cut, *stages), tmp_path / "cut.err") == 0, stderr_of(cut)
    assert_the_same(whole, cut)


def test_the_best_student_is_one_of_the_last_stage(tmp_path: Path) -> None:
    """An earlier stage's student may measure better, but with other steps than those of the student file."""
    config = config_of(LADDER, "output.evaluate_every=1")
    run_of(tmp_path, config)
    assert read_checkpoint(tmp_path / "best.pt")["step"] > 7
    ranked = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "best/step" in line]
    assert min(line["step"] for line in ranked) == 8


def test_a_unified_stage_follows_one_of_four_steps(tmp_path: Path) -> None:
    unified = "{updates: 2, trajectory: {unify: [1, 2, 4]}, critic: {start: student}}"
    stages = f"stages=[{{updates: 2}}, {unified}, {{updates: 1}}]"
    states: dict[int, set[str]] = {}
    run = run_of(
        tmp_path, config_of(stages, "output.log_every=1"),
        callbacks=[lambda run, _: states.update({run.step: set(run.roles.state("critic"))})],
    )  # fmt: skip
    assert "steps_embedding" not in states[1] | states[5]
    assert "steps_embedding" in states[3]
    assert list(run.trajectories) == [4]


def test_boundaries_are_drawn_and_a_new_stage_forgets_the_old_critic(tmp_path: Path) -> None:
    run_of(tmp_path, config_of(LADDER, "output.log_every=1"))
    assert plot_curves(tmp_path) is not None
    from PIL import Image

    with_boundaries = Image.open(tmp_path / "curves.png").tobytes()
    record = tmp_path / "metrics.jsonl"
    record.write_text("".join(text for text in record.read_text().splitlines(keepends=True) if '"stage"' not in text))
    plot_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").tobytes() != with_boundaries

    monitor = Monitor()
    losses = [{"step": i, "critic_loss": 1.0} for i in range(20)]
    risen = [{"step": i, "critic_loss": 50.0} for i in range(20, 24)]
    assert not any(monitor.watch(line) for line in [*losses, {"step": 19, "stage": 1.0}, *risen])
    alone = Monitor()
    assert any(alone.watch(line) for line in [*losses, *risen])


def test_what_a_run_costs_adds_up_over_its_stages() -> None:
    config = config_of(LADDER, "objective.guidance_scale=3", "objective.ode_steps=8")
    first, second, third = (passes(stage.config).total for stage in stages_of(config))
    assert passes_after(config, 12) == pytest.approx(3 * first + 4 * second + 5 * third)
    assert passes_after(config, 4) == pytest.approx(3 * first + second)
    assert mean_passes(config) == pytest.approx(passes_after(config, 12) / 12)
    plain = config_of("updates=7", "critic.head_start=2", "critic.per_student=3")
    head = 1.5 + 1 + 1 + 2  # prefix, student, critic, and its backward
    assert passes_after(plain, 9) == pytest.approx(2 * head + 7 * passes(plain).total)


def test_head_start_is_that_many_updates_of_the_critic_before_the_students_first(tmp_path: Path) -> None:
    settings = ["critic.head_start=6", "critic.per_student=3", "updates=10", "student.warmup=1", "output.log_every=1"]
    run = run_of(tmp_path, config_of(*settings))
    payload = read_checkpoint(tmp_path / "checkpoint.pt")
    steps = {role: {float(s["step"]) for s in o["state"].values()} for role, o in payload["optimizers"].items()}
    assert steps == {"critic": {6.0 + 3 * 10}, "student": {10.0}}
    assert run.step == run.updates == 16
    assert run.ema.count == 10
    trained = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "student_loss" in line]
    assert trained == list(range(7, 17))


def test_the_card_and_the_file_tell_the_stages(settings: Callable[[str], list[str]], tmp_path: Path) -> None:
    fresh = "trajectory: {sampler: stochastic, eta: 0.5}"
    stages = f"stages=[{{name: warm-up, updates: 1, objective: {{name: regression}}}}, {{updates: 2, {fresh}}}]"
    config = load_config(None, [*settings("sd3"), stages, "output.preview_every=0", "student.lr=1e-2"])
    from tdm.training.tasks import build_task

    task = build_task(config.task, config.memory, "cpu", lambda _: None)
    distill(task, config, tmp_path / "run", report=lambda _: None)
    trained = read_run(tmp_path / "run")
    assert trained is not None
    file = export(trained, "student", tmp_path / "student.safetensors")
    recipe = TDMPipeline.from_pretrained(file).recipe
    assert (recipe.stochastic_sampling, recipe.eta) == (True, 0.5)  # as the last stage was trained
    notes = recipe.notes
    first, second = notes["stages"].split("; ")
    assert first == "warm-up (1 updates): regression onto the end of the teacher's ODE"
    assert second.startswith("matching, 4 steps (2 updates): Trajectory Distribution Matching")
    assert notes["method"].startswith("Trajectory Distribution Matching")
    card = write_card(trained, file, "student").read_text()
    assert "| stage 1 | warm-up (1 updates): regression" in card
    assert "| stage 2 | matching, 4 steps (2 updates)" in card


def test_the_ladder_is_a_preset_behind_every_family(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for family in ("bundled", "sdxl", "mixture", "wan"):
        config = load_config([family, "ladder"], ["updates=200"])
        steps = [stage.config.trajectory.steps for stage in stages_of(config)]
        assert steps[1:3] == [16, 8]
        assert total_updates(config) == 200
    assert main(["distill", "bundled", "ladder", "--dry-run", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "stages       all above is of the one that takes most memory" in printed
    assert "hours for 200 updates" in printed
