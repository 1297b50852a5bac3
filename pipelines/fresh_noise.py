"""The noise of a call whose student takes fresh noise at each step.

A run draws its first latents, then the noise of each step but the last, all from the call's generator: one seed, one
picture, alone and in a batch, here as in ComfyUI. Some stock pipelines give their generator to the scheduler and some
do not, and some keep latents in packed form; here they are all alike.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Generator, Tensor

from .families import Size
from .noise import noise_like
from .picture_noise import generators_of
from .scheduler import TDMScheduler


@contextlib.contextmanager
def noise_of(pipe: Any, call: inspect.BoundArguments) -> Iterator[None]:
    """The noise of a pipeline's scheduler from the generator of a call, for the length of a `with`.

    It is drawn in the shape in which the pipeline draws its first latents, and packed as they are.

    Args:
        pipe: a `TDMPipeline`; nothing happens unless its scheduler takes fresh noise.
        call: arguments of its call, with its size.
    """
    scheduler, arguments = pipe.scheduler, call.arguments
    if not isinstance(scheduler, TDMScheduler) or not scheduler.config["stochastic_sampling"]:
        yield
        return
    family, generator = pipe.family, arguments.get("generator")
    step = family.multiple(pipe)
    size = Size(arguments["height"] // step * step, arguments["width"] // step * step, arguments.get("num_frames"))

    before = None
    if isinstance(generator, Generator) and generator.device.type == "cpu":
        before = Generator().set_state(generator.get_state())  # without what the pipeline is about to draw
    each: list[Generator] = []

    def draw(x: Tensor) -> Tensor:
        x = family.unpack(pipe, x, size)
        noise = noise_like(x, generator)
        if before is not None and len(x) > 1:
            if not each:
                first_noise = x.shape[1:] if arguments.get("latents") is None else None
                each.extend(generators_of(before, range(len(x)), first_noise))
            noise = noise_like(x, each)
        return family.pack(noise)

    scheduler.noise_source = draw
    try:
        yield
    finally:
        scheduler.noise_source = None
