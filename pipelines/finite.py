"""Pictures that are not finite. Stock pipelines turn NaN into black ones without a word."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import TDMError
from .scheduler import TDMScheduler


@contextlib.contextmanager
def finite_output(pipe: Any, drawer: str) -> Iterator[Callable[[Any], Any]]:
    """Refuse what is not finite, for the length of a `with`: pixels where the pipeline makes pictures of them, and else
    the latents that the call returns.

    One look at the end of a call: nothing waits for the device in a step.

    Args:
        pipe: the `TDMPipeline`.
        drawer: who draws, for the message, as in "the student".

    Yields:
        A function that is given the call's output and returns it.

    Raises:
        TDMError: values are NaN or infinite.
    """
    processor = getattr(pipe, "video_processor", None) or pipe.image_processor
    stock, seen = processor.postprocess, False

    def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen = True
        _require_finite(pipe, drawer, image)
        return stock(image, *args, **kwargs)

    def checked(output: Any) -> Any:
        if not seen and isinstance(output[0], Tensor):
            _require_finite(pipe, drawer, output[0])
        return output

    processor.postprocess = postprocess
    try:
        yield checked
    finally:
        del processor.postprocess


def _require_finite(pipe: Any, drawer: str, samples: Tensor) -> None:
    if _finite(samples):
        return
    x0 = pipe.scheduler.pred_original_sample if isinstance(pipe.scheduler, TDMScheduler) else None
    if x0 is not None and _finite(x0):
        raise TDMError(
            f"the base's VAE gives NaN or infinite pixels in {_name(pipe.vae.dtype)}, of finite latents: load it in "
            "float32, or its weights are damaged"
        )
    raise TDMError(
        f"{drawer} gives NaN or infinite values in {_name(pipe.denoiser.dtype)}: weights are damaged, or overflow in "
        "this dtype (try bfloat16 or float32)"
    )


def _finite(samples: Tensor) -> bool:
    """Whether all values are finite: so is their range, of which NaN and infinities are part."""
    low, high = torch.aminmax(samples)
    return math.isfinite(high - low)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
