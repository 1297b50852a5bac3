"""How the frozen base is stored: in full, in 16 or 8 bits, in 4; adapters train on each of them.

Whatever the storage, a layer computes in one dtype (bf16 on a GPU, float32 on a CPU; fp32, bf16 and fp16 in their own)
and the adapters are float32. The backward pass keeps what a layer computed with: fp8 and offload save memory beyond the
student's own forward only with `memory.gradient_checkpointing`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import TDMError
from ..config import MemoryConfig, Storage

_PLAIN: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def storage_on(memory: MemoryConfig, device: torch.device) -> Storage:
    """The storage of the base on a device, with `auto` settled.

    Raises:
        TDMError: it does not work there.
    """
    gpu = device.type == "cuda"
    if memory.offload and not gpu:
        raise TDMError("memory.offload is for a GPU; on a CPU the base is in main memory anyway: set it to false")
    if memory.base == "auto":
        return "bf16" if gpu else "fp32"
    needed = {"nf4": "bitsandbytes", "llm_int8": "bitsandbytes", "int8": "torchao"}.get(memory.base)
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise TDMError(f"memory.base={memory.base} needs {needed}, which is not installed: pip install {needed}")
    return memory.base


def compute_dtype(storage: Storage, device: torch.device) -> torch.dtype:
    """What the layers of a base compute in."""
    return _PLAIN.get(storage, torch.bfloat16 if device.type == "cuda" else torch.float32)


def stored(
    load: Callable[[torch.dtype], Any],
    memory: MemoryConfig,
    device: torch.device,
    merge_loras: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, torch.dtype]:
    """The frozen denoiser of a base on its device, and the dtype that it computes in.

    Args:
        load: the network with weights of a dtype, in main memory.
        memory: how it is stored.
        device: where it computes.
        merge_loras: changes the weights before they are made smaller.

    Raises:
        TDMError: the storage does not work here, the network cannot be offloaded, or what ``load`` raises.
    """
    storage = storage_on(memory, device)
    dtype = compute_dtype(storage, device)
    network = load(dtype)
    network.eval().requires_grad_(False)
    if merge_loras is not None:
        merge_loras(network)
    if storage == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(network, Int8WeightOnlyConfig(), device=device)
    elif storage in ("llm_int8", "nf4"):
        _to_bitsandbytes(network, _nf4 if storage == "nf4" else _llm_int8, device, dtype)
    elif storage == "fp8":
        # A convolution keeps its own weight for the backward pass and would find it in 8 bits; linear layers do not.
        network.enable_layerwise_casting(torch.float8_e4m3fn, dtype, skip_modules_classes=_CONVOLUTIONS)
    if memory.offload:
        _offload(network, device)
    else:
        network.to(device)
    return network, dtype


def _to_bitsandbytes(
    network: nn.Module,
    smaller: Callable[[nn.Linear, torch.dtype], nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Linear layers made smaller, one at a time on the device. Not diffusers' own way, which reads a file into 4 or 8
    bits: there LoRAs could not be merged first, and a CPU is refused that bitsandbytes serves.
    """
    whole = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())  # by diffusers: what asks weights for a dtype
    for place, module in list(network.named_modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not nn.Linear or any(part in f"{place}.{name}".split(".") for part in whole):
                continue
            small = smaller(layer, dtype)
            small.bias = layer.bias
            setattr(module, name, small.to(device))


def _nf4(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """QLoRA's NF4, in blocks of 64."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    shape = layer.in_features, layer.out_features, layer.bias is not None
    small = Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
    small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
    small.support_avx512bf16_for_cpu = False  # its repacking is for inference, and not of every shape
    return small


def _llm_int8(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:  # noqa: ARG001
    """LLM.int8(): rows of the weight in 8 bits, outliers among the activations (beyond 6) in 16."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    shape = layer.in_features, layer.out_features, layer.bias is not None
    small = Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
    small.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return small


def can_offload(network: nn.Module) -> bool:
    """Whether a network can be trained from main memory: not through convolutions, whose backward pass, as above, would
    find their weights there.
    """
    return not any("block" in name and isinstance(m, _CONVOLUTIONS) for name, m in network.named_modules())


def _offload(network: Any, device: torch.device) -> None:
    if not can_offload(network):
        raise TDMError(
            f"memory.offload cannot train through convolutions, which {type(network).__name__} has; set it to false"
        )
    network.enable_group_offload(
        onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=True
    )
