"""A call whose first step is the base's: `TDMPipeline.base_first`.

A student's pictures of one prompt vary less than its base's, and most of what they show is settled in the first step.
The base makes that step with the student's own scheduler, and the student goes on from there.

The switch sits between two steps, in the pipeline's own callback, and not in the network: a compiled denoiser stays
what it is, and nothing waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..errors import TDMError
from .loras.adapters import adapter_off
from .students.adapter import STUDENT_ADAPTER


def callback_inputs(arguments: Mapping[str, Any]) -> list[str]:
    """The tensors that the callback among the arguments of a call asks for, by name."""
    callback = arguments.get("callback_on_step_end")
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        return list(callback.tensor_inputs)
    return list(arguments.get("callback_on_step_end_tensor_inputs") or ["latents"])


def base_first(pipe: Any, call: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    """Make a call with the student off until its first step is done. See `TDMPipeline.base_first`.

    Args:
        pipe: the `TDMPipeline`.
        call: the stock pipeline's `__call__`.
        bound: its arguments.
    """
    pipe.require_unfused()
    arguments = bound.arguments
    callback, names = arguments.get("callback_on_step_end"), callback_inputs(arguments)
    with adapter_off(pipe.denoiser, STUDENT_ADAPTER) as student_on:

        def on_step_end(pipe: Any, i: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if pipe.num_timesteps < 2:
                raise TDMError("base_first needs 2 steps or more: of one step nothing is left for the student")
            student_on()
            return callback(pipe, i, timestep, tensors) if callback else {}

        arguments["callback_on_step_end"] = on_step_end
        arguments["callback_on_step_end_tensor_inputs"] = names
        return call(*bound.args, **bound.kwargs)
