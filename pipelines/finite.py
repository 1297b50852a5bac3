"""Pictures that are not finite. Stock pipelines turn NaN into black ones without a word."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import TDMError
from .scheduler import TDMScheduler


@contextlib.contextmanager
def finite_pixels(pipe: Any, drawer: str) -> Iterator[None]:
    """Refuse pixels that are not finite where the pipeline makes pictures of them, for the length of a `with`.

    One look at the end of a call: nothing waits for the device in a step.

    Args:
        pipe: the `TDMPipeline`.
        drawer: who draws, for the message, as in "the student".

    Raises:
        TDMError: pixels are NaN or infinite.
    """
    processor = getattr(pipe, "video_processor", None) or pipe.image_processor
    stock = processor.postprocess

    def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
        _require_finite(pipe, drawer, image)
        return stock(image, *args, **kwargs)

    processor.postprocess = postprocess
    try:
        yield
    finally:
        del processor.postprocess


def finite_latents(pipe: Any, drawer: str, output: Any) -> Any:
    """Return a call's output. One that was asked for as latents must be finite.

    Raises:
        TDMError: latents are NaN or infinite.
    """
    samples = output[0]
    if isinstance(samples, Tensor):
        _require_finite(pipe, drawer, samples)
    return output


def _require_finite(pipe: Any, drawer: str, samples: Tensor) -> None:
    if bool(torch.isfinite(samples).all()):
        return
    x0 = pipe.scheduler.pred_original_sample if isinstance(pipe.scheduler, TDMScheduler) else None
    if x0 is not None and bool(torch.isfinite(x0).all()):
        raise TDMError(
            f"the base's VAE gives NaN or infinite pixels in {_name(pipe.vae.dtype)}, of finite latents: load it in "
            "float32, or its weights are damaged"
        )
    raise TDMError(
        f"{drawer} gives NaN or infinite values in {_name(pipe.denoiser.dtype)}: weights are damaged, or overflow in "
        "this dtype (try bfloat16 or float32)"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
