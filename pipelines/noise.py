"""Noise from a generator, where the samples are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from ..errors import TDMError

NONE_GIVEN: Any = object()
"""The caller said nothing of a generator; None would be torch's global one."""


def noise_like(x: Tensor, generator: Generator | Sequence[Generator] | None) -> Tensor:
    """Noise in the shape and dtype of samples ``[B, ...]``, on their device.

    Args:
        generator: of the noise; B of them, one for each sample; or None for torch's global one.

    Raises:
        TDMError: no generator was given, not even None.
    """
    if generator is NONE_GIVEN:
        raise TDMError(
            "this student takes fresh noise at each step, and this pipeline gives its scheduler no generator for it: "
            "load the student with TDMPipeline"
        )
    each = generator if generator is None or isinstance(generator, Generator) else list(generator)
    on_host = each is not None and (each if isinstance(each, Generator) else each[0]).device.type == "cpu"
    noise = randn_tensor(
        tuple(x.shape), generator=each, device=torch.device("cpu") if on_host else x.device, dtype=x.dtype
    )
    if on_host and x.device.type == "cuda":  # a copy from memory that is not pinned would wait for the device
        return noise.pin_memory().to(x.device, non_blocking=True)
    return noise.to(x.device)
