"""What the settings of a task mean on its base: sizes, sampler and negative prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import TDMError
from ...pipelines.families import Family, Size
from ...pipelines.scheduler import TDMScheduler

if TYPE_CHECKING:
    from .pipeline import PipelineTaskConfig


def sizes_of(config: PipelineTaskConfig, family: Family, pipe: Any) -> list[Size]:
    """The sizes that a run draws from.

    Args:
        config: of the task.
        family, pipe: of the base; weights are not looked at.

    Raises:
        TDMError: sizes given twice, or what the base has no use for, embedded guidance among it.
    """
    if config.embedded_guidance is not None and not family.embeds_guidance(pipe):
        raise TDMError("task.embedded_guidance is for guidance-distilled networks; this base takes none: leave it out")
    default = family.default_size(pipe)
    if config.sizes is None:
        requested: Sequence[tuple[int | None, ...]] = [(config.height, config.width, config.num_frames)]
    elif (config.height, config.width, config.num_frames) != (None, None, None) or not config.sizes:
        raise TDMError("give task.sizes, a list of [height, width], or task.height and task.width, not both")
    else:
        requested = config.sizes
    sizes = []
    for numbers in requested:
        if len(numbers) not in (2, 3):
            raise TDMError(f"a size in task.sizes is [height, width] or [height, width, num_frames], not {numbers}")
        height, width, num_frames = (*numbers, None)[:3]
        if num_frames is not None and not family.video:
            raise TDMError(f"num_frames is {num_frames}, but {family.name} makes pictures; leave it out")
        size = Size(
            default.height if height is None else height,
            default.width if width is None else width,
            default.num_frames if num_frames is None else num_frames,
        )
        family.latent_shape(pipe, size)  # refuses what does not fit
        sizes.append(size)
    return sizes


def scheduler_of(pipe: Any, folder: str) -> TDMScheduler:
    """The sampler of students on a base, which has the noise schedule.

    Raises:
        TDMError: the base's scheduler has a setting that no student can have; the file that has it is named.
    """
    try:
        scheduler: Any = TDMScheduler.from_config(pipe.scheduler.config)
    except TDMError as error:
        raise TDMError(f"{error} (in {folder}/scheduler/scheduler_config.json)") from None
    return scheduler


def negative_prompt_of(config: PipelineTaskConfig, family: Family) -> str:
    """The text of ``task.negative_prompt``; "" is none.

    Raises:
        TDMError: the family's base has no published one.
    """
    if config.negative_prompt != "base":
        return config.negative_prompt or ""
    if family.published_negative_prompt is None:
        raise TDMError(
            f"task.negative_prompt=base: no negative prompt is published for {family.name}; write one, or leave it out"
        )
    return family.published_negative_prompt
