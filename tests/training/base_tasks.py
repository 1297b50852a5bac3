"""The task of distilling one of the tiny pipelines, and what comes out of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tdm.pipelines.base_weights import component_classes
from tdm.tests import tiny
from tdm.training.config import MemoryConfig
from tdm.training.export import FinishedRun, read_run
from tdm.training.progress import Report, print_line
from tdm.training.run import Run
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.tasks.pipeline_settings import PipelineTaskConfig

PROMPTS = ["a red cube", "two stars above a tree", "a cat"]


def task_of(
    family: str,
    base: Path,
    prompts: str,
    memory: MemoryConfig | None = None,
    report: Report = print_line,
    **changes: Any,
) -> PipelineTask:
    """Return the task at the size that tests call the family's pipeline with."""
    call = tiny.call_kwargs(family)
    size = {"height": call["height"], "width": call["width"], "num_frames": call.get("num_frames")}
    config = PipelineTaskConfig(model=str(base), prompts=prompts, **{**size, **changes})
    return PipelineTask(config, memory, report=report)


def trained(run: Run) -> FinishedRun:
    """The student of a finished run."""
    finished = read_run(run.out_dir)
    assert finished is not None
    return finished


def configs_of(base: Path, folder: Path) -> Path:
    """A copy of a base's configs in ``folder``, laid out as those of published bases: no weights, no tokenizers."""
    named = json.loads((base / "model_index.json").read_text())
    kept = {name: entry for name, entry in named.items() if not name.startswith("tokenizer")}
    for name in component_classes(kept):
        shutil.copytree(base / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model_index.json").write_text(json.dumps(kept))
    return folder
