"""`use_attention` on ten real families: what it got is what runs, and a refusal changes nothing."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tdm.errors import TDMError
from tdm.pipelines.attention import _attentions, available_attention, use_attention
from tdm.tests import tiny
from tdm.tests.pipelines.students import Make, latents, load
from torch.utils._python_dispatch import TorchDispatchMode

DISPATCHED = ("flux", "wan", "zimage", "qwenimage")


class Operators(TorchDispatchMode):
    """Counts the operators that run inside the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def setting(denoiser: Any) -> list[tuple[type, Any]]:
    """What `use_attention` may change: every processor's class and backend."""
    processors = [attention.processor for attention in _attentions(denoiser)]
    return [(type(p), getattr(p, "_attention_backend", None)) for p in processors]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_best_on_a_cpu_is_sdpa_and_the_log_says_why_the_others_were_passed_over(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny.build(family)
    expected = latents(pipe, family)
    denoiser = pipe.unet if family in ("sd15", "sdxl") else pipe.transformer
    with caplog.at_level(logging.INFO, logger="tdm.pipelines.attention"):
        assert use_attention(denoiser) == "native"
    assert any(": not xformers: " in message for message in caplog.messages)
    assert caplog.messages[-1].endswith(": native")
    assert torch.equal(latents(pipe, family), expected)


@pytest.mark.parametrize("family", DISPATCHED)
def test_a_dispatched_family_runs_the_kernel_it_was_given(family: str) -> None:
    pipe = tiny.build(family)
    default = _AttentionBackendRegistry.get_active_backend()
    with Operators() as native:
        expected = latents(pipe, family)
    assert use_attention(pipe.transformer, "_native_math") == "_native_math"
    with Operators() as changed:
        out = latents(pipe, family)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    fused = "_scaled_dot_product_flash_attention_for_cpu"  # text encoders go on using it
    assert native.counts[fused] - changed.counts[fused] >= 4 * len(_attentions(pipe.transformer))
    assert _AttentionBackendRegistry.get_active_backend() == default  # other models keep theirs
    assert use_attention(pipe.transformer, "native") == "native"
    assert torch.equal(latents(pipe, family), expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("backend", ["_native_efficient", "xformers", "no_such_kernel"])
def test_an_impossible_backend_is_refused_with_the_reason_and_nothing_changes(family: str, backend: str) -> None:
    pipe = tiny.build(family)
    denoiser = pipe.unet if family in ("sd15", "sdxl") else pipe.transformer
    before, default = setting(denoiser), _AttentionBackendRegistry.get_active_backend()
    with pytest.raises(TDMError, match=f"'{backend}' does not work here: .+; these do: .*native") as error:
        use_attention(denoiser, backend)
    assert "\n" not in str(error.value)
    assert setting(denoiser) == before
    assert _AttentionBackendRegistry.get_active_backend() == default


def test_families_that_bypass_the_dispatcher_say_so() -> None:
    transformer = tiny.build("sana").transformer
    assert available_attention(transformer) == ["native"]
    with pytest.raises(TDMError, match="SanaTransformer2DModel does not go through diffusers' dispatcher"):
        use_attention(transformer, "flash")
    with pytest.raises(TDMError, match="no xformers version of SanaAttnProcessor2_0, SanaLinearAttnProcessor2_0"):
        use_attention(transformer, "xformers")


def test_a_backend_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test backend drops the mask. In diffusers 0.42 xformers adds Z-Image's boolean masks to the scores."""
    backends = _AttentionBackendRegistry._backends
    name = "_native_math"
    right = backends[name]
    monkeypatch.setitem(backends, name, lambda **call: right(**{**call, "attn_mask": None}))
    assert use_attention(tiny.build("flux").transformer, name) == name  # no masks there
    with pytest.raises(TDMError, match="its result is wrong under a mask"):
        use_attention(tiny.build("zimage").transformer, name)


def test_a_students_pipeline_keeps_its_student(make: Make) -> None:
    pipe = load(make("flux"))
    expected = latents(pipe, "flux")
    assert pipe.use_attention("_native_math") == "_native_math"
    torch.testing.assert_close(latents(pipe, "flux"), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(TDMError, match="Flash Attention backend 'flash' is not usable"):
        pipe.use_attention("flash")
    assert all(backend == "_native_math" for _, backend in setting(pipe.transformer))
    assert pipe.use_attention() == "native"
    assert torch.equal(latents(pipe, "flux"), expected)
