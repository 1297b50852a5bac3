"""The student of a run that is still trained: drawn in a pipeline without a file, and the example that uses it."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.students.file import read_student
from tdm.tests import tiny
from tdm.training.export import export_student, read_run
from tdm.training.loop import distill
from tdm.training.progress import silent
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks import build_task
from tdm.training.tasks.mixture import MixtureTask

from .conftest import Settings

EXAMPLE = Path(__file__).parents[2] / "examples/distil_in_python.py"


def drawn(pipe: TDMPipeline, family: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    call = tiny.call_kwargs(family) | {"generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipe(**call)[0]


@pytest.mark.parametrize("family", ["sd15", "sd3", "pixart"])
def test_a_student_drawn_during_a_run_is_the_exported_one(family: str, settings: Settings, tmp_path: Path) -> None:
    """The two agree to the bit after each of two updates. The second update does not change the first student."""
    every = ["output.log_every=1", "output.checkpoint_every=1", "output.keep=2", "output.preview_every=0"]
    config = load_config(None, [*settings(family), *every])
    task = build_task(config.task, config.memory, "cpu", silent)
    students, pictures = [], []

    def draw(run: Run, metrics: dict[str, float]) -> None:
        if "student_loss" in metrics:
            students.append(run.as_student())
            pictures.append(drawn(TDMPipeline.from_pretrained(students[-1]), family))

    distill(task, config, tmp_path / "run", callbacks=[draw], report=silent)
    for step, name in ((1, "checkpoint-000001.pt"), (2, "checkpoint.pt")):
        finished = read_run(tmp_path / "run" / name)
        assert finished is not None
        assert finished.step == step
        file = export_student(finished, tmp_path / f"{step}.safetensors")
        assert students[step - 1].recipe == read_student(file).recipe
        assert np.array_equal(pictures[step - 1], drawn(TDMPipeline.from_pretrained(file), family))
    assert not np.array_equal(*pictures)


def test_a_student_of_no_pipeline_is_refused(tmp_path: Path) -> None:
    config = load_config("mixture", ["updates=1", "batch_size=4", "output.evaluate_every=0", "output.preview_every=0"])
    run = distill(MixtureTask(width=8, samples=10), config, tmp_path, report=silent)
    with pytest.raises(TDMError, match="this task is no pipeline"):
        run.as_student()


def test_the_example_distils_a_base_in_a_folder(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, call = tmp_path / "run", tiny.call_kwargs("sd3")
    size = [f"task.height={call['height']}", f"task.width={call['width']}"]
    short = ["batch_size=2", "student.rank=2", "critic.rank=2", "output.log_every=1", "output.preview_every=0"]
    command = [str(EXAMPLE), str(bases("sd3")), prompts, "--out", str(out), "--updates", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--preset", "sid", "--set", *size, *short])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    student = read_student(out / "student.safetensors")
    assert student.recipe.notes["method"].startswith("score identity distillation")
    assert (out / "picture.png").is_file()
