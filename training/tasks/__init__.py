"""The tasks that a configuration can name."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import TDMError
from ..config import MemoryConfig
from ..from_plain import from_dict
from ..progress import Report, print_line
from ..task import Task


def build_task(
    section: dict[str, Any], memory: MemoryConfig, device: str | torch.device, report: Report = print_line
) -> Task:
    """The task of a configuration's ``task`` section: ``name: mixture`` or ``name: pipeline``, with its settings.

    Args:
        memory: how the base is stored.
        device: where it computes. The mixture is small and always on the CPU.
        report: takes the progress lines of what takes long: encoding the prompts, drawing pictures.

    Raises:
        TDMError: an unknown name or setting, or what the task itself refuses.
    """
    name = section.get("name")
    if name == "mixture":
        from .mixture import MixtureTask, MixtureTaskConfig

        if memory.base not in ("auto", "fp32") or memory.offload:
            raise TDMError("the mixture is computed in float32 on the CPU: leave memory.base and memory.offload out")
        mixture = from_dict(MixtureTaskConfig, section, "task.")
        return MixtureTask(mixture.kind, mixture.width, mixture.samples)
    if name == "pipeline":
        from .pipeline import PipelineTask
        from .pipeline_settings import PipelineTaskConfig

        return PipelineTask(from_dict(PipelineTaskConfig, section, "task."), memory, device, report)
    raise TDMError(f"task.name must be 'pipeline' or 'mixture', not {name!r}")
