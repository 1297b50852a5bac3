"""Students with fresh noise at each step: trained, saved, and sampled by the pipeline as by the trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tdm import TDMPipeline
from tdm.training.export import export, read_run
from tdm.training.loop import distill
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.trajectory import sample, with_fresh_noise
from torch import Tensor

from .base_tasks import PROMPTS, task_of


def drawn_and_expected(pipe: TDMPipeline, run: Run, task: PipelineTask) -> tuple[Tensor, Tensor]:
    """What the pipeline draws from three seeds, and what the trainer's sampler does with the noise of those seeds."""
    pipe.set_progress_bar_config(disable=True)
    call = {"generator": [torch.Generator().manual_seed(i) for i in range(3)], "output_type": "latent"}
    drawn = torch.stack(list(pipe(prompt=list(PROMPTS), **call)[0]))
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    noise = torch.stack([torch.randn(task.latent_shape, generator=generator) for generator in generators])
    fresh = torch.stack([torch.randn(4, *task.latent_shape, generator=generator) for generator in generators])
    grid, cond = run.trajectory.timesteps.tolist(), task.encode(PROMPTS)
    predict = with_fresh_noise(run.roles.student, fresh, pipe.recipe.eta)
    return drawn, sample(predict, task.schedule, grid, noise, cond)


@pytest.mark.parametrize("family", ["sd15", "sd3", "zimage"])
@pytest.mark.parametrize(("whole", "eta"), [(False, 1.0), (True, 1.0), (False, 0.4)])
def test_a_stochastic_student_is_sampled_as_it_was_trained(
    family: str, whole: bool, eta: float, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    task = task_of(family, bases(family), prompts)
    fast = ["updates=2", "batch_size=2", "precision=fp32", "student.lr=0.02", "ema.decay=0", "output.preview_every=0"]
    config = load_config("dmd2", [*fast, f"full_weights={whole}", f"trajectory.eta={eta}"])
    run = distill(task, config, tmp_path / "run", report=lambda _: None)
    trained = read_run(tmp_path / "run")
    assert trained is not None
    out = export(trained, "merged" if whole else "student", tmp_path / "student.safetensors")
    pipe = TDMPipeline.from_pretrained(out)
    assert (pipe.recipe.stochastic_sampling, pipe.recipe.eta) == (True, eta)
    assert "DMD2" in pipe.recipe.notes["method"]
    drawn, expected = drawn_and_expected(pipe, run, task)
    assert float((drawn - expected).norm() / expected.norm()) < 1e-5


def test_a_stochastic_run_of_an_earlier_tdm_is_no_deterministic_student(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    """The checkpoint of such a run has a recipe that says nothing about the noise."""
    fast = ["updates=1", "batch_size=2", "precision=fp32", "output.preview_every=0"]
    distill(task_of("sd3", bases("sd3"), prompts), load_config("dmd2", fast), tmp_path, report=lambda _: None)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["recipe"].pop("stochastic_sampling") is True
    torch.save(kept, tmp_path / "checkpoint.pt")
    trained = read_run(tmp_path)
    assert trained is not None
    assert trained.recipe.stochastic_sampling
