"""Measure how much memory the tensors of a piece of work hold at a time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Follows every tensor that an operator makes inside the `with`, until its memory is free.

    Args:
        device: count tensors on devices of this type only, such as "meta"; None counts all.

    Attributes:
        live, peak: bytes now, and the most at any time.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        inputs, outputs = list(_tensors((args, *kwargs.values()))), list(_tensors((out,)))
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = {t.untyped_storage()._cdata: t for t in outputs if self.device in (None, t.device.type)}
        for address in new.keys() - known:
            storage = new[address].untyped_storage()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        if inputs or outputs:  # others are such as promote_types
            self.record(function, args, kwargs, out, len(new.keys() - known))
        return out

    def record(self, function: Any, args: Any, kwargs: Any, out: Any, allocations: int) -> None:
        """Take in an operator on tensors; called after each, with the number of memories that it allocated."""

    def _free(self, size: int) -> None:
        self.live -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
