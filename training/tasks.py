"""The tasks that a configuration can name."""

from __future__ import annotations

from typing import Any

from ..errors import TDMError
from .config import from_dict
from .loop import Task


def build_task(section: dict[str, Any]) -> Task:
    """The task of a configuration's ``task`` section: ``name: mixture`` or ``name: pipeline``, with its settings.

    Raises:
        TDMError: an unknown name or setting, or what the task itself refuses.
    """
    name = section.get("name")
    if name == "mixture":
        from .mixture import MixtureTask

        return MixtureTask(**{key: value for key, value in section.items() if key != "name"})
    if name == "pipeline":
        from .pipeline_task import PipelineTask, PipelineTaskConfig

        return PipelineTask(from_dict(PipelineTaskConfig, section, "task."))
    raise TDMError(f"task.name must be 'pipeline' or 'mixture', not {name!r}")
