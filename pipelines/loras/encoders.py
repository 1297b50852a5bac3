"""The text encoders of a pipeline that can take a LoRA."""

from __future__ import annotations

import inspect


def adaptable_encoders(pipeline: type) -> list[str]:
    """The text encoders of a pipeline class for which diffusers loads LoRAs into one: all of them.

    diffusers knows the layer names of CLIP alone there; what is looked up in `layer_names.py` can go into T5 as well.
    """
    loadable = getattr(pipeline, "_lora_loadable_modules", [])
    encoders = [name for name in inspect.signature(pipeline).parameters if name.startswith("text_encoder")]
    return encoders if set(encoders).intersection(loadable) else []
