"""Runs that are killed, interrupted, out of disk or out of luck, and end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tdm.errors import TDMError
from tdm.tests.processes import finish, start
from tdm.training.best import BestStudent, Metric
from tdm.training.checkpoint import read_checkpoint

RECIPE = Path(__file__).parents[2] / "training/configs/mixture.yaml"
SMALL = ["task.width=256", "task.samples=200", "batch_size=16", "student.rank=16", "critic.rank=16"]
EVERY = ["output.log_every=3", "output.checkpoint_every=3", "output.evaluate_every=6", "output.preview_every=6"]


def distill(out: Path, *settings: str) -> list[str]:
    """The command of a small run, to go on from its checkpoint if it has one."""
    resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
    return ["distill", str(RECIPE), *SMALL, *EVERY, *settings, "--out", str(out), *resume]


def stderr_of(out: Path) -> str:
    return out.with_suffix(".err").read_text()


def lines(out: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_update"} for line in records]


def assert_the_same(one: Path, two: Path) -> None:
    """Adapters, mean weights, optimisers, generator, best student and metrics, bit for bit."""
    for name in ("checkpoint.pt", "best.pt"):
        a, b = read_checkpoint(one / name), read_checkpoint(two / name)
        for plain in ("config", "measure"):
            assert a.pop(plain, None) == b.pop(plain, None)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert lines(one) == lines(two)
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (one, two)]
    assert rows[0][0] == rows[1][0]
    assert len(rows[0]) == len(rows[1]) == len(lines(one)) + 1
    assert not list(two.glob("*.tmp"))


def wait_until(happened, process) -> None:
    while process.is_alive() and not happened():
        time.sleep(0.0005)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_as_the_run_that_was_left_alone(tmp_path: Path, kills: int) -> None:
    """The run gets SIGKILL after a random time, and every second time while a checkpoint is being written."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = [f"updates={6 * kills + 12}", "student.decay=cosine", "output.keep=2"]
    assert finish(distill(whole, *settings), tmp_path / "whole.err") == 0, stderr_of(whole)

    checkpoint, temporary = cut / "checkpoint.pt", cut / ".checkpoint.pt.tmp"

    def written() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    moments, half_written = random.Random(0), 0
    for kill in range(kills):
        before = written()
        process = start(distill(cut, *settings), tmp_path / "cut.err")
        wait_until(lambda before=before: written() != before, process)  # each gets one checkpoint further
        if kill % 2:
            time.sleep(moments.uniform(0, 0.1))
        else:
            wait_until(temporary.exists, process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, stderr_of(cut)
        half_written += temporary.exists()
        read_checkpoint(checkpoint)
    assert half_written >= kills // 4
    assert finish(distill(cut, *settings), tmp_path / "cut.err") == 0, stderr_of(cut)
    assert_the_same(whole, cut)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    out, settings = tmp_path / "run", ["updates=2000", "output.checkpoint_every=0"]
    process = start(distill(out, *settings), tmp_path / "run.err")
    wait_until((out / "metrics.csv").exists, process)
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 130, stderr_of(out)
    done = read_checkpoint(out / "checkpoint.pt")["step"]
    assert 0 < done < 2000
    *_, notice, last = stderr_of(out).splitlines()
    assert f"update {done}/2000" in notice
    assert last == f"tdm: stopped after update {done}; the same command with --resume goes on from it"


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        updates = 12 if out == whole else 6
        assert finish(distill(out, f"updates={updates}"), tmp_path / f"{out.name}.err") == 0, stderr_of(out)
    size = (cut / "checkpoint.pt").stat().st_size
    for room in (size // 2, size - 1000):  # refused within a tensor, and while the file is closed
        assert finish(distill(cut, "updates=12"), tmp_path / "cut.err", largest_file=room) == 2
        last = stderr_of(cut).splitlines()[-1]
        assert last.startswith(f"tdm: cannot write {cut / 'checkpoint.pt'}: File too large; make room, then resume")
        assert read_checkpoint(cut / "checkpoint.pt")["step"] == 6
        assert not list(cut.glob("*.tmp"))
    assert finish(distill(cut, "updates=12"), tmp_path / "cut.err") == 0, stderr_of(cut)
    assert_the_same(whole, cut)


def test_older_checkpoints_are_pruned_and_step_in_for_one_that_cannot_be_read(tmp_path: Path) -> None:
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    for out in (whole, hurt):
        settings = ["updates=15", "output.keep=3"]
        assert finish(distill(out, *settings), tmp_path / f"{out.name}.err") == 0, stderr_of(out)
        assert sorted(p.name for p in out.glob("*.pt")) == [
            "best.pt",
            "checkpoint-000009.pt",
            "checkpoint-000012.pt",
            "checkpoint.pt",
        ]
    for name in ("checkpoint.pt", "checkpoint-000012.pt"):
        half = (hurt / name).read_bytes()[:10_000]
        (hurt / name).write_bytes(half)
    assert finish(distill(hurt, *settings), tmp_path / "hurt.err") == 0, stderr_of(hurt)
    assert "checkpoint.pt is not a readable checkpoint" in stderr_of(hurt)
    assert "trying the older checkpoint-000009.pt" in stderr_of(hurt)
    assert_the_same(whole, hurt)
    assert sorted(p.name for p in hurt.glob("checkpoint-*")) == ["checkpoint-000009.pt", "checkpoint-000012.pt"]


def test_checkpoints_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(TDMError, match="not a readable checkpoint"):
        read_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(TDMError, match="format 1"):
        read_checkpoint(path)


@pytest.mark.parametrize(("higher", "best"), [(True, [1, 2, 2, 4]), (False, [1, 1, 3, 3])])
def test_the_best_student_is_kept_over_a_resume(tmp_path: Path, higher: bool, best: list[int]) -> None:
    path, measure = tmp_path / "best.pt", Metric("score", higher_is_better=higher)
    values = [0.5, 0.7, 0.2, 0.7 + 0.1 * higher]
    for step, value in enumerate(values, 1):
        keeper = BestStudent(path, measure, resume=step > 1)
        record = keeper.keep(step, {"a": torch.full((2,), float(step))}, {"score": value, "other": 9.0})
        right = best[step - 1]
        assert record == {"best/step": right, "best/score": values[right - 1]}
        payload = torch.load(path, weights_only=True)
        assert payload.pop("weights")["a"].tolist() == [right, right]
        assert payload == {"format": 1, "step": right, "measure": "score", "value": values[right - 1]}
    with pytest.raises(TDMError, match="ranks students by score, not energy"):
        BestStudent(path, Metric("energy", higher_is_better=False), resume=True)
    assert BestStudent(path, measure, resume=False).keep(9, {}, {"score": 0.0})["best/step"] == 9


def test_a_run_of_an_earlier_version_without_todays_settings_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert finish(distill(whole, "updates=6"), tmp_path / "whole.err") == 0, stderr_of(whole)
    assert finish(distill(cut, "updates=3"), tmp_path / "cut.err") == 0, stderr_of(cut)
    payload = read_checkpoint(cut / "checkpoint.pt")
    for section, name in (
        (None, "stages"),
        ("trajectory", "eta"),
        ("objective", "guidance_range"),
        ("critic", "leash"),
    ):
        (payload["config"] if section is None else payload["config"][section]).pop(name)
    torch.save(payload, cut / "checkpoint.pt")
    assert finish(distill(cut, "updates=6"), tmp_path / "cut.err") == 0, stderr_of(cut)
    torch.testing.assert_close(
        read_checkpoint(whole / "checkpoint.pt")["ema"], read_checkpoint(cut / "checkpoint.pt")["ema"], rtol=0, atol=0
    )
