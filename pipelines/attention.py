"""Which kernel computes a denoiser's attention: the best one that really works here, or a named one, said by name.

Diffusers has two ways. Flux, Wan, Z-Image, Qwen-Image and Krea 2 go through its dispatcher (`set_attention_backend`).
UNets, SD3, PixArt, CogVideoX and Sana call torch's scaled dot product attention (SDPA) themselves, and
`set_attention_backend` does nothing there and says nothing; UNets, SD3 and PixArt have processors for xformers instead.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch.nn.functional import scaled_dot_product_attention

from ..errors import TDMError

NATIVE = "native"  # torch's SDPA, which chooses among its own kernels
_BEST = ("_flash_3", "flash", "xformers", NATIVE)  # exact ones, in the order of trying; Sage rounds: only by name
_XFORMERS: dict[type, type] = {  # `enable_xformers...` replaces any processor, even those whose mathematics is another
    AttnProcessor2_0: XFormersAttnProcessor,
    JointAttnProcessor2_0: XFormersJointAttnProcessor,
}
_SDPA = {ours: torchs for torchs, ours in _XFORMERS.items()}
_MASKS = {  # denoisers whose attention is masked, and how; the others never pass a mask
    "PixArtTransformer2DModel": torch.float32,
    "ZImageTransformer2DModel": torch.bool,
    "QwenImageTransformer2DModel": torch.bool,
    "Krea2Transformer2DModel": torch.bool,
}
_logger = logging.getLogger(__name__)


def use_attention(denoiser: Any, backend: str | None = None, device: torch.device | str | None = None) -> str:
    """Switch a denoiser's attention to a backend, after the backend has computed one small attention correctly.

    The rest of the process keeps its backend: diffusers' own `set_attention_backend` changes that of all models.

    Args:
        denoiser: a diffusers network.
        backend: a name of diffusers' dispatcher, such as "native", "xformers", "flash" or "sage"; None for the best
            that works. None tries FlashAttention 3 and 2, then xformers, then SDPA, and logs why one was passed over.
        device: where the denoiser runs; None for where its weights are.

    Returns:
        The name of the backend it has now.

    Raises:
        TDMError: the named backend does not work here; the message says why, and which ones do. Nothing has changed.
    """
    device = torch.device(device or denoiser.device)
    for name in _BEST if backend is None else (backend,):
        reason = _why_not(denoiser, name, device)
        if reason is None:
            _switch(denoiser, name)
            _logger.info("attention of %s: %s", type(denoiser).__name__, name)
            return name
        _logger.info("attention of %s: not %s: %s", type(denoiser).__name__, name, reason)
    works = ", ".join(available_attention(denoiser, device))
    raise TDMError(f"attention backend {name!r} does not work here: {reason}; these do: {works}")


def available_attention(denoiser: Any, device: torch.device | str | None = None) -> list[str]:
    """The backends that work here, without those of the hub: a trial would download them. See `use_attention`."""
    device = torch.device(device or denoiser.device)
    names = [backend.value for backend in AttentionBackendName if not backend.value.endswith("_hub")]
    return [name for name in names if _why_not(denoiser, name, device) is None]


def _attentions(denoiser: Any) -> list[Any]:
    return [module for module in denoiser.modules() if isinstance(module, (Attention, AttentionModuleMixin))]


def _dispatched(denoiser: Any) -> bool:
    """Whether the dispatcher computes its attention: then, and only then, its processors note a backend."""
    return all(hasattr(attention.processor, "_attention_backend") for attention in _attentions(denoiser))


def _why_not(denoiser: Any, backend: str, device: torch.device) -> str | None:
    """Why this denoiser cannot have this backend, on one line; None if it can."""
    if not _dispatched(denoiser):
        if backend == NATIVE:
            return None
        if backend != "xformers":
            return f"{type(denoiser).__name__} does not go through diffusers' dispatcher"
        if other := {type(attention.processor) for attention in _attentions(denoiser)} - {*_XFORMERS, *_SDPA}:
            return f"no xformers version of {', '.join(sorted(processor.__name__ for processor in other))}"
    mask = _MASKS.get(type(denoiser).__name__)
    try:
        with attention_backend(backend):
            for width in {_head_width(attention) for attention in _attentions(denoiser)}:
                if not _is_right(backend, width, mask, denoiser.dtype, device):
                    return "it runs, but its result is wrong" + (" under a mask" if mask else "")
    except Exception as error:  # each kernel refuses in its own way
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _head_width(attention: Any) -> int:
    """The channels of one head of an attention of any denoiser."""
    known: int | None = getattr(attention, "head_dim", None)
    return known or attention.inner_dim // attention.heads


def _is_right(
    backend: str, width: int, mask_dtype: torch.dtype | None, dtype: torch.dtype, device: torch.device
) -> bool:
    """Compute one attention of heads of `width` channels with a backend, and compare it with SDPA in float32."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 44, 2, width, generator=generator).to(device, dtype)  # (B, tokens, heads, C)
    mask = None
    if mask_dtype is not None:
        keep = (torch.arange(44, device=device) < 20)[None, None, None]
        mask = keep if mask_dtype is torch.bool else (~keep).to(dtype) * -10000.0
    out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=AttentionBackendName(backend))
    exact_mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    query, key, value = (tensor.float().transpose(1, 2) for tensor in (query, key, value))
    exact = scaled_dot_product_attention(query, key, value, attn_mask=exact_mask).transpose(1, 2)
    return torch.allclose(out.float(), exact, atol=0.1, rtol=0.0)  # room for int8 kernels; a lost mask is far outside


def _switch(denoiser: Any, backend: str) -> None:
    if _dispatched(denoiser):
        with attention_backend(backend):  # on leaving, the process has its own backend again
            denoiser.set_attention_backend(backend)
        return
    processors = _XFORMERS if backend == "xformers" else _SDPA
    for attention in _attentions(denoiser):
        if processor := processors.get(type(attention.processor)):
            attention.set_processor(processor())
