"""PixArt pipelines that load LoRAs: diffusers has no LoRA loader for them, and no adapter methods on their network."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin


class _AdaptableTransformer(PixArtTransformer2DModel, PeftAdapterMixin):
    """PixArt's transformer with `load_lora_adapter`, `set_adapters`, ...: methods only, no new parameters or state."""


# `save_pretrained` writes a component's class into model_index.json: there it must stay the stock class.
_AdaptableTransformer.__name__ = PixArtTransformer2DModel.__name__
_AdaptableTransformer.__qualname__ = PixArtTransformer2DModel.__qualname__
_AdaptableTransformer.__module__ = PixArtTransformer2DModel.__module__


class PixArtLoraLoaderMixin(SanaLoraLoaderMixin):
    """`load_lora_weights` and its relatives for a PixArt pipeline, through diffusers' generic transformer loader."""

    def register_modules(self, **components: Any) -> None:
        """Every component passes here once, when the pipeline is built; the transformer gains its adapter methods."""
        transformer = components.get("transformer")
        if type(transformer) is PixArtTransformer2DModel:
            transformer.__class__ = _AdaptableTransformer
        super().register_modules(**components)  # type: ignore[misc]


class TDMPixArtAlphaPipeline(PixArtLoraLoaderMixin, PixArtAlphaPipeline):
    """PixArt-alpha with a LoRA loader."""


class TDMPixArtSigmaPipeline(PixArtLoraLoaderMixin, PixArtSigmaPipeline):
    """PixArt-Sigma with a LoRA loader."""
