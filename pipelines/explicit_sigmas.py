"""The `sigmas=` of a call. Flux's pipeline drops them where the scheduler's config has `use_flow_sigmas`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .scheduler import TDMScheduler
from .sigma_grids import noisy_levels


@contextlib.contextmanager
def sigmas_of(pipe: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """The noise levels of a call as the grid of its pipeline's scheduler, for the length of a `with`.

    The user's levels are run exactly, even if they equal those that pipelines pass for "n steps".

    Args:
        pipe: a `TDMPipeline`; nothing happens unless its scheduler is a `TDMScheduler`.
        arguments: of its call; `num_inference_steps` becomes the number of levels.
    """
    scheduler = pipe.scheduler
    if arguments.get("sigmas") is None or not isinstance(scheduler, TDMScheduler):
        yield
        return
    arguments["num_inference_steps"] = len(noisy_levels(arguments["sigmas"]))
    scheduler.explicit_sigmas = arguments["sigmas"]
    try:
        yield
    finally:
        scheduler.explicit_sigmas = None
