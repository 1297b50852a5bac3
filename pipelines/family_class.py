"""A pipeline class of ours on top of a stock one: how it is made, built from a loaded pipeline, and unpickled."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from .families import Family, family_of_pipeline
from .loras.encoders import adaptable_encoders

_CALL_NOTE = """Draw, with the student's own settings where the call says nothing.

Steps, guidance scale, height, width and, of a video, the number of frames are the student's: `pipe.call_defaults()`
names them. In `pipe.teacher()` steps and guidance scale are the base's. The defaults that the stock pipeline states
below hold for all other arguments."""


@functools.cache
def on_family(above: Any, family: Family) -> Any:
    """A class on top of a family's pipeline class, under its stock name: `save_pretrained` writes that down.

    Args:
        above: the class to put on top, with a method `run` that is given the stock call and its arguments.
        family: whose pipeline class is below.
    """
    stock = family.pipeline_class()
    call: Any = stock.__call__

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return self.run(call, args, kwargs)

    __call__.__doc__ = f"{_CALL_NOTE}\n\n{call.__doc__ or ''}"
    names = {"__call__": __call__, "__doc__": above.__doc__}
    if encoders := adaptable_encoders(stock):
        names["_lora_loadable_modules"] = [family.denoiser, *encoders]
    return type(family.pipeline, (above, stock), names)


def forget_output_capture(module: nn.Module) -> None:
    """Take off the hooks that transformers leaves in a text encoder after its first call, and that do not pickle.

    It puts them on again at the next call.
    """
    for part in module.modules():
        attributes = vars(part)
        attributes.pop("_output_capturing_hooks_installed", None)
        hooks = attributes["_forward_hooks"]
        for key in [
            key
            for key, hook in hooks.items()
            if getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
        ]:
            del hooks[key]


def unpickled(above: Any, pipeline: str) -> Any:
    """An empty pipeline on the stock class of this name, which then gets its state."""
    family = family_of_pipeline(pipeline)
    pipe = object.__new__(on_family(above, family))
    pipe.family = family
    return pipe


def from_pipe(above: type, pipeline_class: type, pipeline: DiffusionPipeline, options: Mapping[str, Any]) -> Any:
    """The stock `from_pipe` on a class of ours. Nothing is cast unless the options have a dtype.

    The stock one casts to float32 where none is given. The networks are shared, so the caller's own pipeline would be
    cast as well, and a quantised network refuses it.

    Args:
        above: the class whose own `from_pipe` is passed over.
        pipeline_class: the class of the new pipeline.
        pipeline: whose networks it gets.
        options: what the stock method takes.
    """
    cast = options.get("dtype") is not None or options.get("torch_dtype") is not None
    uncast = type(pipeline_class.__name__, (pipeline_class,), {"to": lambda self, *_args, **_options: self})
    loader: Any = super(above, pipeline_class if cast else uncast)
    pipe = loader.from_pipe(pipeline, **options)
    pipe.__class__ = pipeline_class
    return pipe
