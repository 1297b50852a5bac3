"""What a run writes about itself, in every sink, and that a resume leaves no trace there."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tdm.tests.processes import finish
from tdm.training.loop import distill
from tdm.training.preview import Preview
from tdm.training.run import Callback, Run
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import MixtureTask

SMALL = ["updates=12", "batch_size=8", "student.rank=2", "critic.rank=2", "output.log_every=4", "ema.decay=0.9"]
EVERY = ["output.preview_every=6", "output.evaluate_every=6", "output.checkpoint_every=6"]


class KilledError(Exception):
    pass


def kill_at(step: int) -> Callback:
    def callback(_run: Run, line: dict[str, float]) -> None:
        if line["step"] == step:
            raise KilledError

    return callback


def go(
    out: Path,
    *settings: str,
    task: MixtureTask | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    config = load_config(None, [*SMALL, *EVERY, *settings])
    task = task or MixtureTask(width=8, samples=50)
    return distill(task, config, out, resume=resume, callbacks=callbacks, report=lambda _: None)


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def rows(out: Path) -> list[dict[str, float]]:
    with (out / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_the_table_holds_the_lines_of_metrics_also_after_a_kill_and_a_resume(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        go(tmp_path, callbacks=[kill_at(8)])
    assert rows(tmp_path) == lines(tmp_path)
    for name in ("metrics.jsonl", "metrics.csv"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 8, "student' if name.endswith("jsonl") else "8,0.1,0")  # killed while writing
    go(tmp_path, resume=True)
    assert rows(tmp_path) == lines(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [4, 6, 6, 6, 8, 12, 12, 12]  # nothing twice
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[0] == "step"
    assert {"critic_loss", "gap_0", "eval/energy", "best/energy", "health/diversity"} <= set(header)


def test_the_best_student_so_far_is_kept_by_the_tasks_own_measure(tmp_path: Path) -> None:
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def remember(run: Run, line: dict[str, float]) -> None:
        if "eval/energy" in line:
            weights[run.step] = {name: weight.clone() for name, weight in run.ema.weights.items()}

    go(tmp_path, "output.evaluate_every=3", "student.lr=0.01", callbacks=[remember])
    values = {int(line["step"]): line["eval/energy"] for line in lines(tmp_path) if "eval/energy" in line}
    step = min(values, key=lambda step: values[step])
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"], best["measure"], best["value"]) == (step, "energy", values[step])
    assert best["weights"].keys() == weights[step].keys()
    assert all(torch.equal(weight, weights[step][name]) for name, weight in best["weights"].items())
    last = [line for line in lines(tmp_path) if "best/step" in line][-1]
    assert (last["best/step"], last["best/energy"]) == (step, values[step])


def test_a_new_run_does_not_inherit_the_best_student_of_one_that_died_without_a_checkpoint(
    tmp_path: Path,
) -> None:
    with pytest.raises(KilledError):
        go(tmp_path, "output.checkpoint_every=0", callbacks=[kill_at(8)])
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 6
    go(tmp_path, "output.evaluate_every=0")
    assert not (tmp_path / "best.pt").exists()


class Shown(MixtureTask):
    """A mixture with a picture of a kind."""

    def preview(self, student, teacher, critic):  # type: ignore[no-untyped-def]
        from PIL import Image

        return super().preview(student, teacher, critic)._replace(image=Image.new("RGB", (5, 3), (200, 0, 0)))


def test_tensorboard_gets_what_metrics_and_previews_say_and_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def task() -> MixtureTask:
        return Shown(width=8, samples=50)

    with pytest.raises(KilledError):
        go(tmp_path, "output.tensorboard=true", "output.checkpoint_every=4", task=task(), callbacks=[kill_at(6)])
    go(tmp_path, "output.tensorboard=true", "output.checkpoint_every=4", task=task(), resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("critic_loss", "gap_0", "eval/energy", "health/diversity"):
        drawn = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [(line["step"], pytest.approx(line[name])) for line in lines(tmp_path) if name in line]
        assert drawn == logged
    assert [image.step for image in events.Images("preview")] == [6, 12]
    assert (events.Images("preview")[0].width, events.Images("preview")[0].height) == (5, 3)


def test_tensorboard_is_imported_only_when_asked_for_and_missed_in_one_line(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "training/configs/mixture.yaml"
    argv = ["distill", str(recipe), "updates=1", "batch_size=2", "task.samples=9", "output.preview_every=0"]
    error = tmp_path / "error"
    assert finish([*argv, "--out", str(tmp_path / "plain")], error, missing="tensorboard") == 0, error.read_text()
    asked = [*argv, "output.tensorboard=true", "--out", str(tmp_path / "asked")]
    assert finish(asked, error, missing="tensorboard") == 2
    assert error.read_text().splitlines()[-1] == (
        "tdm: output.tensorboard needs the package tensorboard: pip install tensorboard, or set it to false"
    )


def test_a_preview_without_a_picture_or_a_ratio_is_fine(tmp_path: Path) -> None:
    class Silent(MixtureTask):
        def preview(self, student, teacher, critic):  # type: ignore[no-untyped-def]  # noqa: ARG002
            return Preview(None, {})

    go(tmp_path, task=Silent(width=8, samples=50))
    assert not (tmp_path / "previews").exists()
    assert not any(key.startswith("health/") for line in lines(tmp_path) for key in line)
