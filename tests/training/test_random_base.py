"""A base of configs alone: its weights and prompts are random, in the shapes of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tdm.tests import tiny
from tdm.training.config import MemoryConfig
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.tasks.pipeline_settings import PipelineTaskConfig
from tdm.training.tasks.random_base import RandomBase

from .base_tasks import PROMPTS, configs_of, task_of


def random_task(
    family: str, base: Path, prompts: str, folder: Path, memory: MemoryConfig | None = None
) -> PipelineTask:
    """`task_of` of a folder with the base's configs."""
    call = tiny.call_kwargs(family)
    size = {"height": call["height"], "width": call["width"], "num_frames": call.get("num_frames")}
    config = PipelineTaskConfig(model=str(folder), prompts=prompts, **size)
    folder = folder if folder.exists() else configs_of(base, folder)
    return PipelineTask(config, memory, base=RandomBase.of(folder))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_has_the_shapes_of_the_real_base(
    family: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    real = task_of(family, bases(family), prompts)
    random = random_task(family, bases(family), prompts, tmp_path / "shapes")
    weights, made = (dict(task.base.named_parameters()) for task in (real, random))
    assert {name: w.shape for name, w in made.items()} == {name: w.shape for name, w in weights.items()}
    assert random.latent_shape == real.latent_shape
    assert random.sizes == real.sizes
    assert random.prediction_type == real.prediction_type
    cond, real_cond = (task.encode(PROMPTS[:2]) for task in (random, real))
    assert {name: (v.dtype, v.ndim) for name, v in cond.items()} == {
        name: (v.dtype, v.ndim) for name, v in real_cond.items()
    }
    x = torch.randn(2, *random.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction = random.call(random.base, x, torch.tensor([800.0, 300.0]), cond)
        null = random.call(random.base, x, torch.tensor([800.0, 300.0]), random.null(cond))
    assert prediction.shape == x.shape
    assert prediction.isfinite().all()
    assert not torch.equal(prediction, null)


def test_it_is_the_same_each_time_and_stored_like_any_other(
    bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    one, two, small = (
        random_task("sd3", bases("sd3"), prompts, tmp_path / "shapes", memory)
        for memory in (None, None, MemoryConfig(base="nf4"))
    )
    for (name, weight), other in zip(one.base.named_parameters(), two.base.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert all(torch.equal(one.encode(PROMPTS)[key], value) for key, value in two.encode(PROMPTS).items())
    assert one.identity() == two.identity()
    assert "Linear4bit" in {type(module).__name__ for module in small.base.modules()}
