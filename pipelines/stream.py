"""A pipeline call, step by step: `TDMPipeline.stream`.

The stock `__call__` cannot yield. It runs in a thread of its own and hands each step over from its callback, then waits
until the next one is asked for: consumer and pipeline never run at the same time. A thread, and not a coroutine of some
kind, because consumers such as Gradio resume a generator from whatever thread is free.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .base_first import callback_inputs
from .families import Size
from .preview import preview
from .scheduler import TDMScheduler


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a run, as `TDMPipeline.stream` yields it.

    Attributes:
        index: which step, from 1; the item with the output repeats the last one.
        total: how many steps the run has.
        latents: the clean sample x0 predicted at this step, in the pipeline's own layout and scale. A teacher's stock
            scheduler does not keep it: then the sample after the step, with the noise that is left in it.
        output: on the last item what `pipe(...)` returns; None before.
    """

    index: int
    total: int
    latents: Tensor
    output: Any
    _timestep: Tensor
    _draw: Callable[[Tensor], list[Image.Image]]

    @property
    def timestep(self) -> float:
        """The timestep that the network was called at (read from the device when asked for)."""
        return float(self._timestep)

    @cached_property
    def preview(self) -> list[Image.Image]:
        """`latents` as small pictures, one per sample (see `preview.py`); decoded only when asked for."""
        return self._draw(self.latents)


class _Cancelled(BaseException):
    """Ends a run that nobody wants to see the end of; a BaseException like GeneratorExit, since it is no error."""


def stream(pipe: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Generator[Step, None, None]:
    """See `TDMPipeline.stream`, whose pipeline this is given."""
    call = pipe.bind_call(args, kwargs)
    arguments = call.arguments
    callback, names = arguments.get("callback_on_step_end"), callback_inputs(arguments)
    draw = partial(preview, pipe, size=Size(arguments["height"], arguments["width"], arguments.get("num_frames")))
    carried = _thread_settings(pipe.device)
    handed_over: SimpleQueue[Step | BaseException] = SimpleQueue()
    go_on: SimpleQueue[bool] = SimpleQueue()
    last: Step

    def on_step_end(pipe: Any, i: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        changed = callback(pipe, i, timestep, {name: tensors[name] for name in names}) if callback else {}
        x0 = pipe.scheduler.pred_original_sample if isinstance(pipe.scheduler, TDMScheduler) else None
        latents = changed.get("latents", tensors["latents"]) if x0 is None else x0
        last = Step(i + 1, pipe.num_timesteps, latents, None, timestep, draw)
        handed_over.put(last)
        if not go_on.get():
            raise _Cancelled
        return changed

    def run() -> None:
        try:
            with contextlib.ExitStack() as settings:
                for setting in carried:
                    settings.enter_context(setting)
                with pipe.turns.turn(streaming=True):
                    output = type(pipe).__call__(*call.args, **call.kwargs)
            handed_over.put(replace(last, output=output))
        except _Cancelled:
            pipe.maybe_free_model_hooks()  # what the end of a call does: offloaded networks leave the device
        except BaseException as error:  # all others belong to the consumer
            handed_over.put(error)

    arguments["callback_on_step_end"] = on_step_end
    arguments["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys([*names, "latents"]))
    # A daemon: an interpreter that exits does not wait for a consumer that never asked for the rest.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="tdm-stream", daemon=True)
    thread.start()
    item: Step | BaseException | None = None
    try:
        while True:
            item = handed_over.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.output is not None:
                break
            go_on.put(True)
    finally:
        go_on.put(False)  # stops a run that is not over at its next step, or at the one it waits in
        thread.join()
        del item  # an error holds this frame, and those of the pipeline with all their tensors


def _thread_settings(device: torch.device) -> list[contextlib.AbstractContextManager[Any]]:
    """This thread's settings of torch, to be entered in another one. Gradients the pipelines switch off themselves."""
    settings: list[contextlib.AbstractContextManager[Any]] = []
    if torch.is_inference_mode_enabled():
        settings.append(torch.inference_mode())
    for kind in {"cpu", device.type}:
        if torch.is_autocast_enabled(kind):
            cached = torch.is_autocast_cache_enabled()
            settings.append(torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=cached))
    if torch.get_default_device() != torch.device("cpu"):
        settings.append(torch.get_default_device())
    if torch.cuda.is_initialized():
        settings.append(torch.cuda.stream(torch.cuda.current_stream()))  # its device too
    return settings
