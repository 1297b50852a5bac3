"""Bases: where they are, which family they are of, and their networks without weights."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from torch import nn

from ..errors import BaseNotFoundError, TDMError, first_line
from .base_weights import component_classes, left_out
from .bundled import BUNDLED, BUNDLED_TEACHER, bundled_path
from .families import Family, TeacherCall, family_of_pipeline
from .loras.encoders import adaptable_encoders
from .outlines import network_without_weights, published_configs

BUNDLED_TEACHER_CALL = TeacherCall(steps=50, guidance_scale=3.0)  # how its student was distilled and is measured

Source = str | os.PathLike[str]


def base_folder(base: Source) -> str:
    """What diffusers loads for a base's name: "bundled" becomes its folder, anything else stays."""
    return str(bundled_path() / "teacher") if base == BUNDLED else str(base)


def teacher_call(base: Source, family: Family, config: Mapping[str, Any]) -> TeacherCall:
    """How a base is run as a teacher: the bundled one in its own way, any other as its family is.

    Args:
        config: of the base's pipeline.
    """
    bundled = Path(base_folder(base)).resolve() == BUNDLED_TEACHER.resolve()
    return BUNDLED_TEACHER_CALL if bundled else family.teacher_call_of(config)


def family_of_base(folder: str, **hub: Any) -> Family:
    """The family of a base folder or hub repository, by its `model_index.json`.

    Raises:
        BaseNotFoundError: there is no such pipeline.
        TDMError: its family is not supported, or it has two denoisers (Wan 2.2).
    """
    if Path(folder).is_file():
        what = f"the base {folder} is a single file"
        if Path(folder).suffix != ".safetensors":
            raise TDMError(f"{what}, not a .safetensors file; get the model as .safetensors or as a folder")
        raise TDMError(
            f"{what}; write it as a folder first: tdm convert {folder} "
            "--base FOLDER_OF_WHAT_IT_WAS_TUNED_FROM --out NEW_FOLDER"
        )
    try:
        config: Any = DiffusionPipeline.load_config(folder, **hub)
    except (OSError, ValueError) as error:
        raise BaseNotFoundError(f"cannot read the base {folder!r} ({first_line(error)}{offline()})") from None
    if (config.get("transformer_2") or [None])[0] is not None:
        raise TDMError(f"the base {folder} has two denoisers, and a student is one LoRA on one; it is not supported")
    return family_of_pipeline(str(config.get("_class_name")))


def offline() -> str:
    """The end of a message about something that is not on this machine, where no hub is asked."""
    return "; HF_HUB_OFFLINE is set, so no hub is asked" if constants.HF_HUB_OFFLINE else ""


def download(repository: Source, name: str, hub: Mapping[str, Any]) -> Path | None:
    """One file of a hub repository, through the local cache; None if there is no such file or repository."""
    try:
        return Path(hf_hub_download(str(repository), name, **hub))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
    except OSError as error:
        raise TDMError(f"cannot reach the hub repository {repository} ({first_line(error)}{offline()})") from None


def networks_without_weights(base: str, **hub: Any) -> tuple[Family, dict[str, nn.Module]]:
    """(family, networks that can take a LoRA by component) of a base, on the meta device.

    Args:
        base: folder, hub id, or "bundled".
        hub: options of `hf_hub_download`, such as `cache_dir` and `local_files_only`.

    Raises:
        TDMError: there is no such base, its family is not supported, or a config cannot be read.
    """
    folder, family, index = _read_index(base, hub)
    networks = {}
    for component in (family.denoiser, *adaptable_encoders(family.pipeline_class())):
        library, name = index.get(component) or (None, None)
        if library is None or name is None:  # a base may leave an encoder out
            continue
        with _reading_config(component, base):
            networks[component] = network_without_weights(library, name, folder, component, hub)
    return family, networks


def pipeline_without_weights(base: str, **hub: Any) -> tuple[Family, Any]:
    """(family, pipeline) of a base: networks on the meta device, the true scheduler and tokenizers. It answers every
    question about sizes and shapes, and cannot draw.

    Args:
        base, hub: as in `networks_without_weights`.

    Raises:
        TDMError: there is no such base, its family is not supported, or a config cannot be read.
    """
    folder, family, index = _read_index(base, hub)
    pipeline = family.pipeline_class()
    components: dict[str, Any] = {}
    named, absent = component_classes(index), left_out(index)
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        if name in named:
            with _reading_config(name, base):
                components[name] = _component_without_weights(family, name, *named[name], folder, hub)
        elif name in index:
            components[name] = None if name in absent else index[name]
        elif name != "self" and parameter.default is inspect.Parameter.empty:
            components[name] = None
    if components.get(family.denoiser) is None:
        raise TDMError(f"the base {base} has no {family.denoiser}")
    return family, pipeline(**components)


def outline(base: str, **hub: Any) -> tuple[Family, Any, str]:
    """(family, pipeline without weights, whose configs were read) of a base, for its sizes and shapes.

    A folder, and a hub repository whose configs are in the hub's cache, is read itself. For a published base that is
    not there, its configs that are shipped here are read. No hub is asked for them.

    Args:
        base, hub: as in `networks_without_weights`.

    Raises:
        TDMError: as `pipeline_without_weights`.
    """
    shipped = published_configs(base)
    try:
        family, pipeline = pipeline_without_weights(base, **hub | ({"local_files_only": True} if shipped else {}))
    except TDMError:
        if shipped is None:
            raise
        return *pipeline_without_weights(str(shipped)), f"published configs of {base}, shipped with tdm"
    return family, pipeline, f"configs of {base}"


def _read_index(base: str, hub: dict[str, Any]) -> tuple[str, Family, Any]:
    """(folder or hub id, family, `model_index.json`) of a base."""
    folder = base_folder(base)
    return folder, family_of_base(folder, **hub), DiffusionPipeline.load_config(folder, **hub)


@contextlib.contextmanager
def _reading_config(component: str, base: str) -> Iterator[None]:
    """Turn what diffusers and transformers raise for a bad config into a TDMError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise TDMError(f"cannot read the config of {component} of the base {base} ({first_line(error)})") from None


def _component_without_weights(
    family: Family, name: str, library: str, class_name: str, folder: str, hub: dict[str, Any]
) -> Any:
    if name in (family.denoiser, "vae") or name.startswith("text_encoder"):
        return network_without_weights(library, class_name, folder, name, hub)
    if name == "scheduler" or name.startswith("tokenizer"):
        if Path(folder).is_dir() and not (Path(folder) / name).is_dir():  # transformers makes an empty tokenizer then
            raise OSError(f"there is no folder {name}")
        return getattr(importlib.import_module(library), class_name).from_pretrained(folder, subfolder=name, **hub)
    return None
