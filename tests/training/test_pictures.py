"""What the teacher drew is drawn once, is the same from the disk, and never stands in for something else."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tdm.errors import TDMError
from tdm.training.config import MemoryConfig
from tdm.training.loop import build_roles
from tdm.training.pictures import Drawn, cached, cached_pictures
from tdm.training.roles import Ema
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.stages import stages_of
from tdm.training.task import Teacher
from tdm.training.tasks.base_model import BaseModel
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.trajectory import build_trajectories
from torch import Tensor

from .base_tasks import task_of


class Drawing:
    """Draws other pictures each time, and counts the calls."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Tensor:
        self.times += 1
        generator = torch.Generator().manual_seed(self.times)
        return torch.randint(256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)


IDENTITY = {"base": {"files": {"a": "1"}}, "seed": 1}


def test_pictures_are_drawn_once_and_come_back_with_the_facts_of_their_drawing(tmp_path: Path) -> None:
    draw = Drawing()
    first = cached(tmp_path / "new", IDENTITY, lambda: Drawn(draw(), {"seconds": 1 / 3}))
    repeated = cached(tmp_path / "new", dict(reversed(IDENTITY.items())), lambda: Drawn(draw(), {}))  # in any order
    assert (draw.times, repeated.facts) == (1, {"seconds": 1 / 3})
    assert torch.equal(first.pictures, repeated.pictures)
    assert not torch.equal(cached_pictures(tmp_path / "new", {**IDENTITY, "seed": 2}, draw), first.pictures)
    assert len(list((tmp_path / "new").iterdir())) == 2  # and nothing unfinished


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "other pictures", "empty"])
def test_a_file_that_is_damaged_or_not_ours_is_drawn_anew(tmp_path: Path, damage: str) -> None:
    draw = Drawing()
    first = cached_pictures(tmp_path, IDENTITY, draw)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "foreign":
        save_file({"pictures": first}, file)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        other = json.dumps({**json.loads(header["identity"]), "seed": 2}, sort_keys=True)
        save_file({"pictures": first}, file, {**header, "identity": other})
    assert not torch.equal(cached_pictures(tmp_path, IDENTITY, draw), first)
    assert draw.times == 2
    cached_pictures(tmp_path, IDENTITY, draw)
    assert draw.times == 2


def test_a_disk_that_says_no_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TDMError, match="cannot write"):
        cached_pictures(tmp_path / "file", IDENTITY, Drawing())


def _draw_together(root: Path, barrier: Any) -> None:
    def draw() -> Tensor:
        barrier.wait(60)  # both have missed the file
        return torch.full((64, 3, 64, 64), 7, dtype=torch.uint8)

    assert int(cached_pictures(root, IDENTITY, draw).max()) == 7


def test_two_processes_that_draw_the_same_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=_draw_together, args=(tmp_path, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    draw = Drawing()
    assert int(cached_pictures(tmp_path, IDENTITY, draw).max()) == 7
    assert draw.times == 0


# ---------------------------------------------------------------------- a base and its teacher


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_every_part_of_a_base_is_in_its_identity(part: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases("pixart"), folder)
    before = BaseModel.find(str(folder)).identity()
    assert before == BaseModel.find(str(bases("pixart"))).identity()  # wherever it lies
    changed = max((folder / part).iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    after = BaseModel.find(str(folder)).identity()
    assert before != after
    json.dumps(after)


def run_of(task: PipelineTask, *settings: str) -> Run:
    config = load_config(None, ["output.teacher_steps=2", "objective.guidance_scale=2", "student.rank=1", *settings])
    roles = build_roles(task, config, torch.Generator().manual_seed(0))
    return Run(
        task,
        config,
        Path("nowhere"),
        roles,
        build_trajectories(config.trajectory, task.schedule),
        Ema(roles, decay=0.9),
        stages_of(config)[0],
    )


class Counted:
    """The teacher, and how often it was asked."""

    def __init__(self, teacher: Teacher) -> None:
        self.times, self.inner = 0, teacher

    @property
    def teacher(self) -> Teacher:
        def draw(noise: Tensor, cond: Any) -> Tensor:
            self.times += 1
            return self.inner.draw(noise, cond)

        return Teacher(draw, self.inner.identity)


def previewed(task: PipelineTask, *settings: str) -> tuple[int, Any]:
    """(how often the teacher was asked, the preview) of a new run."""
    run = run_of(task, *settings)
    counted = Counted(run.teacher)
    preview = task.preview(run.student, counted.teacher, run.critic)
    task.preview(run.student, counted.teacher, run.critic)
    return counted.times, preview


def test_the_next_run_of_a_base_does_not_draw_its_teacher_again(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    def task(**changes: Any) -> PipelineTask:
        return task_of("sana", bases("sana"), prompts, cache=str(tmp_path / "cache"), **changes)

    times, drawn = previewed(task())
    assert times == 1
    times, read = previewed(task(), "student.lr=1e-3", "seed=5")
    assert times == 0
    assert read.image.tobytes() == drawn.image.tobytes()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["pictures", "prompts"]
    # What the teacher's pictures depend on.
    for setting in ("objective.guidance_scale=3", "output.teacher_steps=3", "trajectory.shift=2", "precision=bf16"):
        assert previewed(task(), setting)[0] == 1, setting
    assert previewed(task(height=64))[0] == 1
    other = task_of("sana", bases("sana"), prompts, MemoryConfig(base="bf16"), cache=str(tmp_path / "cache"))
    assert previewed(other)[0] == 1
    Path(prompts).write_text("a dog")
    assert previewed(task())[0] == 1


def test_processes_that_share_a_base_draw_whatever_is_on_the_disk(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    for _ in range(2):
        task = task_of("sana", bases("sana"), prompts, MemoryConfig(shard=True), cache=str(tmp_path / "cache"))
        assert previewed(task)[0] == 1
    assert not (tmp_path / "cache" / "pictures").exists()


def test_without_a_folder_of_their_own_they_are_in_the_users_cache(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    previewed(task_of("sana", bases("sana"), prompts))
    assert len(list((tmp_path / "tdm" / "pictures").iterdir())) == 1
