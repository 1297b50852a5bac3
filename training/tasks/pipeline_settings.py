"""The settings of a task on a pipeline, and what they mean on its base: sizes, sampler and negative prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import TDMError
from ...pipelines.bases import BUNDLED
from ...pipelines.families import Family, Size
from ...pipelines.scheduler import TDMScheduler
from .prompts import STICKERS


@dataclass(frozen=True)
class PipelineTaskConfig:
    """The ``task`` section of a configuration that distils a pipeline (name=pipeline)."""

    name: str = "pipeline"
    """The kind of task."""

    model: str = BUNDLED
    """Folder or hub id of the base, or the bundled one."""

    loras: tuple[str, ...] = ()
    """LoRAs to merge into the base first, each a path or path@strength. The teacher has them."""

    prompts: str = STICKERS
    """A text file with one prompt a line, or the grammar of the bundled world."""

    prompt_count: int = 4096
    """How many of the grammar's prompts. A file is used whole."""

    cache: str | None = None
    """Folder of what is made once and shared by runs: prompts/, encoded, and pictures/, the teacher's in previews and
    evaluations. None: ~/.cache/tdm."""

    negative_prompt: str | None = None
    """What the teacher's guidance leads away from. None: the empty prompt. base: what the base's authors publish (Wan).
    """

    guidance_norm: str | None = None
    """How the teacher's guidance is normalised, as its pipeline can do it. rescale@0.7: of Stable Diffusion, by
    standard deviation. norm_limit@1: of Z-Image. zero_star: CFG-Zero*, of flow models. None: as the base's own pipeline
    has it, which is token_norm for Qwen-Image, and none for others."""

    height: int | None = None
    """Height in pixels. None: the size that the model was made for."""

    width: int | None = None
    """Width in pixels. None: the size that the model was made for."""

    num_frames: int | None = None
    """Frames of a video. None: as many as the model was made for."""

    sizes: tuple[tuple[int, ...], ...] | None = None
    """Several sizes, each [height, width] or [height, width, num_frames]. Each update draws one. The student's own is
    the first."""

    embedded_guidance: float | None = None
    """The guidance scale that a guidance-distilled network (FLUX.1-dev) gets as an input. None: its default."""

    evaluate: int = 64
    """Held-out prompts per evaluation (the bundled world only)."""

    diversity: int = 0
    """Of these, the prompts that are drawn from four noises each, to compare their variety with the teacher's. The
    teacher's pictures of them take longest, and are kept."""


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
