"""PixArt pipelines with what diffusers gives to all others.

They have no LoRA loader there, no adapter methods on their network, and swallow `callback_on_step_end` without a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin
from torch import Tensor

from ...errors import TDMError


class _AdaptableTransformer(PixArtTransformer2DModel, PeftAdapterMixin):
    """PixArt's transformer with `load_lora_adapter`, `set_adapters`, ...: methods only, no new parameters or state."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _unpickled, (), self.__getstate__()  # its name leads to the stock class


def _unpickled() -> _AdaptableTransformer:
    return object.__new__(_AdaptableTransformer)


# `save_pretrained` writes a component's class into model_index.json: there it must stay the stock class.
_AdaptableTransformer.__name__ = PixArtTransformer2DModel.__name__
_AdaptableTransformer.__qualname__ = PixArtTransformer2DModel.__qualname__
_AdaptableTransformer.__module__ = PixArtTransformer2DModel.__module__


class PixArtMixin(SanaLoraLoaderMixin):
    """`load_lora_weights` and its relatives, through diffusers' generic transformer loader; what callbacks read."""

    _callback_tensor_inputs = ("latents",)

    def register_modules(self, **components: Any) -> None:
        """Every component passes here once, when the pipeline is built; the transformer gains its adapter methods."""
        transformer = components.get("transformer")
        if type(transformer) is PixArtTransformer2DModel:
            transformer.__class__ = _AdaptableTransformer
        super().register_modules(**components)  # type: ignore[misc]

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the current run."""
        return len(self.scheduler.timesteps)  # type: ignore[attr-defined]


def _with_step_end(stock: type[Any]) -> Callable[..., Any]:
    """The `__call__` of a PixArt pipeline with `callback_on_step_end` and `callback_on_step_end_tensor_inputs`."""
    call: Any = stock.__call__
    signature = inspect.signature(call)

    @functools.wraps(call)
    def __call__(  # noqa: N807
        self: Any,
        *args: Any,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> Any:
        if callback_on_step_end is None:
            return call(self, *args, **kwargs)
        names = callback_on_step_end_tensor_inputs
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            names = callback_on_step_end.tensor_inputs
        if other := set(names) - set(self._callback_tensor_inputs):
            known = ", ".join(self._callback_tensor_inputs)
            raise TDMError(f"PixArt's callback can be given {known}, not {', '.join(sorted(other))}")
        bound = signature.bind_partial(self, *args, **kwargs)
        callback, every = bound.arguments.get("callback"), bound.arguments.get("callback_steps", 1)

        def on_step(i: int, timestep: Tensor, latents: Tensor) -> None:
            changed = callback_on_step_end(self, i, timestep, dict.fromkeys(names, latents)).get("latents", latents)
            if changed is not latents:  # the loop goes on with its own tensor
                if changed.shape != latents.shape:
                    shapes = f"{tuple(changed.shape)}, not {tuple(latents.shape)}"
                    raise TDMError(f"the callback returned latents of another shape: {shapes}")
                latents.copy_(changed)
            if callback is not None and i % every == 0:
                callback(i, timestep, latents)

        bound.arguments["callback"] = on_step
        bound.arguments["callback_steps"] = min(every, 1)  # each step; 0 and less are for the pipeline to refuse
        return call(*bound.args, **bound.kwargs)

    *parameters, rest = signature.parameters.values()
    wrapper = inspect.signature(__call__, follow_wrapped=False).parameters
    added = [wrapper["callback_on_step_end"], wrapper["callback_on_step_end_tensor_inputs"]]
    __call__.__signature__ = signature.replace(parameters=[*parameters, *added, rest])  # type: ignore[attr-defined]
    return __call__


class TDMPixArtAlphaPipeline(PixArtMixin, PixArtAlphaPipeline):
    """PixArt-alpha with a LoRA loader and callbacks at the end of each step."""

    __call__ = _with_step_end(PixArtAlphaPipeline)


class TDMPixArtSigmaPipeline(PixArtMixin, PixArtSigmaPipeline):
    """PixArt-Sigma with a LoRA loader and callbacks at the end of each step."""

    __call__ = _with_step_end(PixArtSigmaPipeline)
