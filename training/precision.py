"""Mixed precision that is also fast and safe on CPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Precision = Literal["fp32", "bf16"]

# Where the time of a network goes; a product that is not here is computed by torch: more slowly, with the same result.
PRODUCTS = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__)


def best_precision(device: str) -> Precision:
    """bf16 where the device multiplies it in hardware, fp32 elsewhere (where bf16 would be no faster)."""
    if device == "cpu":
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return "bf16" if can.get("avx512_bf16") or can.get("amx_bf16") else "fp32"
    return "bf16" if device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


class Bf16OnCpu(TorchFunctionMode):
    """What bf16 autocast is better off without on a CPU; everything else stays as autocast has it.

    ``scaled_dot_product_attention`` runs in float32. On CPUs with bfloat16 units a bf16 product is 4-5 times faster
    than float32, but the backward of bf16 attention is 5 times slower than that of float32 attention (AMD EPYC, torch
    2.13); this keeps the gain and drops the loss.

    On CPUs without such units torch multiplies bf16 5 to 10 times slower than float32 (AMD EPYC with AVX2 alone, torch
    2.13), so products run in float32 there, on numbers that are rounded to bf16, and give bf16: the same except for the
    order of sums. float64 is left alone, as by autocast.

    Args:
        units: whether the CPU multiplies bf16 in hardware.
    """

    def __init__(self, units: bool) -> None:
        super().__init__()
        self.units = units

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _in_float32(func, args, kwargs)
        if self.units or func not in PRODUCTS or _has_float64(*args, *kwargs.values()):
            return func(*args, **kwargs)
        return _in_float32(func, args, kwargs, rounded=torch.bfloat16).to(torch.bfloat16)


def _has_float64(*values: Any) -> bool:
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in values)


def _in_float32(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rounded: torch.dtype = torch.float32
) -> Any:
    """Compute without autocast on float32 tensors that were `rounded` first. Gradients are rounded on the way back."""

    def up(value: Any) -> Any:
        return value.to(rounded).float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with torch.autocast("cpu", enabled=False):
        return func(*map(up, args), **{name: up(value) for name, value in kwargs.items()})


@contextlib.contextmanager
def autocast(precision: Precision, device: str = "cpu") -> Iterator[None]:
    """Autocast for one forward: ``fp32`` does nothing, ``bf16`` on a CPU is as in `Bf16OnCpu`."""
    with contextlib.ExitStack() as stack:
        if precision == "bf16":
            stack.enter_context(torch.autocast(device, torch.bfloat16))
            if device == "cpu":
                stack.enter_context(Bf16OnCpu(units=best_precision("cpu") == "bf16"))
        yield
