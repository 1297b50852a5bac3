"""Prompts to train on. Encoded prompts and teachers' pictures go into a folder of the tests, never into the user's
cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tdm.tests import tiny
from tdm.training.loop import distill
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks import build_task

from .base_tasks import PROMPTS

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
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _own_caches(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of `PROMPTS`."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


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


@pytest.fixture(scope="session")
def runs(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A finished run on a tiny base, made once. Nothing but the run itself is in its folder."""
    finished: dict[str, Run] = {}

    def of(family: str) -> Run:
        if family not in finished:
            config = load_config(None, settings(family))
            folder = tmp_path_factory.mktemp("runs") / family
            finished[family] = distill(
                build_task(config.task, config.memory, "cpu"), config, folder, report=lambda _: None
            )
        return finished[family]

    return of
