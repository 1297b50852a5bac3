"""The examples in the docstrings and in the README run as they are written, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tdm
from tdm import TDMPipeline, TDMScheduler

ROOT = Path(tdm.__file__).parent
EXAMPLES = {  # what must have an example, by module
    "tdm_pipeline": [
        "TDMPipeline",
        *(
            f"TDMPipeline.{name}"
            for name in ("from_pretrained", "from_pipe", "load_student", "teacher", "save_pretrained", "save_merged")
        ),
        "TDMPipeline.base_first",
        "TDMPipeline.use_attention",
    ],
    "scheduler": [
        "TDMScheduler",
        "TDMScheduler.from_config",
        "TDMScheduler.prediction_type_of",
        "TDMScheduler.set_timesteps",
    ],
    "students.file": ["Student.from_state_dict", "save_student", "read_student"],
    "students.convert": ["convert_lora"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def examples_of(module: ModuleType) -> dict[str, doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(module)
    return {test.name.removeprefix(f"{module.__name__}."): test for test in found if test.examples}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in EXAMPLES.items() for name in names])
def test_an_example_runs_as_written(module: str, name: str) -> None:
    example = examples_of(importlib.import_module(f"tdm.pipelines.{module}"))[name]
    said: list[str] = []
    result = doctest.DocTestRunner().run(example, out=said.append)
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("module", EXAMPLES)
def test_no_example_is_left_out_here(module: str) -> None:
    assert sorted(examples_of(importlib.import_module(f"tdm.pipelines.{module}"))) == sorted(EXAMPLES[module])


def test_the_readmes_python_runs_as_written() -> None:
    """All of it but the blocks marked `py`, which need files that only a reader has."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:  # one after the other, as a reader would type them
        exec(block, names)
    assert len(blocks) >= 4
    assert isinstance(names["pipe"], TDMPipeline)
    assert isinstance(names["pipe"].scheduler, TDMScheduler)
    assert names["image"].size == names["reference"].size == (64, 64)
