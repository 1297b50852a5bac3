"""Everything that `tdm distill` would refuse, its settings, and what it would take: nothing is trained or written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TDMError

if TYPE_CHECKING:
    from ..training.config import DistillConfig


def dry_run(config: DistillConfig, out: Path, *, resume: bool) -> str:
    """The merged settings, as YAML that `tdm distill` reads, the estimate of the run, and whether it can be exported.

    Raises:
        TDMError: what the run itself would refuse: prompts, base, sizes, grid, folder, an earlier checkpoint.
    """
    import yaml

    from ..training.export import unexportable

    _check_files(config, out, resume)
    settings = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)
    reason = unexportable(config) if config.task.get("name") == "pipeline" else None
    note = "" if reason is None else f"\n\nnote: there will be nothing to export at the end: {reason}"
    return f"{settings}\n{_check_task(config)}{note}"


def _check_files(config: DistillConfig, out: Path, resume: bool) -> None:
    from ..training.folder import check_run

    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise TDMError(
            f"cannot make the folder {out}: {there} is not a folder that can be written; choose another --out"
        )
    check_run(out, config, resume=resume)


def _check_task(config: DistillConfig) -> str:
    """Describe what the run will take. Building task and trajectory in outline checks them."""
    from ..training.stages import stages_of
    from ..training.trajectory import build_trajectories

    if config.task.get("name") != "pipeline":
        from ..training.tasks import build_task

        task = build_task(config.task, config.memory, "cpu")
        for stage in stages_of(config):
            build_trajectories(stage.config.trajectory, task.schedule)
        return "no estimate: that is for pipelines"
    from ..pipelines.base_weights import check_files
    from ..pipelines.bases import base_folder
    from ..training.estimate.estimator import Estimator
    from ..training.from_plain import from_dict
    from ..training.tasks.pipeline_settings import PipelineTaskConfig
    from ..training.tasks.prompts import training_prompts
    from .estimate import table

    pipeline = from_dict(PipelineTaskConfig, config.task, "task.")
    training_prompts(pipeline.prompts, pipeline.prompt_count)
    check_files(base_folder(pipeline.model))
    return table(Estimator()(config))


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
