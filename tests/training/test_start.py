"""What a run may start from: an earlier run of another rank, and students of any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tdm.errors import TDMError
from tdm.tests import tiny
from tdm.training.export import export, read_run
from tdm.training.folder import check_run
from tdm.training.loop import distill
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks import build_task
from tdm.training.tasks.mixture import MixtureTask
from torch import Tensor

Settings = Callable[[str], list[str]]
STILL = ["updates=1", "student.lr=1e-30", "critic.lr=1e-30", "output.preview_every=0", "output.evaluate_every=0"]


def trained(settings: list[str], out: Path) -> Run:
    config = load_config(None, settings)
    task = build_task(config.task, config.memory, "cpu", lambda _: None)
    return distill(task, config, out, report=lambda _: None)


def predictions(run: Run, role: str) -> Tensor:
    """What a role predicts for two prompts at the first timestep."""
    generator = torch.Generator().manual_seed(7)
    cond, shape = run.task.conditions(2, generator)
    x = torch.randn(2, *shape, generator=generator)
    with torch.no_grad():
        return getattr(run.roles, role)(x, run.trajectory.timesteps[:1].expand(2), cond)[0]


@pytest.mark.parametrize(("rank", "alpha"), [(2, 3.0), (4, None), (7, 2.0)])
def test_an_earlier_run_of_another_rank_and_alpha_starts_as_it_was(
    rank: int, alpha: float | None, settings: Settings, tmp_path: Path
) -> None:
    first = trained([*settings("sd15"), "ema.decay=0", "output.preview_every=0", "critic.rank=2"], tmp_path / "first")
    ranks = [
        f"{role}.{key}={value}" for role in ("student", "critic") for key, value in (("rank", rank), ("alpha", alpha))
    ]
    ranks = [text.replace("=None", "=null") for text in ranks]
    start = f"start_from={tmp_path / 'first' / 'checkpoint.pt'}"
    second = trained([*settings("sd15"), *STILL, *ranks, "ema.decay=0", start], tmp_path / "second")
    for role in ("student", "critic"):
        before, after = predictions(first, role), predictions(second, role)
        assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())
        assert float((before - predictions(first, "teacher")).abs().max()) > 1e-3


def test_a_rank_that_cannot_hold_it_is_refused_with_the_one_that_can(settings: Settings, tmp_path: Path) -> None:
    trained([*settings("sd15"), "output.preview_every=0"], tmp_path / "first")
    start = f"start_from={tmp_path / 'first' / 'checkpoint.pt'}"
    with pytest.raises(
        TDMError, match=r"start_from: its rank is 2, and student.rank=1 would lose .*set student.rank=2"
    ):
        trained([*settings("sd15"), *STILL, "student.rank=1", start], tmp_path / "second")


@pytest.mark.parametrize("critic", ["student", "teacher"])
@pytest.mark.parametrize("family", ["sd15", "sd3", "zimage"])
def test_a_student_file_starts_student_and_critic(family: str, critic: str, settings: Settings, tmp_path: Path) -> None:
    first = trained([*settings(family), "ema.decay=0", "output.preview_every=0"], tmp_path / "first")
    run = read_run(tmp_path / "first")
    assert run is not None
    forms: list[Any] = ["student", "kohya"] if family == "sd15" else ["student"]
    for form in forms:
        file = export(run, form, tmp_path / f"{form}.safetensors")
        start = [f"start_from={file}", f"critic.start={critic}", "student.rank=5", "critic.rank=3", "ema.decay=0"]
        second = trained([*settings(family), *STILL, *start], tmp_path / form)
        expected = predictions(first, "student")
        for role in ("student", "critic"):
            wanted = expected if role == "student" or critic == "student" else predictions(first, "teacher")
            assert float((predictions(second, role) - wanted).abs().max()) < 1e-4 * float(expected.abs().max())


def test_what_cannot_be_started_from_is_one_line(settings: Settings, tmp_path: Path) -> None:
    trained([*settings("sd15"), "output.preview_every=0"], tmp_path / "first")
    run = read_run(tmp_path / "first")
    assert run is not None
    file = export(run, "student", tmp_path / "student.safetensors")
    with pytest.raises(
        TDMError, match=r"has a student and no critic; set critic.start=student or critic.start=teacher"
    ):
        trained([*settings("sd15"), f"start_from={file}"], tmp_path / "a")
    narrow = ["critic.start=teacher", "student.targets=[to_q]"]
    with pytest.raises(
        TDMError, match=r"start_from: these student weights are for other layers .* set student.targets"
    ):
        trained([*settings("sd15"), f"start_from={file}", *narrow], tmp_path / "b")
    with pytest.raises(TDMError, match=r"start_from: .*no place|start_from: .*do not|start_from: .*match"):
        trained([*settings("sd3"), f"start_from={file}", "critic.start=teacher"], tmp_path / "c")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TDMError, match="start_from: "):
        trained(
            [*settings("sd15"), f"start_from={tmp_path / 'other.safetensors'}", "critic.start=teacher"], tmp_path / "d"
        )
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(TDMError, match="is not a readable checkpoint"):
        trained([*settings("sd15"), f"start_from={tmp_path / 'broken.pt'}"], tmp_path / "e")
    config = load_config(None, [*settings("sd15"), f"start_from={tmp_path / 'gone.safetensors'}"])
    with pytest.raises(TDMError, match="start_from: no file"):
        check_run(tmp_path / "f", config, resume=False)
    mixture = load_config("mixture", ["updates=1", "batch_size=4", f"start_from={file}", "critic.start=teacher"])
    with pytest.raises(TDMError, match="a student file is for adapters on a pipeline's network"):
        distill(MixtureTask(width=8, samples=20), mixture, tmp_path / "g", report=lambda _: None)


def test_every_family_that_trains_has_a_student_that_starts_it(settings: Settings, tmp_path: Path) -> None:
    """By the table of families: the exported file of each fits its own base again."""
    for family in tiny.FAMILIES:
        run = trained([*settings(family), "output.preview_every=0", "updates=1"], tmp_path / family)
        finished = read_run(run.out_dir)
        assert finished is not None
        file = export(finished, "student", tmp_path / f"{family}.safetensors")
        start = [f"start_from={file}", "critic.start=student"]
        again = trained([*settings(family), *STILL, *start], tmp_path / f"{family}-again")
        names = {name for name, value in again.roles.state("student").items() if "lora_B" in name and value.any()}
        assert names == {name for name, value in run.ema.weights.items() if "lora_B" in name and value.any()}
