"""Counting network calls as they happen: every number of calls that this project prints was counted here.

The unit is a sample that went through the network. Classifier-free guidance makes two of them for each picture and
step, in one batch or in two calls; a network that takes its guidance scale as an input makes one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Calls:
    """How many samples went through a network so far."""

    samples: int = 0


@contextlib.contextmanager
def count_calls(network: nn.Module, on_call: Callable[[int], Any] | None = None) -> Iterator[Calls]:
    """Count the samples that go through a network, for the length of a `with`.

    The count is read from shapes: nothing waits for the device. It holds for networks under `torch.compile` too, whose
    compiled code stays as it is.

    Args:
        network: a denoiser as a pipeline has it; what `torch.compile` returned counts as well as what it was given.
        on_call: called after each network call with its number of samples.

    >>> from tdm import TDMPipeline
    >>> pipe = TDMPipeline.from_pretrained()
    >>> with count_calls(pipe.transformer) as calls:
    ...     images = pipe(["a red star", "a blue ring"]).images
    >>> calls.samples
    8
    """
    calls = Calls()

    def count(output: Any) -> None:
        samples = len(output[0])  # of a tuple or a diffusers output; a tensor [B, ...], or a list of B
        calls.samples += samples
        if on_call is not None:
            on_call(samples)

    compiled = network._compiled_call_impl  # of `network.compile()`, whose traced code would not see a new hook
    if compiled is None:
        with network.register_forward_hook(lambda _module, _args, output: count(output)):
            yield calls
        return

    def counted(*args: Any, **kwargs: Any) -> Any:
        output = compiled(*args, **kwargs)
        count(output)
        return output

    network._compiled_call_impl = counted
    try:
        yield calls
    finally:
        network._compiled_call_impl = compiled
