"""diffusers' `from_pipe`, which casts all networks to one dtype, without that cast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline


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
