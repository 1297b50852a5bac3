"""The examples in docstrings and documentation run as they are written, and the links between pages hold."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import tdm
from tdm import TDMPipeline, TDMScheduler

ROOT = Path(tdm.__file__).parent
EXAMPLES = {  # what must have an example, by module
    "pipelines.tdm_pipeline": [
        "TDMPipeline",
        *(
            f"TDMPipeline.{name}"
            for name in ("from_pretrained", "from_pipe", "load_student", "teacher", "base_first", "use_attention")
        ),
        "TDMPipeline.teacher_call",
    ],
    "pipelines.calls": ["count_calls"],
    "pipelines.scheduler": [
        "TDMScheduler",
        "TDMScheduler.from_config",
        "TDMScheduler.prediction_type_of",
        "TDMScheduler.set_timesteps",
    ],
    "pipelines.students.file": ["Student.from_state_dict", "save_student", "read_student"],
    "pipelines.students.saving": ["StudentSaving.save_pretrained", "StudentSaving.save_merged"],
    "pipelines.students.convert": ["convert_lora"],
    "training": ["tdm.training"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def examples_of(module: ModuleType) -> dict[str, doctest.DocTest]:
    tests = doctest.DocTestFinder(exclude_empty=True).find(module)
    return {test.name.removeprefix(f"{module.__name__}."): test for test in tests if test.examples}


def pages() -> list[str]:
    """The documentation for readers of the repository, as paths in it."""
    guides = sorted((ROOT / "docs").glob("*.md"))
    return ["README.md", "bundled/README.md", "training/README.md", *(f"docs/{guide.name}" for guide in guides)]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in EXAMPLES.items() for name in names])
def test_an_example_runs_as_written(module: str, name: str) -> None:
    example = examples_of(importlib.import_module(f"tdm.{module}"))[name]
    output: list[str] = []
    result = doctest.DocTestRunner().run(example, out=output.append)
    assert not result.failed, "".join(output)


@pytest.mark.parametrize("module", EXAMPLES)
def test_no_example_is_left_out_here(module: str) -> None:
    assert sorted(examples_of(importlib.import_module(f"tdm.{module}"))) == sorted(EXAMPLES[module])


PAGES = {  # pages with Python that runs as written, and the variables that hold a picture after it
    "README.md": ["image"],
    "docs/sampling.md": ["image", "reference", "redrawn", "varied"],
}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_as_written(page: str) -> None:
    """Run all Python blocks of a page except those marked `py`, which need files that only a reader has."""
    names: dict[str, Any] = {}
    for block in python_blocks(ROOT / page):  # one after the other, as a reader would type them
        exec(block, names)
    assert isinstance(names["pipe"], TDMPipeline)
    assert isinstance(names["pipe"].scheduler, TDMScheduler)
    assert {names[picture].size for picture in PAGES[page]} == {(64, 64)}


def test_no_page_with_python_is_left_out_here() -> None:
    assert {page for page in pages() if python_blocks(ROOT / page)} == set(PAGES)


@pytest.mark.parametrize("page", pages())
def test_the_links_of_a_page_lead_to_files_and_headings(page: str) -> None:
    """Check relative links and pictures. A link to a part of a page must lead to a heading there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code((ROOT / page).read_text())):
        path, _, heading = link.partition("#")
        if urlsplit(link).scheme:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (heading and heading not in anchors(target)):
            broken.append(link)
    assert not broken
