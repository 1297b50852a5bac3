"""Fixtures of the tests of `TDMPipeline`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tdm import TDMPipeline
from tdm.pipelines.families import family_of_name
from tdm.pipelines.students.file import Student, save_student
from tdm.tests import tiny
from tdm.tests.pipelines.students import Make, load, lora_for, recipe_for


@pytest.fixture
def make(bases: Callable[[str], Path], tmp_path: Path) -> Make:
    """Writes a student file for a tiny base, and returns its path."""

    def student(base: str, name: str = "student.safetensors", seed: int = 0, **changes: Any) -> Path:
        denoiser = getattr(tiny.build(base), family_of_name(base).denoiser)
        recipe = recipe_for(base, bases(base), **changes)
        return save_student(
            tmp_path / name, Student.from_state_dict(recipe, lora_for(denoiser, seed), alpha=4), force=True
        )

    return student


@pytest.fixture(scope="module")
def loaded(bases: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TDMPipeline]:
    """A tiny pipeline of a family with some student in it, to load others into."""
    pipes: dict[str, TDMPipeline] = {}

    def pipe(family: str) -> TDMPipeline:
        if family not in pipes:
            file = tmp_path_factory.mktemp(family) / "first.pt"
            denoiser = getattr(tiny.build(family), family_of_name(family).denoiser)
            torch.save(lora_for(denoiser), file)
            pipes[family] = load(bases(family), student=file, recipe=vars(recipe_for(family, bases(family))))
        return pipes[family]

    return pipe
