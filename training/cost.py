"""How a run's batch is split, and what one of its updates costs in passes, for the estimate and for the tests."""

from __future__ import annotations

from ..errors import TDMError
from .config import DistillConfig
from .objectives import objective_of
from .objectives.passes import Passes


def passes(config: DistillConfig, processes: int = 1) -> Passes:
    """The passes per sample of an update; for a unified student they are a mean over its step counts.

    Args:
        config: of the run.
        processes: that share a batch, a device each.

    Raises:
        TDMError: the batch cannot be split evenly.
    """
    return objective_of(config.objective).passes(config, micro_batches(config, processes) > 1)


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
    return share // micro
