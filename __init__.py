"""TDM: Trajectory Distribution Matching (arXiv 2503.06674) for Diffusers and ComfyUI.

``import tdm`` is light: torch, diffusers, gradio and comfy are imported when a name that needs them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipelines.scheduler import TDMScheduler
    from .pipelines.tdm_pipeline import TDMPipeline

__version__ = "0.1.0"
__all__ = ["TDMPipeline", "TDMScheduler"]
WEB_DIRECTORY = "./web"  # the nodes' help pages: ComfyUI looks here for this name

_HOMES = {
    "TDMPipeline": ".pipelines.tdm_pipeline",
    "TDMScheduler": ".pipelines.scheduler",
    # Not ours: diffusers looks it up here to load ["tdm", "TDMScheduler"] of a model_index.json.
    "SchedulerMixin": ".pipelines.scheduler",
    # What ComfyUI calls when this folder is one of its custom nodes.
    "comfy_entrypoint": ".comfy_nodes",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
