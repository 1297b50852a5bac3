"""The structure of the code: what imports what, and how often a call goes from file to file."""

from __future__ import annotations

import ast
import functools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tdm
from tdm import TDMPipeline, TDMScheduler
from tdm.tests.test_package import tracked
from tdm.training.export import export_merged, read_run
from tdm.training.loop import distill
from tdm.training.settings import load_config
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.tasks.pipeline_settings import PipelineTaskConfig

ROOT = Path(os.path.realpath(Path(tdm.__file__).parent))
PRODUCT = [Path(n) for n in tracked() if n.endswith(".py") and not n.startswith(("tests/", "docs/", "examples/"))]
# Of libraries: they are the only way to what is needed, and each place says why.
THEIRS = {
    "_replace", "_asdict", "_exit", "_active_adapter", "_hf_peft_config_loaded", "_execution_device",
    "_get_add_time_ids", "_encode_prompt", "_foreach_lerp_", "_cdata", "_execute_tool_without_progress",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_compiled_call_impl",
}  # fmt: skip


def modules() -> dict[str, Path]:
    return {".".join(p.with_suffix("").parts).removesuffix(".__init__"): p for p in PRODUCT}


def imports() -> Iterator[tuple[Path, Path, str]]:
    """(importing file, imported file, name) of every import between files of the package."""
    known = modules()
    for path in PRODUCT:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1]
            target = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                for module in (f"{target}.{alias.name}", target):
                    if module in known:
                        yield path, known[module], alias.name
                        break


def folders() -> list[Path]:
    return sorted({parent for path in PRODUCT for parent in path.parents if parent != Path()})


@pytest.mark.parametrize("folder", folders(), ids=str)
def test_no_rooms_of_a_folder_import_each_other_in_a_loop(folder: Path) -> None:
    """A room is a file of the folder, or a subfolder with all that it holds."""
    graph: dict[str, set[str]] = defaultdict(set)
    for source, target, _ in imports():
        if source.is_relative_to(folder) and target.is_relative_to(folder):
            rooms = (source.relative_to(folder).parts[0], target.relative_to(folder).parts[0])
            if rooms[0] != rooms[1] and rooms[1] != "__init__.py":
                graph[rooms[0]].add(rooms[1])
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"{folder}: {' -> '.join(error.args[1])}")


def test_the_floors_stand_on_each_other() -> None:
    below = {
        "pipelines": {"errors.py", "files.py", "sheet.py"},
        "bench": {"errors.py", "files.py", "pipelines"},
        "training": {"errors.py", "files.py", "sheet.py", "pipelines", "bench"},
        "comfy_nodes": {"errors.py", "files.py", "pipelines"},
        "prove": {"errors.py", "files.py", "chatter.py", "pipelines", "bench", "training"},
    }
    for source, target, _ in imports():
        here, there = source.parts[0], target.parts[0]
        if here in below and there != here:
            assert there in below[here], f"{source} imports {target}"


def test_no_module_reads_the_private_names_of_another() -> None:
    private = [f"{s} imports {name} of {t}" for s, t, name in imports() if name.startswith("_") and s != t]
    for path in PRODUCT:
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "super")
            mine = mine or isinstance(node.value, ast.Call)  # super()._x()
            if not mine and node.attr not in THEIRS and not _defines(path, node.attr):
                private.append(f"{path}:{node.lineno} reads {node.attr}")
    assert not private


def _defines(path: Path, name: str) -> bool:
    """Whether a file sets or defines a private name itself, as a class does for its constructors."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return any(
        mark in text for mark in (f"self.{name} =", f"self.{name}:", f"def {name}(", f"    {name}:", f"    {name} =")
    )


# ---------------------------------------------------------------------- how far a call travels


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = ["updates=1", "batch_size=2", "output.preview_every=0", "output.evaluate_every=0"]
    task = PipelineTask(PipelineTaskConfig(prompt_count=4, evaluate=0, cache=str(folder / "cache")))
    distill(task, load_config("bundled", settings), folder / "run", report=lambda _: None)
    return folder / "run"


def test_a_merged_export_needs_few_moves_between_files(run_folder: Path, tmp_path: Path) -> None:
    """A move is a call of the package's code in another file, whatever library code stands between the two."""
    moves: Counter[tuple[str, str, str]] = Counter()
    homes: dict[str, str | None] = {}

    def home(frame: FrameType) -> str | None:
        name = frame.f_code.co_filename
        if name not in homes:
            path = Path(os.path.realpath(name)) if os.path.isabs(name) else Path("/")
            ours = path.is_relative_to(ROOT) and path.relative_to(ROOT) in PRODUCT
            homes[name] = str(path.relative_to(ROOT)) if ours else None
        return homes[name]

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (here := home(frame)) is None:
            return
        caller = frame.f_back
        while caller is not None and home(caller) is None:
            caller = caller.f_back
        if caller is not None and home(caller) != here:
            moves[home(caller) or "", here, frame.f_code.co_name] += 1

    run = read_run(run_folder)
    assert run is not None
    sys.setprofile(count)
    try:
        export_merged(run, tmp_path / "merged")
    finally:
        sys.setprofile(None)
    assert 0 < moves.total() < 100, moves.most_common(20)


def test_loading_a_student_builds_two_samplers_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    init = TDMScheduler.__init__

    @functools.wraps(init)  # diffusers reads the arguments off it
    def counted(self: TDMScheduler, *args: Any, **kwargs: Any) -> None:
        built.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(TDMScheduler, "__init__", counted)
    pipe = TDMPipeline.from_pretrained()
    assert 1 <= len(built) <= 2
    assert any(pipe.scheduler is scheduler for scheduler in built)
