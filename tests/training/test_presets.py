"""The presets: each is sound, every family goes with every memory class, and a wrong name is one line."""

from __future__ import annotations

import pytest
from tdm.errors import TDMError
from tdm.tests import tiny
from tdm.training.from_plain import from_dict
from tdm.training.presets import BEHIND, MEMORY, OBJECTIVES, presets
from tdm.training.settings import load_config
from tdm.training.tasks.pipeline_settings import PipelineTaskConfig


def test_every_preset_is_sound_and_says_what_it_is_for() -> None:
    assert set(presets()) == {*tiny.FAMILIES, *BEHIND, "bundled", "mixture"}
    for name, line in presets().items():
        load_config(name, ["objective.guidance_scale=2"] if name == "decoupled" else [])
        assert line[0].isupper()
        assert line.endswith(".")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_goes_with_every_memory_class(family: str, memory: str) -> None:
    alone, small, both = load_config(family), load_config(memory), load_config([family, memory])
    assert (both.memory, both.batch_size, both.micro_batch_size) == (
        small.memory,
        small.batch_size,
        small.micro_batch_size,
    )
    assert (both.task, both.student, both.critic, both.trajectory) == (
        alone.task,
        alone.student,
        alone.critic,
        alone.trajectory,
    )
    assert both.micro_batch_size is not None
    assert both.batch_size % both.micro_batch_size == 0
    assert from_dict(PipelineTaskConfig, both.task, "task.").prompts == "prompts.txt"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "bundled"])
def test_every_family_goes_with_every_objective(family: str, objective: str) -> None:
    """An objective preset keeps task, batch size, student and shift. The decoupled one needs guidance."""
    if objective == "decoupled" and load_config(family).objective.guidance_scale == 1:
        with pytest.raises(TDMError, match="a guidance_scale above 1"):
            load_config([family, objective])
        return
    alone, both = load_config(family), load_config([family, objective])
    assert (both.task, both.batch_size, both.student, both.trajectory.shift) == (
        alone.task,
        alone.batch_size,
        alone.student,
        alone.trajectory.shift,
    )
    assert (both.trajectory, both.objective, both.stages) != (alone.trajectory, alone.objective, alone.stages)


def test_a_mistyped_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(TDMError, match=r"sdlx is neither a file nor a preset; did you mean sdxl\?"):
        load_config(["sdlx", "24gb"])
    with pytest.raises(TDMError, match=r"presets: .*'24gb'"):
        load_config("everything")
