"""A base in outline: its stock pipeline with the networks on the meta device, in no memory; only configs are read."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..errors import TDMError
from .families import Family
from .locate import base_folder, family_of_base
from .loras.skeleton import network_without_weights


def outline(base: str, **hub: Any) -> tuple[Family, Any]:
    """(family, pipeline) of a base: denoiser and VAE on the meta device, the true scheduler and tokenizers, no text
    encoders. It answers every question about sizes and shapes, and cannot draw.

    Args:
        base: folder, hub id, or "bundled".
        hub: options of `hf_hub_download`, such as `cache_dir` and `local_files_only`.

    Raises:
        TDMError: there is no such base, its family is not supported, or a config cannot be read.
    """
    folder = base_folder(base)
    family = family_of_base(folder, **hub)
    pipeline = family.pipeline_class()
    index: Any = DiffusionPipeline.load_config(folder, **hub)
    parts: dict[str, Any] = {}
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        entry = index.get(name)
        if isinstance(entry, list | tuple):
            try:
                library, class_name = entry
                parts[name] = _part(family, name, library, class_name, folder, hub)
            except (OSError, ValueError) as error:
                line = next(iter(str(error).splitlines()), type(error).__name__)
                raise TDMError(f"cannot read the config of {name} of the base {base} ({line})") from None
        elif name in index:
            parts[name] = entry
        elif name != "self" and parameter.default is inspect.Parameter.empty:
            parts[name] = None
    if parts.get(family.denoiser) is None:
        raise TDMError(f"the base {base} has no {family.denoiser}")
    return family, pipeline(**parts)


def _part(family: Family, name: str, library: str | None, class_name: str | None, folder: str, hub: Any) -> Any:
    if library is None or class_name is None:
        return None
    if name in (family.denoiser, "vae"):
        return network_without_weights(library, class_name, folder, name, hub)
    if name == "scheduler" or name.startswith("tokenizer"):
        if Path(folder).is_dir() and not (Path(folder) / name).is_dir():  # transformers makes an empty tokenizer then
            raise OSError(f"there is no folder {name}")
        return getattr(importlib.import_module(library), class_name).from_pretrained(folder, subfolder=name, **hub)
    return None
