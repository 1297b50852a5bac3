"""How a run's batch is split, and what one of its updates costs in passes, for the estimate and for the tests."""

from __future__ import annotations

from dataclasses import replace

from ..errors import TDMError
from .config import DistillConfig
from .objectives import objective_of
from .objectives.passes import Passes
from .objectives.variety import anchor_passes
from .stages import stages_of, total_updates


def passes(config: DistillConfig, processes: int = 1) -> Passes:
    """The passes per sample of an update; for a unified student they are a mean over its step counts.

    Args:
        config: of the run.
        processes: that share a batch, a device each.

    Raises:
        TDMError: the batch cannot be split evenly.
    """
    alone = objective_of(config.objective).passes(config, micro_batches(config, processes) > 1)
    return replace(alone, teacher=alone.teacher + anchor_passes(config))


def head_start_passes(config: DistillConfig, processes: int = 1) -> Passes:
    """The passes per sample of an update that trains the critic alone (``critic.head_start``)."""
    once = replace(config, critic=replace(config.critic, per_student=1, share_noise=False))
    whole, leash = passes(once, processes), int(config.critic.leash > 0)
    return replace(whole, student=1, teacher=leash, score=0, student_backward=0, looked_through=0)


def passes_after(config: DistillConfig, step: int, processes: int = 1) -> float:
    """What the first ``step`` updates of a run cost per sample, in forward passes, over all its stages."""
    total = 0.0
    for stage in stages_of(config):
        head = min(max(step, stage.begin), stage.student_from) - stage.begin
        whole = min(max(step, stage.student_from), stage.end) - stage.student_from
        if head:
            total += head * head_start_passes(stage.config, processes).total
        total += whole * passes(stage.config, processes).total
    return total


def mean_passes(config: DistillConfig, processes: int = 1) -> float:
    """What an update of a run costs per sample, in forward passes: the mean over the run."""
    if not config.stages and not config.critic.head_start:
        return passes(config, processes).total  # to the last digit
    updates = total_updates(config)
    return passes_after(config, updates, processes) / updates


def micro_batch_size(config: DistillConfig, processes: int = 1) -> int:
    """Samples at a time on one device."""
    share = max(1, config.batch_size // processes)
    return min(config.micro_batch_size or share, share)


def micro_batches(config: DistillConfig, processes: int = 1) -> int:
    """Micro batches of one device in an update.

    Raises:
        TDMError: the batch cannot be split evenly.
    """
    if config.batch_size % processes:
        raise TDMError(f"batch_size {config.batch_size} cannot be shared evenly by {processes} processes")
    share, micro = config.batch_size // processes, micro_batch_size(config, processes)
    if share % micro:
        raise TDMError(f"micro_batch_size {micro} does not divide the {share} samples that each process has")
    if micro % config.samples_per_prompt:
        raise TDMError(
            f"the samples of one prompt ({config.samples_per_prompt}) stay together: make micro_batch_size, which is "
            f"{micro}, a multiple of samples_per_prompt"
        )
    return share // micro
