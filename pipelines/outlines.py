"""Networks without weights, by their configs; and the configs of published bases, which are shipped here."""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .families import FAMILY_NAMES, family_of_pipeline

CONFIGS = Path(__file__).parent / "base_configs"  # <owner>/<name>/: a pipeline's folder without weights and tokenizers


def published_configs(base: str | os.PathLike[str]) -> Path | None:
    """The folder with the published configs of a base, which is shipped here. None: there is none for this hub id, or
    a folder of that name is on this machine.
    """
    folder = CONFIGS / base
    return folder if folder in published_bases().values() and not Path(base).exists() else None


@functools.cache
def published_bases() -> Mapping[str, Path]:
    """The folder of configs that is shipped here for each family: of the base that the family's preset names."""
    folders = {}
    for index in CONFIGS.glob("*/*/model_index.json"):
        pipeline = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        folders[family_of_pipeline(pipeline).name] = index.parent
    return {family: folders[family] for family in FAMILY_NAMES}


def network_without_weights(library: str, name: str, folder: str, component: str, hub: dict[str, Any]) -> nn.Module:
    """A component of a base on the meta device, from its config: class `name` of `library` ("diffusers" or
    "transformers").
    """
    network_class = getattr(importlib.import_module(library), name)
    if library == "diffusers":
        config = network_class.load_config(folder, subfolder=component, **hub)
        with torch.device("meta"):
            return network_class.from_config(config)
    config = network_class.config_class.from_pretrained(folder, subfolder=component, **hub)
    with torch.device("meta"):
        return network_class(config)
