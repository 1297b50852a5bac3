"""The weights of a distilled checkpoint: a whole model of the base's family, whose steps somebody else made few."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import TDMError, first_line
from ..pipelines.base_weights import Weights, reading, weight_files
from ..pipelines.bundled import INDEX
from ..pipelines.loras.file import open_safetensors
from ..pipelines.prediction_types import PredictionType
from ..pipelines.single_file import is_checkpoint, stated_scheduler
from ..pipelines.students.recipe import STUDENT_FILE
from .tasks.base_model import BaseModel

_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")  # of diffusers' names in a single file


def is_distilled(source: Path) -> bool:
    """Whether a path is a whole model, or its denoiser, and no student: a folder of diffusers, or a .safetensors file
    without a LoRA in it.

    Raises:
        TDMError: a file that cannot be read, or a whole model in a container that is not read here (.gguf, a pickle).
    """
    if source.is_dir():
        return not (source / STUDENT_FILE).is_file() and any((source / name).is_file() for name in (INDEX, _CONFIG))
    return is_checkpoint(source)


def distilled_weights(
    source: Path, base_model: BaseModel, network: nn.Module, prediction_type: PredictionType
) -> Mapping[str, Tensor]:
    """The denoiser's weights of a distilled checkpoint, under diffusers' names, each read when it is asked for. Of a
    single file in the original layout those that diffusers splits or joins are in main memory.

    Args:
        source: a folder of a pipeline or of its denoiser, or a .safetensors file (see `is_distilled`).
        base_model: what it was distilled from.
        network: the denoiser of the base.
        prediction_type: of the base.

    Raises:
        TDMError: it is of another class or prediction type than the base, has no weights, or cannot be read.
    """
    if source.is_dir():
        folder = source / base_model.family.denoiser if (source / INDEX).is_file() else source
        _require_class(folder, type(network).__name__)
        scheduler = _json(source / _SCHEDULER) if (source / _SCHEDULER).is_file() else {}
        _require_prediction(source, scheduler, prediction_type)
        return Weights(weight_files(folder))
    return _of_file(source, base_model, network, prediction_type)


def _of_file(
    source: Path, base_model: BaseModel, network: nn.Module, prediction_type: PredictionType
) -> Mapping[str, Tensor]:
    whole = Weights([source])
    with open_safetensors(source) as file:
        stated = stated_scheduler(source, set(whole), file.metadata() or {})
    _require_prediction(source, stated, prediction_type)
    denoiser, names = base_model.family.denoiser, set(base_model.weights(base_model.family.denoiser))
    for prefix in (*_PREFIXES, f"{denoiser}."):
        if 2 * sum(prefix + name in whole for name in names) > len(names):
            return Weights([source], prefix)
    network_class: Any = type(network)
    if not hasattr(network_class, "from_single_file"):
        raise TDMError(
            f"the names in {source} are not those of {network_class.__name__}, and diffusers reads no other single "
            "files of this family; get this model as a folder"
        )
    try:
        converted = network_class.from_single_file(str(source), config=base_model.folder, subfolder=denoiser)
    except Exception as error:  # diffusers reads the keys of another network in any way, and fails in any
        raise TDMError(
            f"{source} cannot be read as a {network_class.__name__} like that of the base: {first_line(error)}"
        ) from None
    weights: dict[str, Tensor] = converted.state_dict()
    return weights


def _require_class(folder: Path, expected: str) -> None:
    """Raise TDMError unless a denoiser's folder says that it is of this class."""
    if not (folder / _CONFIG).is_file():
        raise TDMError(f"{folder.parent} has no {folder.name}: it is not a model of the base's family")
    if (name := _json(folder / _CONFIG).get("_class_name")) != expected:
        raise TDMError(f"{folder} is a {name}, and the base's denoiser a {expected}; take a model of the base's family")


def _require_prediction(source: Path, scheduler: Mapping[str, Any], expected: PredictionType) -> None:
    """Raise TDMError if a checkpoint states another prediction type than its base has."""
    stated, known = scheduler.get("prediction_type"), ("epsilon", "v_prediction")
    if stated in known and expected in known and stated != expected:
        raise TDMError(f"{source} predicts {stated}, and the base {expected}; take a model that predicts what it does")


def _json(path: Path) -> dict[str, Any]:
    with reading(str(path)):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
